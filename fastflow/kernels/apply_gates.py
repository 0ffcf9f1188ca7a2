r"""The gates of CBAM (convolutional block attention), one per channel and one per pixel.

With gates :math:`g = \sigma(\text{channel logits})` (B, C) and :math:`s = \sigma(\text{spatial logits})` (B,
1, H, W):

.. math:: y_{cp} = x_{cp} g_c s_p

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last, with any batch stride; logits may have
float dtypes of their own. Gates, products and sums are float32 (float64 for float64 x), the result has the
dtype of x.

Backward: dx = dy g s, dlogit_c = (1 - g_c) sum_p x dx, dlogit_p = (1 - s_p) sum_c x dx. Source: Woo et al.,
2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import check_logits, check_pooled_image
from fastflow.kernels.cpu.apply_gates import apply_gates_backward_cpu, apply_gates_cpu
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.apply_gates import launch_apply_gates, launch_apply_gates_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype

# -- definition ---------------------------------------------------------------------------------------------


def apply_gates_reference(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    acc = acc_dtype(x.dtype)
    gated = x.to(acc) * torch.sigmoid(channel_logits.to(acc))[:, :, None, None]
    return (gated * torch.sigmoid(spatial_logits.to(acc))).to(x.dtype)


def apply_gates_backward_reference(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of both logits, by autograd of the definition."""
    leaves = [value.detach().requires_grad_() for value in (x, channel_logits, spatial_logits)]
    with torch.enable_grad():
        y = apply_gates_reference(*leaves)
    d_x, d_channel, d_spatial = torch.autograd.grad(y, leaves, grad)
    return d_x.contiguous(memory_format=memory_format(is_channels_last(x))), d_channel, d_spatial


# -- op and autograd ---------------------------------------------------------------------------------------


def _apply_gates_fake(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    return empty_image(x.shape, x, is_channels_last(x))


def _apply_gates_backward_fake(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_channel = channel_logits.new_empty(channel_logits.shape)
    d_spatial = spatial_logits.new_empty(spatial_logits.shape)
    return empty_image(x.shape, x, is_channels_last(x)), d_channel, d_spatial


_apply_gates = register(
    "apply_gates",
    definition=apply_gates_reference,
    cpu=apply_gates_cpu,
    triton=launch_apply_gates,
    fake=_apply_gates_fake,
    functions=("apply_gates",),
)
_apply_gates_backward = register(
    "apply_gates_backward",
    definition=apply_gates_backward_reference,
    cpu=apply_gates_backward_cpu,
    triton=launch_apply_gates_backward,
    fake=_apply_gates_backward_fake,
)


class ApplyGates(torch.autograd.Function):
    """The op under autograd. Saves its inputs; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
        ctx.save_for_backward(x, channel_logits, spatial_logits)
        y: Tensor = _apply_gates(x, channel_logits, spatial_logits)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refuse_second_derivative("apply_gates")
        d_x, d_channel, d_spatial = _apply_gates_backward(grad, *ctx.saved_tensors)
        return d_x, d_channel, d_spatial


@planned
def apply_gates(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    """Multiply `x` by a gate per channel and a gate per pixel, sigmoids of their logits.

    Args:
        x: (B, C, H, W), at least one channel and pixel.
        channel_logits: (B, C).
        spatial_logits: (B, 1, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> apply_gates(torch.ones(1, 1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1, 1)).item()
        0.25
    """
    check_pooled_image(x)
    check_logits("channel_logits", channel_logits, tuple(x.shape[:2]), x)
    check_logits("spatial_logits", spatial_logits, (x.shape[0], 1, *x.shape[2:]), x)
    if takes_reference():
        return apply_gates_reference(x, channel_logits, spatial_logits)
    if not is_recorded(x, channel_logits, spatial_logits):
        gated: Tensor = _apply_gates(x, channel_logits, spatial_logits)
        return gated
    y: Tensor = differentiate(ApplyGates, x, channel_logits, spatial_logits)
    return y
