"""`apply_gates` on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels.cpu.pool_parts import in_parts, sigmoid, sum_pixels
from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.numerics import acc_dtype


def apply_gates_cpu(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    """The gated x, in its layout."""
    last, acc = is_channels_last(x), acc_dtype(x.dtype)
    y = empty_image(x.shape, x, last, acc)
    gates, spatial = sigmoid(channel_logits, acc)[:, :, None, None], sigmoid(spatial_logits, acc)
    in_parts(_gate_part, y, laid_out(x, last), gates, spatial)
    return y.to(x.dtype)


def _gate_part(y: Tensor, x: Tensor, gates: Tensor, spatial: Tensor) -> tuple[()]:
    torch.mul(x, gates, out=y).mul_(spatial)
    return ()


def apply_gates_backward_cpu(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of both logits."""
    last, acc = is_channels_last(x), acc_dtype(x.dtype)
    gates, spatial = sigmoid(channel_logits, acc)[:, :, None, None], sigmoid(spatial_logits, acc)
    d_x = empty_image(x.shape, x, last, acc)
    d_channel, d_spatial = in_parts(
        _backward_part, d_x, laid_out(x, last), laid_out(grad, last), gates, spatial
    )
    return (
        d_x.to(x.dtype),
        d_channel.to(channel_logits.dtype).contiguous(),
        d_spatial.to(spatial_logits.dtype).contiguous(),
    )


def _backward_part(
    d_x: Tensor, x: Tensor, grad: Tensor, gates: Tensor, spatial: Tensor
) -> tuple[Tensor, Tensor]:
    torch.mul(grad, gates, out=d_x).mul_(spatial)
    products = d_x * x
    per_channel, per_pixel = sum_pixels(products), products.sum(dim=1, keepdim=True)
    return (
        torch.addcmul(per_channel, per_channel, gates.flatten(1), value=-1),
        torch.addcmul(per_pixel, per_pixel, spatial, value=-1),
    )
