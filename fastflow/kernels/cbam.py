r"""CBAM (convolutional block attention): a gate for each channel, then a gate for each pixel.

With the mean and the maximum over pixels of each channel, :math:`p_0` and :math:`p_1` (B, C), the shared
layers D (h, C) and U (C, h), and the convolution W (1, 2, k, k), k odd, padded to keep the size:

.. math:: c = U \sum_i \mathrm{relu}(D p_i), \quad v = x\,\sigma(c), \quad
          s = W * (\text{mean}_c\,v, \text{max}_c\,v), \quad y = v\,\sigma(s)

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last, with any batch stride; weights may have
float dtypes of their own. Everything between x and y is float32 (float64 for float64 x); y has the dtype of
x. The gated x is never in memory, and nothing of its size is saved for the backward pass but x.

A CPU without kernels, an exported graph and the reference run the ops `pool_pixels`, `pool_channels` and
`apply_gates` with plain products and a convolution between them, whose results have the dtype of x. Backward
is that of these parts (see their modules) and of the relu, which passes nothing at 0. Source: Woo et al.,
2018.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.apply_gates import apply_gates
from fastflow.kernels.checks import check_device, check_dtype, check_pooled_image
from fastflow.kernels.cpu.convolution import convolve
from fastflow.kernels.cpu.linear import grouped_linear
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.pool_channels import pool_channels
from fastflow.kernels.pool_pixels import pool_pixels
from fastflow.kernels.registry import (
    is_recorded,
    refuse_second_derivative,
    register,
    takes_reference,
    use_triton,
)
from fastflow.kernels.triton.cbam import MAX_CHANNELS, launch_cbam
from fastflow.kernels.triton.cbam_backward import launch_cbam_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype, full_precision

# The result, then the pooled pixels, their indices, the hidden units, the channel logits, the pooled
# channels, their indices and the spatial logits.
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

# -- definition ----------------------------------------------------------------------------------------------


def cbam_reference(x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    return _forward_reference(x, down, up, spatial_weight, False)[0]


def _forward_reference(x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor, keep: bool) -> Eight:
    """The result of the definition and, with `keep`, what lies on the way to it."""
    acc = acc_dtype(x.dtype)
    v = x.to(acc)
    top = v.flatten(2).max(dim=2)
    pooled_pixels = torch.stack((v.mean(dim=(2, 3)), top.values))
    with full_precision(x):
        units = F.linear(pooled_pixels, down.to(acc))
        channel_logits = F.linear(F.relu(units).sum(dim=0), up.to(acc))
        v = v * torch.sigmoid(channel_logits)[:, :, None, None]
        highest = v.max(dim=1)
        pooled_channels = torch.stack((v.mean(dim=1), highest.values), dim=1)
        spatial_logits = F.conv2d(
            pooled_channels, spatial_weight.to(acc), padding=spatial_weight.shape[2] // 2
        )
    y = (v * torch.sigmoid(spatial_logits)).to(x.dtype)
    kept = (
        pooled_pixels, top.indices.int(), units, channel_logits, pooled_channels, highest.indices.int(),
        spatial_logits,
    )  # fmt: skip
    y = y.contiguous(memory_format=memory_format(is_channels_last(x)))
    return y, *(value.contiguous() if keep else value.new_empty(0) for value in kept)  # type: ignore[return-value]


def cbam_backward_reference(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    spatial_weight: Tensor,
    pooled_pixels: Tensor,
    first_pixel: Tensor,
    units: Tensor,
    channel_logits: Tensor,
    pooled_channels: Tensor,
    first_channel: Tensor,
    spatial_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x and of the weights, by the formulas of this block's parts."""
    acc, pixels = acc_dtype(x.dtype), x.shape[2] * x.shape[3]
    gates, spatial = torch.sigmoid(channel_logits)[:, :, None, None], torch.sigmoid(spatial_logits)
    wide, upper = x.to(acc), grad.to(acc)
    products = upper * gates * spatial * wide
    d_spatial = products.sum(dim=1, keepdim=True) * (1 - spatial)
    padding = [spatial_weight.shape[2] // 2] * 2
    geometry = None, [1, 1], padding, [1, 1], False, [0, 0], 1, [True, True, False]
    with full_precision(x):
        d_pooled, d_weight, _ = torch.ops.aten.convolution_backward(
            d_spatial, pooled_channels, spatial_weight.to(acc), *geometry
        )
        through = d_pooled[:, :1].expand_as(wide) / x.shape[1]
        through = through.scatter_add(1, first_channel[:, None].long(), d_pooled[:, 1:])
        d_logits = (products.sum(dim=(2, 3)) + (wide * through * gates).sum(dim=(2, 3))) * (
            1 - torch.sigmoid(channel_logits)
        )
        d_units = torch.where(units > 0, d_logits @ up.to(acc), 0)
        d_up = d_logits.t() @ F.relu(units).sum(dim=0)
        d_down = d_units.flatten(0, 1).t() @ pooled_pixels.flatten(0, 1)
        d_mean, d_top = d_units @ down.to(acc)
    d_x = (upper * spatial + through) * gates + (d_mean / pixels)[:, :, None, None]
    d_x = d_x.flatten(2).scatter_add(2, first_pixel[:, :, None].long(), d_top[:, :, None]).view(x.shape)
    return (
        d_x.to(x.dtype).contiguous(memory_format=memory_format(is_channels_last(x))),
        d_down.to(down.dtype).contiguous(),
        d_up.to(up.dtype).contiguous(),
        d_weight.to(spatial_weight.dtype).contiguous(),
    )


def _composed(x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor) -> Tensor:
    """The block by ops of its parts."""
    pooled, x = pool_pixels(x)
    # The shared layers' last one is linear, so the sum over both poolings comes before it.
    hidden = F.relu(grouped_linear(pooled.flatten(0, 1), down)).unflatten(0, pooled.shape[:2])
    channel_logits = grouped_linear(hidden.sum(dim=0), up)
    pooled, x = pool_channels(x, channel_logits)
    padding = spatial_weight.shape[2] // 2
    return apply_gates(x, channel_logits, convolve(pooled, spatial_weight, None, padding=(padding, padding)))


# -- op and autograd -----------------------------------------------------------------------------------------


def _cbam_fake(x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor, keep: bool) -> Eight:
    batch, channels, h, w = x.shape
    hidden, acc = down.shape[0], acc_dtype(x.dtype)

    def kept(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape if keep else (0,), dtype=dtype, device=x.device)

    return (
        empty_image(x.shape, x, is_channels_last(x)),
        kept(2, batch, channels),
        kept(batch, channels, dtype=torch.int32),
        kept(2, batch, hidden),
        kept(batch, channels),
        kept(batch, 2, h, w),
        kept(batch, h, w, dtype=torch.int32),
        kept(batch, 1, h, w),
    )


def _cbam_backward_fake(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    spatial_weight: Tensor,
    pooled_pixels: Tensor,
    first_pixel: Tensor,
    units: Tensor,
    channel_logits: Tensor,
    pooled_channels: Tensor,
    first_channel: Tensor,
    spatial_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_down, d_up, d_weight = (value.new_empty(value.shape) for value in (down, up, spatial_weight))
    return empty_image(x.shape, x, is_channels_last(x)), d_down, d_up, d_weight


def _unsupported(x: Tensor, *rest: Any) -> str:
    return f"cbam kernels take at most {MAX_CHANNELS} channels" if x.shape[1] > MAX_CHANNELS else ""


_cbam = register(
    "cbam",
    definition=cbam_reference,
    cpu=_forward_reference,
    triton=launch_cbam,
    fake=_cbam_fake,
    functions=("cbam",),
    unsupported=_unsupported,
    limit=f"cbam takes kernels for at most {MAX_CHANNELS} channels",
)
_cbam_backward = register(
    "cbam_backward",
    definition=cbam_backward_reference,
    triton=launch_cbam_backward,
    fake=_cbam_backward_fake,
)


class Cbam(torch.autograd.Function):
    """The op under autograd. Saves x and what is pooled of it; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor) -> Tensor:
        y, *kept = _cbam(x, down, up, spatial_weight, True)
        ctx.save_for_backward(x, down, up, spatial_weight, *kept)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        refuse_second_derivative("cbam")
        d_x, d_down, d_up, d_weight = _cbam_backward(grad, *ctx.saved_tensors)
        return d_x, d_down, d_up, d_weight


def _check(x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor) -> None:
    check_pooled_image(x)
    channels = x.shape[1]
    if down.ndim != 2 or down.shape[1] != channels or down.shape[0] == 0:
        raise ValueError(f"down must be (h, {channels}) with h at least 1, got {tuple(down.shape)}")
    if tuple(up.shape) != (channels, down.shape[0]):
        raise ValueError(f"up must be {(channels, down.shape[0])}, got {tuple(up.shape)}")
    size = spatial_weight.shape[-1] if spatial_weight.ndim else 0
    if tuple(spatial_weight.shape) != (1, 2, size, size) or size % 2 == 0:
        raise ValueError(f"spatial_weight must be (1, 2, k, k) with k odd, got {tuple(spatial_weight.shape)}")
    for name, value in (("down", down), ("up", up), ("spatial_weight", spatial_weight)):
        check_dtype(name, value)
        check_device(name, value, x)


@planned
def cbam(x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor) -> Tensor:
    """Multiply `x` by a gate per channel, made of its pooled pixels, and a gate per pixel, made of channels.

    Args:
        x: (B, C, H, W), at least one channel and pixel.
        down: (h, C), the first of the shared layers, without a bias.
        up: (C, h), the second of the shared layers, without a bias.
        spatial_weight: (1, 2, k, k), k odd: the convolution of the mean and maximum over channels.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> down, up = torch.zeros(1, 2), torch.zeros(2, 1)
        >>> cbam(torch.ones(1, 2, 1, 1), down, up, torch.zeros(1, 2, 7, 7)).flatten()
        tensor([0.2500, 0.2500])
    """
    _check(x, down, up, spatial_weight)
    if takes_reference() or not use_triton(x, _unsupported(x)):
        return _composed(x, down, up, spatial_weight)
    if not is_recorded(x, down, up, spatial_weight):
        gated: Tensor = _cbam(x, down, up, spatial_weight, False)[0]
        return gated
    y: Tensor = differentiate(Cbam, x, down, up, spatial_weight)
    return y
