"""`pool_pixels` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels.cpu.pool_parts import has_nan, in_parts, max_pixels, sum_pixels
from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.numerics import acc_dtype

# Places are counted in float32, which holds every integer up to this one.
MAX_FLOAT_INTEGER = 2**24


def pool_pixels_cpu(x: Tensor, maximum: bool, index: bool) -> tuple[Tensor, Tensor]:
    """(mean and, with `maximum`, max (1 or 2, B, C); with `index` the pixel of the first maximum (B, C))."""
    inner = laid_out(x, is_channels_last(x)).to(acc_dtype(x.dtype))
    mean = sum_pixels(inner) / (x.shape[2] * x.shape[3])
    if not maximum:
        return mean[None].to(x.dtype), x.new_empty(0, dtype=torch.int32)
    top = max_pixels(inner)
    first = _first_pixels(inner, top) if index else x.new_empty(0, dtype=torch.int32)
    return torch.stack((mean, top)).to(x.dtype), first


def _first_pixels(x: Tensor, top: Tensor) -> Tensor:
    """Where each channel of x first is `top`, its maximum; (B, C) int32."""
    h, w = x.shape[2:]
    if h * w >= MAX_FLOAT_INTEGER or has_nan(top):
        return x.flatten(2).max(dim=2).indices.to(torch.int32)
    (first,) = in_parts(_first_pixels_of_part, None, x, top)
    return first


def _first_pixels_of_part(_: None, x: Tensor, top: Tensor) -> tuple[Tensor]:
    h, w = x.shape[2:]
    order = torch.arange(h * w, 0, -1, dtype=x.dtype).view(h, w)
    hit = torch.eq(x, top[:, :, None, None], out=torch.empty_like(x))
    return ((h * w - max_pixels(hit.mul_(order))).to(torch.int32),)


def pool_pixels_backward_cpu(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    """The gradient of x from those of the poolings and, where it was used, of the handed-on x (`passed`)."""
    acc = acc_dtype(grad.dtype)
    mean = (grad[0].to(acc) / (height * width))[:, :, None, None]
    d_x = empty_image((*grad.shape[1:], height, width), grad, channels_last, acc)
    if passed is None:
        d_x.copy_(mean)
    else:
        torch.add(laid_out(passed, channels_last), mean, out=d_x)
    if index is not None:
        top, at = grad[1].to(acc), index.to(torch.int64)
        if channels_last:
            d_x.permute(0, 2, 3, 1).flatten(1, 2).scatter_add_(1, at[:, None], top[:, None])
        else:
            d_x.flatten(2).scatter_add_(2, at[:, :, None], top[:, :, None])
    return d_x.to(grad.dtype)
