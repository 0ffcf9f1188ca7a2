r"""The label's share of the heads of many conditioners, in one launch.

.. math:: T_g = W_g F_g + b_g \quad (g = 1 \dots G)

F (G, F, R) holds features of R labels, one column for each; W_g (N_g, F) and b_g (N_g,) are parameters of
layers that need not be next to each other in memory. The result is flat: T_1 as (R, N_1), then T_2 and so on.
Sums are float32, or float64 for float64 parameters. The gradients are

.. math:: dW_g = dT_g F_g^\top, \quad db_g = \sum_r dT_{g,r}, \quad dF_g = W_g^\top dT_g

Kernels read each weight once in the forward pass and once in the backward pass; those of the gradients are
parts of one tensor. Source: MAGIC-Flow, classification conditioner (the head's last map, split).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.registry import refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.head_tables import launch_head_tables, launch_head_tables_backward

# -- definition ----------------------------------------------------------------------------------------------


def head_tables_reference(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """The definition, in plain ATen."""
    layers = zip(features.unbind(0), weights, biases, strict=True)
    return torch.cat([torch.addmm(bias, f.t(), weight.t()).flatten() for f, weight, bias in layers])


def head_tables_backward_reference(
    grad: Tensor, features: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the features, of all weights (flat) and of all biases (flat), in plain ATen."""
    labels = features.shape[2]
    parts = grad.split([labels * len(weight) for weight in weights])
    tables = [part.view(labels, -1) for part in parts]
    d_features = [weight.t() @ table.t() for weight, table in zip(weights, tables, strict=True)]
    d_weights = [(table.t() @ f.t()).flatten() for f, table in zip(features.unbind(0), tables, strict=True)]
    return torch.stack(d_features), torch.cat(d_weights), torch.cat([table.sum(dim=0) for table in tables])


# -- op and autograd -----------------------------------------------------------------------------------------


def _head_tables_fake(features: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    return features.new_empty(features.shape[2] * sum(len(weight) for weight in weights))


def _head_tables_backward_fake(
    grad: Tensor, features: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    size = sum(len(weight) for weight in weights)
    d_features = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    return d_features, features.new_empty(size * features.shape[1]), features.new_empty(size)


_head_tables = register(
    "head_tables",
    definition=head_tables_reference,
    triton=launch_head_tables,
    fake=_head_tables_fake,
    functions=("head_tables",),
)
_head_tables_backward = register(
    "head_tables_backward",
    definition=head_tables_backward_reference,
    triton=launch_head_tables_backward,
    fake=_head_tables_backward_fake,
)


class HeadTables(torch.autograd.Function):
    """The op under autograd; a second derivative is an error. Saves its arguments."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, *parameters: Tensor) -> Tensor:
        count = len(parameters) // 2
        ctx.save_for_backward(features, *parameters[:count])
        out: Tensor = _head_tables(features, list(parameters[:count]), list(parameters[count:]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative("head_tables")
        features, *weights = ctx.saved_tensors
        d_features, d_weights, d_biases = _head_tables_backward(grad.contiguous(), features, weights)
        parts = d_weights.split([weight.numel() for weight in weights])
        return (
            d_features,
            *(part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)),
            *d_biases.split([len(weight) for weight in weights]),
        )


def head_tables(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Label tables of many heads.

    Args:
        features: (G, F, R), float32 or float64.
        weights: G parameters (N_g, F), of the dtype of the features.
        biases: G parameters (N_g,), of the dtype of the features.

    Returns:
        (R * sum of N_g,): the tables (R, N_g), one after the other.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> f, w, b = torch.ones(2, 1, 1), torch.tensor([[1.0], [2.0]]), torch.zeros(2)
        >>> head_tables(f, (w, w[:1]), (b, b[:1])).tolist()
        [1.0, 2.0, 1.0]
    """
    _check(features, weights, biases)
    if takes_reference():
        return head_tables_reference(features, weights, biases)
    out: Tensor = HeadTables.apply(features, *weights, *biases)
    return out


def _check(features: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> None:
    if features.ndim != 3 or features.dtype not in (torch.float32, torch.float64):
        shape = tuple(features.shape)
        raise ValueError(f"features must be (G, F, R) float32 or float64, got {shape} {features.dtype}")
    if len(weights) != len(features) or len(biases) != len(features) or not weights:
        raise ValueError(
            f"weights and biases must hold one tensor for each of the {len(features)} groups of features, "
            f"got {len(weights)} and {len(biases)}"
        )
    for name, tensors, ndim in (("weights", weights, 2), ("biases", biases, 1)):
        for tensor, weight in zip(tensors, weights, strict=True):
            shape = (len(weight), features.shape[1])[:ndim]
            if tuple(tensor.shape) != shape or tensor.dtype != features.dtype:
                raise ValueError(
                    f"{name} must be {'(N, F)' if ndim == 2 else '(N,)'} = {shape} {features.dtype}, "
                    f"got {tuple(tensor.shape)} {tensor.dtype}"
                )
            if tensor.device != features.device:
                raise ValueError(f"{name} must be on {features.device} like features, got {tensor.device}")
