r"""Pooling over gated channels, as CBAM (convolutional block attention) pools: the mean and max of each
pixel.

With gates :math:`g = \sigma(\text{channel logits})` (B, C):

.. math:: \Big(\frac1C\sum_c g_c x_{cp}, \max_c g_c x_{cp}\Big)

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last, with any batch stride; logits may have
another float dtype. Gates, products and sums are float32 (float64 for float64 x), results have the dtype of
x. The gated x is never in memory. The pooling also hands x itself on, as `pool_pixels` does.

Backward, with q the gradient of the handed-on x, m and t those of mean and max, and a the first channel that
is the maximum, as in ATen (a NaN counts as the maximum):

.. math:: r_{cp} = g_c (m_p / C + t_p [c = a_p]), \quad dx_{cp} = q_{cp} + r_{cp}, \quad
          d\text{logit}_c = (1 - g_c) \sum_p x_{cp} r_{cp}

Source: Woo et al., 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.checks import check_logits, check_pooled_image
from fastflow.kernels.cpu.pool_channels import pool_channels_backward_cpu, pool_channels_cpu
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.pool_channels import launch_pool_channels, launch_pool_channels_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype

# -- definition ---------------------------------------------------------------------------------------------


def pool_channels_reference(x: Tensor, channel_logits: Tensor) -> Tensor:
    """The definition, in plain ATen: (B, 2, H, W)."""
    acc = acc_dtype(x.dtype)
    gated = x.to(acc) * torch.sigmoid(channel_logits.to(acc))[:, :, None, None]
    return torch.stack((gated.mean(dim=1), gated.max(dim=1).values), dim=1).to(x.dtype)


def pool_channels_backward_reference(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the logits by the formulas of this module."""
    acc, channels = acc_dtype(x.dtype), x.shape[1]
    mean, top = grad.to(acc).unbind(1)
    gates = torch.sigmoid(channel_logits.to(acc))
    chosen = F.one_hot(index.long(), channels).movedim(-1, 1)
    r = (mean[:, None] / channels + top[:, None] * chosen) * gates[:, :, None, None]
    d_logits = (1 - gates) * (x * r).sum(dim=(2, 3))
    d_x = (r if passed is None else passed + r).to(x.dtype)
    return d_x.contiguous(memory_format=memory_format(is_channels_last(x))), d_logits.to(channel_logits.dtype)


# -- op and autograd ---------------------------------------------------------------------------------------


def _pool_channels_fake(x: Tensor, channel_logits: Tensor, index: bool) -> tuple[Tensor, Tensor]:
    batch, _, h, w = x.shape
    return x.new_empty(batch, 2, h, w), x.new_empty((batch, h, w) if index else (0,), dtype=torch.int32)


def _pool_channels_backward_fake(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return empty_image(x.shape, x, is_channels_last(x)), channel_logits.new_empty(channel_logits.shape)


_pool_channels = register(
    "pool_channels",
    definition=pool_channels_reference,
    cpu=pool_channels_cpu,
    triton=launch_pool_channels,
    fake=_pool_channels_fake,
    functions=("pool_channels",),
)
_pool_channels_backward = register(
    "pool_channels_backward",
    definition=pool_channels_backward_reference,
    cpu=pool_channels_backward_cpu,
    triton=launch_pool_channels_backward,
    fake=_pool_channels_backward_fake,
)


class PoolChannels(torch.autograd.Function):
    """The op under autograd. Saves its inputs and each maximum's place; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_logits: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        pooled, index = _pool_channels(x, channel_logits, True)
        ctx.save_for_backward(x, channel_logits, index)
        return pooled, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative("pool_channels")
        if grad is None:
            return passed, None
        d_x, d_logits = _pool_channels_backward(grad, *ctx.saved_tensors, passed)
        return d_x, d_logits


@planned
def pool_channels(x: Tensor, channel_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and max over the gated channels of each pixel, in one read of `x`.

    Args:
        x: (B, C, H, W), at least one channel and pixel.
        channel_logits: (B, C); the gate is their sigmoid.

    Returns:
        `(pooled, x)`: pooled (B, 2, H, W), contiguous, mean and max; x as `pool_pixels` returns it, not
        gated.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> x = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1)
        >>> pool_channels(x, torch.zeros(1, 2))[0].flatten().tolist()
        [2.0, 3.0]
    """
    check_pooled_image(x)
    check_logits("channel_logits", channel_logits, tuple(x.shape[:2]), x)
    if takes_reference():
        return pool_channels_reference(x, channel_logits), x
    if not is_recorded(x, channel_logits):
        return _pool_channels(x, channel_logits, False)[0], x
    pooled, x = differentiate(PoolChannels, x, channel_logits)
    return pooled, x
