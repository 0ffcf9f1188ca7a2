r"""The features of both heads of a classification conditioner: two linear maps of one vector, and GELU.

.. math:: F_h = \text{gelu}(v W_h^\top + b_h) \quad (h = \text{scale}, \text{shift})

v (B, N), weights (H, N) and biases (H,) have one float dtype, which the results keep. The values are those of
two linear layers; one launch activates both, and the backward pass adds their gradients of v in the product.
Source: MAGIC-Flow, classification conditioner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.checks import check_device, check_dtype
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, takes_reference
from fastflow.numerics import full_precision

Pair = tuple[Tensor, Tensor]


def head_features_reference(v: Tensor, weights: Pair, biases: Pair) -> Pair:
    """The definition, in plain ATen."""
    with full_precision(v):
        scale, shift = (F.gelu(F.linear(v, w, b)) for w, b in zip(weights, biases, strict=True))
    return scale, shift


register(
    "head_features",
    definition=head_features_reference,
    triton=None,
    fake=head_features_reference,
    functions=("head_features",),
)


def _linear_maps(v: Tensor, weights: Pair, biases: Pair) -> Tensor:
    """(2, B, H), so that one launch activates both."""
    linear = v.new_empty(2, len(v), len(biases[0]))
    with full_precision(v):
        for out, weight, bias in zip(linear, weights, biases, strict=True):
            torch.addmm(bias, v, weight.t(), out=out)
    return linear


class HeadFeatures(torch.autograd.Function):
    """The op under autograd; a second derivative is an error. Saves v, the weights and the linear maps."""

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        scale_weight: Tensor,
        shift_weight: Tensor,
        scale_bias: Tensor,
        shift_bias: Tensor,
    ) -> Pair:
        linear = _linear_maps(v, (scale_weight, shift_weight), (scale_bias, shift_bias))
        ctx.save_for_backward(v, scale_weight, shift_weight, linear)
        scale, shift = F.gelu(linear).unbind(0)
        return scale, shift

    @staticmethod
    def backward(ctx: Any, grad_scale: Tensor, grad_shift: Tensor) -> tuple[Tensor, ...]:
        refuse_second_derivative("head_features")
        v, scale_weight, shift_weight, linear = ctx.saved_tensors
        grads = torch.ops.aten.gelu_backward(torch.stack((grad_scale, grad_shift)), linear)
        d_scale, d_shift = grads.unbind(0)
        with full_precision(v):
            d_v = torch.addmm(d_scale @ scale_weight, d_shift, shift_weight)
            d_weights = d_scale.t() @ v, d_shift.t() @ v
        return d_v, *d_weights, *grads.sum(dim=1).unbind(0)


def head_features(v: Tensor, weights: Pair, biases: Pair) -> Pair:
    """The features of both heads. Pairs are ordered (log-scale, shift).

    Args:
        v: (B, N).
        weights: two (H, N).
        biases: two (H,).

    Returns:
        Two (B, H).

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> v, w, b = torch.ones(1, 2), torch.zeros(3, 2), torch.zeros(3)
        >>> scale, shift = head_features(v, (w, w), (b, b + 1))
        >>> scale.tolist(), [round(value, 4) for value in shift.flatten().tolist()]
        ([[0.0, 0.0, 0.0]], [0.8413, 0.8413, 0.8413])
    """
    check_dtype("v", v)
    if v.ndim != 2:
        raise ValueError(f"v must be (B, N), got {tuple(v.shape)}")
    units = weights[0].shape[0] if weights[0].ndim else 0
    for name, pair, shape in (("weights", weights, (units, v.shape[1])), ("biases", biases, (units,))):
        for value in pair:
            check_device(name, value, v)
            if tuple(value.shape) != shape or value.dtype != v.dtype:
                got = f"{tuple(value.shape)} {value.dtype}"
                raise ValueError(f"{name} must be {shape} {v.dtype} for v {tuple(v.shape)}, got {got}")
    if takes_reference() or torch.compiler.is_compiling():
        return head_features_reference(v, weights, biases)
    if is_recorded(v, *weights, *biases):
        scale, shift = HeadFeatures.apply(v, *weights, *biases)
    else:
        scale, shift = F.gelu(_linear_maps(v, weights, biases)).unbind(0)
    return scale, shift
