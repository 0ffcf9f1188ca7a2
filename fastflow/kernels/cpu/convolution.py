"""Convolutions on CPUs: the code that is fastest for a shape, and rounds one image as it rounds many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.cpu.execution import eager_on_cpu
from fastflow.kernels.registry import get_backend

Pair = tuple[int, int]

# Up to so many channels, ATen's native code computes the gradient of a convolution's input several times
# faster than oneDNN.
MAX_NATIVE_CHANNELS = 4
# With one thread ATen computes fewer float32 images than these, of up to so many elements together, with code
# that rounds differently from oneDNN, which it takes for more images; a single image has yet another code.
MIN_ONEDNN_IMAGES, MAX_NATIVE_ELEMENTS = 16, 20480
# A convolution computes at least this many output channels on a CPU; fewer are cheaper as one product for all
# taps.
MAX_PRODUCT_OUTPUTS = 4


class FewChannelsConvolution(torch.autograd.Function):
    """A 2-d convolution of few input channels on a CPU, each gradient by the faster code."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Pair, padding: Pair
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.has_bias = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        geometry = ctx.stride, ctx.padding
        d_x, _, _ = torch.ops.aten._slow_conv2d_backward.output_mask(
            grad, x, weight, weight.shape[2:], *geometry, [True, False, False]
        )
        bias_sizes = [weight.shape[0]] if ctx.has_bias else None
        _, d_weight, d_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, bias_sizes, *geometry, (1, 1), False, (0, 0), 1, [False, True, ctx.has_bias]
        )
        return d_x, d_weight, d_bias, None, None


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, dilation)``, alike for one image and for many on a CPU.

    Only eager float32 on a CPU takes other code than ATen's own choice.
    """

    def plain() -> Tensor:
        return F.conv2d(x, weight, bias, stride, padding, dilation)

    if not eager_on_cpu(x) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return plain()
    if len(x) < MIN_ONEDNN_IMAGES and x.numel() <= MAX_NATIVE_ELEMENTS and weight.shape[2] <= 3:
        if not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
            return torch.ops.aten.mkldnn_convolution(x, weight, bias, padding, stride, dilation, 1)
        if len(x) == 1:
            return F.conv2d(x.expand(2, -1, -1, -1), weight, bias, stride, padding, dilation)[:1]
    if weight.shape[1] > MAX_NATIVE_CHANNELS or dilation != (1, 1):
        return plain()
    if weight.shape[0] == 1:
        # A weight in channels_last asks for oneDNN's code of that layout, whose backward is four times faster
        # here.
        return F.conv2d(x, weight.contiguous(memory_format=torch.channels_last), bias, stride, padding)
    if get_backend() == "reference":
        return plain()
    if weight.shape[1] == 1 and not torch.is_grad_enabled():
        # oneDNN's code for one channel is several times faster with channels last, the copy back included.
        channels_last = weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, channels_last, bias, stride, padding).contiguous()
    if not (torch.is_grad_enabled() and x.requires_grad):
        return plain()
    out: Tensor = FewChannelsConvolution.apply(x, weight, bias, stride, padding)
    return out


def convolve_to_few(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 1x1 convolution, or a 3x3 one to few channels, padded to keep the size.

    On a CPU it is one product for all taps of the kernel, then a sum of their shifted results.
    """
    outputs, size = weight.shape[0], weight.shape[2]
    if not eager_on_cpu(x) or (size > 1 and outputs > MAX_PRODUCT_OUTPUTS) or x.shape[0] == 0:
        return convolve(x, weight, bias, padding=(size // 2, size // 2))
    matrix = weight.permute(2, 3, 0, 1).flatten(0, 2)
    # Every sample has a product of its own: threads split one of a batch and a single one differently.
    taps = torch.stack([torch.mm(matrix, image) for image in x.flatten(2)])
    taps = taps.unflatten(2, x.shape[2:]).unflatten(1, (-1, outputs))
    out = bias[:, None, None]
    for i, tap in enumerate(taps.unbind(1)):
        down, right = size // 2 - i // size, size // 2 - i % size
        out = out + F.pad(tap, (right, -right, down, -down))
    return out
