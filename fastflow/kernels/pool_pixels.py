r"""Pooling over pixels, as CBAM (convolutional block attention) pools: the mean and max of each channel, and
means alone.

.. math:: \Big(\frac1{HW}\sum_p x_{cp}, \max_p x_{cp}\Big)

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last, with any batch stride. Sums are float32
(float64 for float64 x), results have the dtype of x.

The poolings also hand x itself on. Whoever reads x after them reads that one, and so the gradients of mean
and max are added to the gradient of x by the pass that makes it, instead of by passes of their own.

Backward, with q the gradient of the handed-on x, m and t those of mean and max, and a the pixel of the first
maximum in the order h*W + w, as in ATen (a NaN counts as the maximum):

.. math:: dx_{cp} = q_{cp} + m_c / HW + t_c [p = a_c]

Source: Woo et al., 2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.checks import check_pooled_image
from fastflow.kernels.cpu.pool_pixels import pool_pixels_backward_cpu, pool_pixels_cpu
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.pool_pixels import launch_pool_pixels, launch_pool_pixels_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype

# -- definition ---------------------------------------------------------------------------------------------


def pool_pixels_reference(x: Tensor) -> Tensor:
    """The definition, in plain ATen: (2, B, C)."""
    flat = x.flatten(2)
    return torch.stack((average_pixels_reference(x), flat.max(dim=2).values))


def average_pixels_reference(x: Tensor) -> Tensor:
    """The definition of the mean alone, in plain ATen: (B, C)."""
    return x.flatten(2).mean(dim=2, dtype=acc_dtype(x.dtype)).to(x.dtype)


def pool_pixels_backward_reference(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    """The gradient of x by the formula of this module."""
    acc, pixels = acc_dtype(grad.dtype), height * width
    d_x = (grad[0].to(acc) / pixels)[:, :, None].expand(-1, -1, pixels)
    if index is not None:
        d_x = d_x + grad[1].to(acc)[:, :, None] * F.one_hot(index.long(), pixels)
    d_x = d_x.unflatten(2, (height, width))
    if passed is not None:
        d_x = d_x + passed
    return d_x.to(grad.dtype).contiguous(memory_format=memory_format(channels_last))


# -- op and autograd ---------------------------------------------------------------------------------------


def _pool_pixels_fake(x: Tensor, maximum: bool, index: bool) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    first = x.new_empty((batch, channels) if index else (0,), dtype=torch.int32)
    return x.new_empty(2 if maximum else 1, batch, channels), first


def _pool_pixels_backward_fake(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    return empty_image((*grad.shape[1:], height, width), grad, channels_last)


_pool_pixels = register(
    "pool_pixels",
    definition=pool_pixels_reference,
    cpu=pool_pixels_cpu,
    triton=launch_pool_pixels,
    fake=_pool_pixels_fake,
    functions=("pool_pixels", "average_pixels"),
)
_pool_pixels_backward = register(
    "pool_pixels_backward",
    definition=pool_pixels_backward_reference,
    cpu=pool_pixels_backward_cpu,
    triton=launch_pool_pixels_backward,
    fake=_pool_pixels_backward_fake,
)


class PoolPixels(torch.autograd.Function):
    """The op under autograd. Saves the place of each maximum; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        pooled, index = _pool_pixels(x, maximum, maximum)
        ctx.save_for_backward(index if maximum else None)
        ctx.size, ctx.channels_last = x.shape[2:], is_channels_last(x)
        return pooled, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivative("pool_pixels")
        if grad is None:
            return passed, None
        (index,) = ctx.saved_tensors
        return _pool_pixels_backward(grad, index, passed, *ctx.size, ctx.channels_last), None


@planned
def pool_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and max over the pixels of each channel, in one read of `x`.

    Args:
        x: (B, C, H, W), at least one channel and pixel.

    Returns:
        `(pooled, x)`: pooled (2, B, C), mean and max; x as it came, to be used instead of the argument from
        here on, so that its gradient and that of `pooled` are added in one pass.

    Raises:
        ValueError: `x` is not a floating-point image batch, or has no pixels or channels.

    Example:
        >>> pooled, x = pool_pixels(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))
        >>> pooled.flatten().tolist()
        [2.0, 3.0]
    """
    check_pooled_image(x)
    if takes_reference():
        return pool_pixels_reference(x), x
    if not is_recorded(x):
        return _pool_pixels(x, True, False)[0], x
    pooled, x = differentiate(PoolPixels, x, True)
    return pooled, x


@planned
def average_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the pixels of each channel.

    Args:
        x: (B, C, H, W), at least one channel and pixel.

    Returns:
        `(mean, x)`: mean (B, C); x as `pool_pixels` returns it.

    Raises:
        ValueError: `x` is not a floating-point image batch, or has no pixels or channels.

    Example:
        >>> average_pixels(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))[0]
        tensor([[2.]])
    """
    check_pooled_image(x)
    if takes_reference():
        return average_pixels_reference(x), x
    if not is_recorded(x):
        return _pool_pixels(x, False, False)[0].squeeze(0), x
    pooled, x = differentiate(PoolPixels, x, False)
    return pooled.squeeze(0), x
