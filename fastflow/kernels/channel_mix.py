r"""One affine map of the channels at every pixel: ActNorm and the invertible 1x1 convolution, and a squeeze.

.. math:: y_{:,p} = A x_{:,p} + c, \qquad dx = A^\top dy, \quad dA = \sum_{b,p} dy\,x^\top,
          \quad dc = \sum_{b,p} dy

`x` (B, C, H, W), `weight` A (C', C'), `bias` c (C',) with C' = 4C when the squeeze is fused in, else C. The
log-determinant, H*W*log|det A|, belongs to the caller, who knows A's factors. Products are summed in float32
or wider, channel by channel.

Both directions are one map with different ends, ``out = A (in - before) + after``: the bias is added after
the product in `channel_mix` and subtracted before it in `channel_unmix`, and the squeeze is an index map of
the input or of the output.

The kernels read pixels one channel at a time and hold C' accumulators per pixel in registers, which fits up
to C' = `MAX_CHANNELS` = 64; above it the ops fall back to a batched matrix product. Images are contiguous or
channels_last, with any batch stride. Source: Glow (Kingma & Dhariwal, 2018), sections 3.1-3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import check_device, check_dtype, check_image, check_mask
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import refuse_second_derivative, register, takes_reference
from fastflow.kernels.squeeze import squeeze2x2_reference, unsqueeze2x2_reference
from fastflow.kernels.triton.channel_mix import (
    MAX_CHANNELS,
    launch_channel_mix,
    launch_channel_mix_backward,
    output_shape,
)
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype, full_precision

# -- definition ----------------------------------------------------------------------------------------------


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ x + bias at every pixel, in the dtype of x."""
    if x.shape[1] == 1:
        # The library's convolution over one channel takes tens of times longer than this multiply-add.
        return x * weight.reshape(1) if bias is None else torch.addcmul(bias, x, weight.reshape(1))
    with full_precision(x):
        y = torch.matmul(weight, x.flatten(2))
        return (y if bias is None else y + bias[:, None]).unflatten(2, x.shape[2:])


def channel_mix_reference(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool) -> Tensor:
    """The definition, in plain ATen."""
    acc = acc_dtype(x.dtype)
    inner = squeeze2x2_reference(x) if squeeze else x
    return _product(weight.to(acc), inner.to(acc), bias.to(acc)).to(x.dtype)


def channel_unmix_reference(y: Tensor, inverse_weight: Tensor, bias: Tensor, squeeze: bool) -> Tensor:
    """The definition of the inverse, in plain ATen.

    The bias is subtracted first, as it was added last, so that the large terms cancel exactly.
    """
    acc = acc_dtype(y.dtype)
    x = _product(inverse_weight.to(acc), y.to(acc) - bias.to(acc)[:, None, None], None).to(y.dtype)
    return unsqueeze2x2_reference(x) if squeeze else x


def channel_mix_backward_reference(
    grad: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias in both directions, in plain ATen; x is the input of the direction."""
    acc = acc_dtype(x.dtype)
    g = grad.to(acc)
    if mask is not None:
        g = g + grad_masked.to(acc).masked_fill(~mask, 0.0)
    if inverse and squeeze:
        g = squeeze2x2_reference(g)
    inner = x.to(acc)
    if squeeze and not inverse:
        inner = squeeze2x2_reference(inner)
    if inverse:
        inner = inner - bias.to(acc)[:, None, None]
    d_inner = _product(weight.to(acc).t(), g, None)
    with full_precision(g):
        d_weight = torch.matmul(g.flatten(2), inner.flatten(2).mT).sum(dim=0)
    d_bias = -d_inner.sum(dim=(0, 2, 3)) if inverse else g.sum(dim=(0, 2, 3))
    d_x = unsqueeze2x2_reference(d_inner) if squeeze and not inverse else d_inner
    return d_x.to(x.dtype), d_weight, d_bias


# -- op and autograd -----------------------------------------------------------------------------------------


def _mix_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    layout = memory_format(is_channels_last(x))
    definition = channel_unmix_reference if inverse else channel_mix_reference
    y = definition(x, weight, bias, squeeze).contiguous(memory_format=layout)
    if mask is None:
        return y, x.new_empty(0)
    return y, y.masked_fill(~mask, 0.0).to(dtype or x.dtype).contiguous(memory_format=layout)


def _mix_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    shape, channels_last = output_shape(x.shape, squeeze, inverse), is_channels_last(x)
    masked = x.new_empty(0) if mask is None else empty_image(shape, x, channels_last, dtype)
    return empty_image(shape, x, channels_last), masked


def _mix_unsupported(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
    dtype: torch.dtype | None,
) -> str:
    return _too_many_channels(weight)


def _mix_backward_cpu(
    grad: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    d_x, d_weight, d_bias = channel_mix_backward_reference(
        grad, grad_masked, x, weight, bias, mask, squeeze, inverse
    )
    layout = memory_format(is_channels_last(x))
    return d_x.contiguous(memory_format=layout), d_weight.contiguous(), d_bias


def _mix_backward_fake(
    grad: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(x.dtype)
    d_x = empty_image(output_shape(grad.shape, squeeze, not inverse), x, is_channels_last(x))
    return d_x, x.new_empty(weight.shape, dtype=acc), x.new_empty(bias.shape, dtype=acc)


def _mix_backward_unsupported(
    grad: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
) -> str:
    return _too_many_channels(weight)


def _too_many_channels(weight: Tensor) -> str:
    channels = weight.shape[0]
    if channels <= MAX_CHANNELS:
        return ""
    return f"{channels} channels, more than the {MAX_CHANNELS} that the kernel holds"


_forward = register(
    "channel_mix",
    definition=channel_mix_reference,
    cpu=_mix_cpu,
    triton=launch_channel_mix,
    fake=_mix_fake,
    functions=("channel_mix", "channel_mix_masked", "channel_unmix"),
    unsupported=_mix_unsupported,
    limit=f"above {MAX_CHANNELS} channels a batched matrix product",
)
_backward = register(
    "channel_mix_backward",
    definition=channel_mix_backward_reference,
    cpu=_mix_backward_cpu,
    triton=launch_channel_mix_backward,
    fake=_mix_backward_fake,
    unsupported=_mix_backward_unsupported,
)


class ChannelMix(torch.autograd.Function):
    """The op under autograd, in both directions; a second derivative is an error."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        squeeze: bool,
        inverse: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        y, masked = _forward(x, weight, bias, mask, squeeze, inverse, dtype)
        ctx.save_for_backward(x, weight, bias, mask)
        ctx.squeeze, ctx.inverse = squeeze, inverse
        return y, masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_masked: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("channel_mix")
        x, weight, bias, mask = ctx.saved_tensors
        d_x, d_weight, d_bias = _backward(grad, grad_masked, x, weight, bias, mask, ctx.squeeze, ctx.inverse)
        return d_x, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, channels: int) -> None:
    if tuple(weight.shape) != (channels, channels):
        raise ValueError(
            f"weight must be ({channels}, {channels}) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be ({channels},) for x {tuple(x.shape)}, got {tuple(bias.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        check_dtype(name, value)
        check_device(name, value, x)


def _check_mix(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool) -> None:
    check_image("x", x)
    if squeeze and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"x must have even height and width to be squeezed, got {tuple(x.shape)}")
    _check(x, weight, bias, x.shape[1] * (4 if squeeze else 1))


