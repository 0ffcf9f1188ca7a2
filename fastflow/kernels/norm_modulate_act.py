r"""GroupNorm, a modulation per sample, an optional residual, GELU and an optional dropout.

This is `fastflow.kernels.norm_film_act` for scales and shifts that have been gathered already:

.. math:: y = m \cdot \mathrm{gelu}(\gamma_b \hat x + \beta_b + r)

`modulation` (B, C, 2) holds the pair :math:`(\gamma_{bc}, \beta_{bc})` of each sample and channel. It may be
a slice of the columns of one matrix (B, T) for many norms: kernels read pairs that lie together wherever a
sample begins. Its gradient is :math:`(\sum a \hat x, \sum a)` over the pixels of each sample and channel,
with a of that module, so that no sum over samples is left to the op. Shapes, dtypes, statistics and dropout
are those of `norm_film_act`. Sources: Wu & He, 2018 (GroupNorm); Perez et al., 2018 (FiLM, here without the
"1 +").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import check_device, check_dtype, check_image, check_same_shape
from fastflow.kernels.cpu.norm_film_act import norm_modulate_act_backward_cpu, norm_modulate_act_cpu
from fastflow.kernels.dropout import checked_seeds
from fastflow.kernels.layouts import empty_image, is_channels_last
from fastflow.kernels.norm_film_act import norm_film_act_backward_reference, norm_film_act_reference
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.norm_modulate_act import (
    launch_norm_modulate_act,
    launch_norm_modulate_act_backward,
)
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype

# -- definition ----------------------------------------------------------------------------------------------


def norm_modulate_act_reference(
    x: Tensor,
    groups: int,
    modulation: Tensor,
    residual: Tensor | None,
    eps: float,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, in plain ATen: `norm_film_act` with a row of its tables for each sample."""
    gamma, beta = modulation.unbind(2)
    samples = torch.arange(x.shape[0], device=x.device)
    return norm_film_act_reference(x, groups, gamma, beta, samples, residual, eps, dropout, seeds, dtype)


def norm_modulate_act_backward_reference(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    modulation: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, the residual (empty without one) and modulation: tables of one row per sample."""
    gamma, beta = modulation.unbind(2)
    samples = torch.arange(x.shape[0], device=x.device)
    dx, d_residual, d_gamma, d_beta = norm_film_act_backward_reference(
        grad, x, stats, gamma, beta, samples, residual, seeds, groups, dropout
    )
    return dx, d_residual, torch.stack((d_gamma, d_beta), dim=2)


# -- op and autograd -----------------------------------------------------------------------------------------


def _norm_modulate_act_fake(
    x: Tensor,
    modulation: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    stats = x.new_empty(x.shape[0], groups, 2, dtype=acc_dtype(x.dtype))
    return empty_image(x.shape, x, is_channels_last(x), dtype), stats


def _norm_modulate_act_backward_fake(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    modulation: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(x)
    d_residual = x.new_empty(0) if residual is None else empty_image(x.shape, residual, channels_last)
    d_modulation = modulation.new_empty(modulation.shape, dtype=acc_dtype(x.dtype))
    return empty_image(x.shape, x, channels_last), d_residual, d_modulation


_norm_modulate_act = register(
    "norm_modulate_act",
    definition=norm_modulate_act_reference,
    cpu=norm_modulate_act_cpu,
    triton=launch_norm_modulate_act,
    fake=_norm_modulate_act_fake,
    functions=("norm_modulate_act",),
)
_norm_modulate_act_backward = register(
    "norm_modulate_act_backward",
    definition=norm_modulate_act_backward_reference,
    cpu=norm_modulate_act_backward_cpu,
    triton=launch_norm_modulate_act_backward,
    fake=_norm_modulate_act_backward_fake,
)


class NormModulateAct(torch.autograd.Function):
    """The op under autograd; a second derivative is an error.

    Saves the inputs and two numbers per group.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        modulation: Tensor,
        residual: Tensor | None,
        seeds: Tensor | None,
        groups: int,
        eps: float,
        dropout: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        y, stats = _norm_modulate_act(x, modulation, residual, seeds, groups, eps, dropout, dtype)
        ctx.save_for_backward(x, stats, modulation, residual, seeds)
        ctx.groups, ctx.dropout = groups, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("norm_modulate_act")
        # Saved tensors are unpacked once, since a second time is an error under activation checkpointing.
        x, stats, modulation, residual, seeds = ctx.saved_tensors
        dx, d_residual, d_modulation = _norm_modulate_act_backward(
            grad, x, stats, modulation, residual, seeds, ctx.groups, ctx.dropout
        )
        d_residual = None if residual is None else d_residual
        return dx, d_modulation.to(modulation.dtype), d_residual, None, None, None, None, None


@planned
def norm_modulate_act(
    x: Tensor,
    groups: int,
    modulation: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise over groups of channels, modulate by sample, add the residual, activate, drop.

    Args:
        x: (B, C, H, W).
        groups: number of channel groups; divides C.
        modulation: (B, C, 2), the scale and shift of each sample and channel. Kernels copy it only where the
            2C numbers of a sample do not lie together.
        residual: (B, C, H, W) or None.
        eps: added to the variance.
        dropout: probability that an element becomes 0; the others are multiplied by 1/(1 - dropout).
        seeds: (B,) int32, of `dropout_seeds`: the same seeds drop the same elements. None draws fresh ones.
        dtype: dtype of the result; that of x when None.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, `groups` does not divide C, or `dropout` is not in
            [0, 1).

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
        >>> norm_modulate_act(x, 1, torch.tensor([[[1.0, 0.0]]])).flatten()
        tensor([-0.1587,  0.8413])
    """
    check_image("x", x)
    if tuple(modulation.shape) != (*x.shape[:2], 2):
        raise ValueError(f"modulation must be {(*x.shape[:2], 2)}, got {tuple(modulation.shape)}")
    check_dtype("modulation", modulation)
    check_device("modulation", modulation, x)
    if residual is not None:
        check_same_shape("residual", residual, x)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    seeds = checked_seeds(x, dropout, seeds)
    if dtype is not None:
        check_dtype("dtype", torch.empty(0, dtype=dtype))
    if takes_reference():
        return norm_modulate_act_reference(x, groups, modulation, residual, eps, dropout, seeds, dtype)
    inputs = (x, modulation, residual, seeds, groups, eps, dropout, dtype)
    if not is_recorded(x, modulation, residual):
        y: Tensor = _norm_modulate_act(*inputs)[0]
        return y
    out: Tensor = differentiate(NormModulateAct, *inputs)
    return out
