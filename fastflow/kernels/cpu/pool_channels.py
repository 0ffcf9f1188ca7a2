"""`pool_channels` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels.cpu.pool_parts import has_nan, in_parts, sigmoid, sum_pixels
from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.numerics import acc_dtype


def pool_channels_cpu(x: Tensor, channel_logits: Tensor, index: bool) -> tuple[Tensor, Tensor]:
    """(mean and max (B, 2, H, W), with `index` the channel of the first maximum (B, H, W))."""
    inner = laid_out(x, is_channels_last(x))
    gates = sigmoid(channel_logits, acc_dtype(x.dtype))[:, :, None, None]
    if index:
        pooled, first = in_parts(_pool_part_with_index, None, inner, gates)
    else:
        (pooled,), first = in_parts(_pool_part, None, inner, gates), x.new_empty(0, dtype=torch.int32)
    return pooled.to(x.dtype).contiguous(), first.contiguous()


def _pool_part(_: None, x: Tensor, gates: Tensor) -> tuple[Tensor]:
    gated = x * gates
    return (torch.stack((gated.sum(dim=1).div_(x.shape[1]), gated.amax(dim=1)), dim=1),)


def _pool_part_with_index(_: None, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    gated = x * gates
    mean, top = gated.sum(dim=1).div_(x.shape[1]), gated.amax(dim=1)
    return torch.stack((mean, top), dim=1), _first_channels(gated, top)


def _first_channels(x: Tensor, top: Tensor) -> Tensor:
    """Where each pixel of x first is `top`, its maximum over channels; (B, H, W) int32. Overwrites x."""
    if has_nan(top):
        return x.max(dim=1).indices.to(torch.int32)
    channels = x.shape[1]
    order = torch.arange(channels, 0, -1, dtype=x.dtype)[:, None, None]
    return (channels - x.eq_(top[:, None]).mul_(order).amax(dim=1)).to(torch.int32)


def pool_channels_backward_cpu(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the logits; `passed` is that of the handed-on x, where it was used."""
    last, acc = is_channels_last(x), acc_dtype(x.dtype)
    d_x = empty_image(x.shape, x, last, acc)
    passed = None if passed is None else laid_out(passed, last)
    gates = sigmoid(channel_logits, acc)[:, :, None, None]
    (products,) = in_parts(_backward_part, d_x, laid_out(x, last), gates, grad.to(acc), index, passed)
    d_logits = torch.ops.aten.sigmoid_backward(products, gates.flatten(1))
    return d_x.to(x.dtype), d_logits.to(channel_logits.dtype).contiguous()


def _backward_part(
    d_x: Tensor, x: Tensor, gates: Tensor, grad: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor]:
    number = torch.arange(x.shape[1], dtype=d_x.dtype)[:, None, None]
    hit = torch.eq(number, index[:, None].to(d_x.dtype), out=torch.empty_like(d_x))
    share = torch.addcmul(grad[:, :1] / x.shape[1], hit, grad[:, 1:], out=hit)
    if passed is None:
        torch.mul(share, gates, out=d_x)
    else:
        torch.addcmul(passed.to(d_x.dtype), share, gates, out=d_x)
    return (sum_pixels(share.mul_(x)),)