@planned
def channel_mix(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool = False) -> Tensor:
    """Apply `weight @ pixel + bias` at every pixel.

    Args:
        x: (B, C, H, W).
        weight: (C', C').
        bias: (C',).
        squeeze: squeeze `x` first (C' = 4C), else C' = C.

    Returns:
        (B, C', H', W').

    Raises:
        ValueError: a shape, dtype or device does not fit, an image to be squeezed has odd sides, or C' is
            above `MAX_CHANNELS` while the backend is ``"triton"``, which has no fall-back.

    Example:
        >>> channel_mix(torch.ones(1, 1, 1, 1), torch.tensor([[2.0]]), torch.tensor([1.0])).item()
        3.0
    """
    _check_mix(x, weight, bias, squeeze)
    if takes_reference():
        return channel_mix_reference(x, weight, bias, squeeze)
    y, _ = differentiate(ChannelMix, x, weight, bias, None, squeeze, False, None)
    return y


@planned
def channel_mix_masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor,
    squeeze: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`channel_mix` and the input of the conditioner that reads its result, in one pass over memory.

    Args:
        x: (B, C, H, W).
        weight: (C', C').
        bias: (C',).
        mask: (C', H', W') or (1, H', W'), bool; the conditioner sees the result where it is True, and 0
            elsewhere.
        squeeze: squeeze `x` first (C' = 4C), else C' = C.
        dtype: of the conditioner's input; that of x when None.

    Returns:
        `(y, masked)`, both (B, C', H', W').

    Raises:
        ValueError: as `channel_mix`, or the mask does not fit.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> weight, bias = torch.tensor([[2.0]]), torch.tensor([1.0])
        >>> y, masked = channel_mix_masked(torch.ones(1, 1, 1, 2), weight, bias, mask)
        >>> y.flatten().tolist(), masked.flatten().tolist()
        ([3.0, 3.0], [3.0, 0.0])
    """
    _check_mix(x, weight, bias, squeeze)
    check_mask(mask, x, shape=output_shape(x.shape, squeeze, False))
    if takes_reference():
        y = channel_mix_reference(x, weight, bias, squeeze)
        return y, y.masked_fill(~mask, 0.0).to(dtype or x.dtype)
    y, masked = differentiate(ChannelMix, x, weight, bias, mask, squeeze, False, dtype or x.dtype)
    return y, masked


@planned
def channel_unmix(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze: bool = False,
    inverse_weight: Tensor | None = None,
) -> Tensor:
    """Invert `channel_mix`: ``weight^-1 @ (pixel - bias)`` at every pixel, then unsqueeze when `squeeze`.

    Args:
        y: (B, C', H', W'), an output of `channel_mix`.
        weight: (C', C'), the weight given to `channel_mix`.
        bias: (C',), the same bias.
        squeeze: whether `channel_mix` squeezed.
        inverse_weight: (C', C'), the weight's inverse where the caller has it (from its LU factors, say);
            gradients then go to it instead of `weight`. None computes it in float64.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, or C' is above `MAX_CHANNELS` while the backend is
            ``"triton"``.

    Example:
        >>> channel_unmix(torch.full((1, 1, 1, 1), 3.0), torch.tensor([[2.0]]), torch.tensor([1.0])).item()
        1.0
    """
    check_image("y", y)
    if squeeze and y.shape[1] % 4:
        raise ValueError(f"y must have a multiple of 4 channels to be unsqueezed, got {tuple(y.shape)}")
    _check(y, weight, bias, y.shape[1])
    if inverse_weight is None:
        inverse_weight = torch.linalg.inv(weight.double())
    elif inverse_weight.shape != weight.shape:
        raise ValueError(
            f"inverse_weight must be {tuple(weight.shape)} like weight, got {tuple(inverse_weight.shape)}"
        )
    if takes_reference():
        return channel_unmix_reference(y, inverse_weight, bias, squeeze)
    x, _ = differentiate(ChannelMix, y, inverse_weight, bias, None, squeeze, True, None)
    return x
