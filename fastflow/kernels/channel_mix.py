r"""One affine map of the channels at every pixel: ActNorm and the invertible 1x1 convolution in one, with the squeeze before it.

.. math:: y_{:,p} = A x_{:,p} + c, \qquad dx = A^\top dy, \quad dA = \sum_{b,p} dy\,x^\top, \quad dc = \sum_{b,p} dy

`x` (B, C, H, W), `weight` A (C', C'), `bias` c (C',) with C' = 4C when the squeeze is fused in, else C. The log-determinant,
H*W*log|det A|, belongs to the caller, who knows A's factors. Products are summed in float32 or wider, channel by channel.

Both directions are one map with different ends, ``out = A (in - before) + after``: the bias comes after the product in
`channel_mix` and is taken off before it in `channel_unmix`, and the squeeze is an index map of the input or of the output.

The kernels stream pixels past A and hold C' accumulators per pixel in registers, which fits up to C' = `MAX_CHANNELS` = 64; above
it the ops fall back to a batched matrix product. Contiguous or channels_last, any batch stride. Source: Glow (Kingma & Dhariwal,
2018), sections 3.1-3.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels._launch import cdiv, elements, is_wide, kernel, launch, locate, power_of_two, triton_dtype, vector_width
from fastflow.kernels._library import (
    accumulator,
    check_device,
    check_dtype,
    check_image,
    check_mask,
    empty_image,
    full_precision,
    is_channels_last,
    laid_out,
    mask_bytes,
    memory_format,
    refuse_second_derivative,
    register,
    takes_reference,
    use_triton,
)
from fastflow.kernels.squeeze import squeeze2x2_reference, unsqueeze2x2_reference

if TYPE_CHECKING:
    import triton.language as tl

MAX_CHANNELS = 64


# -- definition -----------------------------------------------------------------------------------------------------------


def _product(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """weight @ x + bias at every pixel, in the dtype of x."""
    if x.shape[1] == 1:
        # A convolution over one channel is a multiply-add; the library's convolution takes tens of times longer for it.
        return x * weight.reshape(1) if bias is None else torch.addcmul(bias, x, weight.reshape(1))
    with full_precision(x):
        y = torch.matmul(weight, x.flatten(2))
        return (y if bias is None else y + bias[:, None]).unflatten(2, x.shape[2:])


def channel_mix_reference(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool) -> Tensor:
    """The definition, in plain ATen."""
    wide = accumulator(x.dtype)
    inner = squeeze2x2_reference(x) if squeeze else x
    return _product(weight.to(wide), inner.to(wide), bias.to(wide)).to(x.dtype)


def channel_unmix_reference(y: Tensor, inverse_weight: Tensor, bias: Tensor, squeeze: bool) -> Tensor:
    """The definition, in plain ATen. The bias is taken off first, as it was added last: the large terms cancel exactly."""
    wide = accumulator(y.dtype)
    x = _product(inverse_weight.to(wide), y.to(wide) - bias.to(wide)[:, None, None], None).to(y.dtype)
    return unsqueeze2x2_reference(x) if squeeze else x


def channel_mix_backward_reference(
    grad: Tensor, grad_masked: Tensor, saved: Tensor, weight: Tensor, rebuild: Tensor, bias: Tensor,
    mask: Tensor | None, squeeze: bool, undo: bool, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of input, weight and bias, in plain ATen. `saved` is the input or, with `recompute`, the output.

    `rebuild` is the inverse of `weight`, used with `recompute` only.
    """
    wide = accumulator(saved.dtype)
    g = grad.to(wide)
    if mask is not None:
        g = g + grad_masked.to(wide).masked_fill(~mask, 0.0)
    weight, c = weight.to(wide), bias.to(wide)[:, None, None]
    if undo and squeeze:
        g = squeeze2x2_reference(g)
    inner = saved.to(wide)
    if squeeze and undo == recompute:
        inner = squeeze2x2_reference(inner)
    if recompute:
        inner = _product(rebuild.to(wide), inner if undo else inner - c, None)
    elif undo:
        inner = inner - c
    d_inner = _product(weight.t(), g, None)
    with full_precision(g):
        d_weight = torch.matmul(g.flatten(2), inner.flatten(2).mT).sum(dim=0)
    d_bias = -d_inner.sum(dim=(0, 2, 3)) if undo else g.sum(dim=(0, 2, 3))
    d_input = unsqueeze2x2_reference(d_inner) if squeeze and not undo else d_inner
    return d_input.to(saved.dtype), d_weight, d_bias


# -- kernels --------------------------------------------------------------------------------------------------------------
# One program takes one chunk of one sample's pixels. `pixels_v` counts the mixed (squeezed) image's pixels in units of V.


@kernel
def _place(
    i, p, pixels, width, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, SQUEEZED: tl.constexpr,
):  # fmt: skip
    """Where channel i of pixel p of the mixed image lies within its sample, in a tensor that may be its unsqueezed form."""
    if SQUEEZED:
        row = 2 * (p // width) + (i // 2) % 2
        col = 2 * (p % width) + i % 2
        large = row * (2 * width) + col
        if CHANNELS_LAST:
            return large * (CHANNELS // 4) + i // 4
        else:
            return (i // 4) * (4 * pixels) + large
    else:
        if CHANNELS_LAST:
            return p * CHANNELS + i
        else:
            return i * pixels + p


@kernel
def _mix_fwd_kernel(
    x_ptr, weight_ptr, before_ptr, after_ptr, mask_ptr, y_ptr, masked_ptr, x_stride_v, pixels_v, width, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, IN_SQUEEZED: tl.constexpr, OUT_SQUEEZED: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, NEXT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = p < pixels
    o = tl.arange(0, ROWS)
    real = o < CHANNELS
    x_ptr += b * x_stride_v * V
    acc = tl.zeros((ROWS, BLOCK), ACC)
    for i in tl.range(0, CHANNELS, loop_unroll_factor=UNROLL):
        x = tl.load(x_ptr + _place(i, p, pixels, width, CHANNELS, CHANNELS_LAST, IN_SQUEEZED), mask=inside, other=0.0).to(ACC)
        if BEFORE:
            x -= tl.load(before_ptr + i)
        acc += tl.load(weight_ptr + o * CHANNELS + i, mask=real, other=0.0)[:, None] * x[None, :]
    if AFTER:
        acc += tl.load(after_ptr + o, mask=real, other=0.0)[:, None]
    keep = real[:, None] & inside[None, :]
    place = _place(o[:, None], p[None, :], pixels, width, CHANNELS, CHANNELS_LAST, OUT_SQUEEZED)
    base = b * (pixels * CHANNELS)
    tl.store(y_ptr + base + place, acc.to(y_ptr.dtype.element_ty), mask=keep)
    if NEXT:
        passive = tl.load(
            mask_ptr + _place(o[:, None], p[None, :], pixels, width, CHANNELS, False, OUT_SQUEEZED), mask=keep, other=0
        )
        tl.store(masked_ptr + base + place, tl.where(passive != 0, acc, 0.0).to(masked_ptr.dtype.element_ty), mask=keep)


@kernel
def _mix_bwd_kernel(
    grad_ptr, masked_ptr, saved_ptr, weight_ptr, rebuild_ptr, before_ptr, after_ptr, mask_ptr, dx_ptr, d_weight_ptr, d_bias_ptr,
    grad_stride_v, masked_stride_v, saved_stride_v, pixels_v, width, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, IN_SQUEEZED: tl.constexpr, OUT_SQUEEZED: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, NEXT: tl.constexpr, RECOMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    grad_ptr += b * grad_stride_v * V
    if NEXT:
        masked_ptr += b * masked_stride_v * V
    saved_ptr += b * saved_stride_v * V
    dx_ptr += b * (pixels * CHANNELS)
    i = tl.arange(0, ROWS)
    real = i < CHANNELS
    d_weight = tl.zeros((ROWS, ROWS), ACC)
    d_bias = tl.zeros((ROWS,), ACC)
    for tile in range(TILES):
        p = (chunk * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        keep = real[:, None] & inside[None, :]
        place = _place(i[:, None], p[None, :], pixels, width, CHANNELS, CHANNELS_LAST, IN_SQUEEZED)
        if RECOMPUTE:
            x = tl.zeros((ROWS, BLOCK), ACC)
            for o in tl.range(0, CHANNELS, loop_unroll_factor=UNROLL):
                where = _place(o, p, pixels, width, CHANNELS, CHANNELS_LAST, OUT_SQUEEZED)
                out = tl.load(saved_ptr + where, mask=inside, other=0.0).to(ACC)
                if AFTER:
                    out -= tl.load(after_ptr + o)
                x += tl.load(rebuild_ptr + i * CHANNELS + o, mask=real, other=0.0)[:, None] * out[None, :]
        else:
            x = tl.load(saved_ptr + place, mask=keep, other=0.0).to(ACC)
            if BEFORE:
                x -= tl.load(before_ptr + i, mask=real, other=0.0)[:, None]
        # One row of the output's gradient at a time, for the input's gradient and for its row of the weight's. Outside, it is 0
        # and x whatever the biases leave of its 0: the products vanish.
        dx = tl.zeros((ROWS, BLOCK), ACC)
        for o in tl.range(0, CHANNELS, loop_unroll_factor=UNROLL):
            where = _place(o, p, pixels, width, CHANNELS, CHANNELS_LAST, OUT_SQUEEZED)
            g = tl.load(grad_ptr + where, mask=inside, other=0.0).to(ACC)
            if NEXT:
                mask_place = _place(o, p, pixels, width, CHANNELS, False, OUT_SQUEEZED)
                passive = tl.load(mask_ptr + mask_place, mask=inside, other=0) != 0
                g += tl.where(passive, tl.load(masked_ptr + where, mask=inside, other=0.0).to(ACC), 0.0)
            dx += tl.load(weight_ptr + o * CHANNELS + i, mask=real, other=0.0)[:, None] * g[None, :]
            row = tl.sum(x * g[None, :], axis=1)
            d_weight += tl.where(i[:, None] == o, row[None, :], 0.0)
            d_bias += tl.where(i == o, tl.sum(g, axis=0), 0.0)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=keep)
    part = b * n_chunks + chunk
    square = i[:, None] * CHANNELS + i[None, :]
    tl.store(d_weight_ptr + part * (CHANNELS * CHANNELS) + square, d_weight, mask=real[:, None] & real[None, :])
    tl.store(d_bias_ptr + part * CHANNELS + i, d_bias, mask=real)


# -- launchers ------------------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    rows: int
    block: int
    warps: int
    unroll: int


def _forward_tile(channels: int, acc: torch.dtype) -> _Tile:
    """At most 32 accumulators a thread; fewer in float64."""
    rows = power_of_two(channels)
    block, warps = {1: (1024, 4), 2: (1024, 4), 4: (512, 4), 8: (256, 4), 16: (256, 4), 32: (64, 4), 64: (64, 8)}[rows]
    return _Tile(rows, block // 2 if acc == torch.float64 else block, warps, 4 if rows <= 4 else 2 if rows <= 8 else 1)


def _backward_tile(channels: int, acc: torch.dtype) -> _Tile:
    """16 values a thread of each of three tiles (x, dx and their product); fewer in float64."""
    rows = power_of_two(channels)
    block, warps = {1: (1024, 4), 2: (1024, 4), 4: (512, 4), 8: (256, 4), 16: (128, 4), 32: (64, 4), 64: (32, 8)}[rows]
    return _Tile(rows, block // 2 if acc == torch.float64 else block, warps, 4 if rows <= 2 else 2 if rows <= 16 else 1)


# Pixels per program of the backward kernel: its partial sums of the weight's gradient are C' / (1.5 SPAN) of what it moves.
SPAN = 1024


class _Layout(NamedTuple):
    """A mixed image's pixels, width and channels."""

    channels: int
    pixels: int
    width: int


def _mixed_layout(shape: torch.Size, squeeze: bool, undo: bool) -> _Layout:
    _, c, h, w = shape
    if squeeze and not undo:
        return _Layout(4 * c, h * w // 4, w // 2)
    return _Layout(c, h * w, w)


def _output_shape(shape: torch.Size, squeeze: bool, undo: bool) -> tuple[int, int, int, int]:
    batch, c, h, w = shape
    if not squeeze:
        return batch, c, h, w
    return (batch, c // 4, 2 * h, 2 * w) if undo else (batch, 4 * c, h // 2, w // 2)


def _too_wide(channels: int) -> str:
    return f"{channels} channels, more than the {MAX_CHANNELS} that the kernel holds" if channels > MAX_CHANNELS else ""


def _mix_launch(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, squeeze: bool, undo: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    shape, (channels, pixels, width) = _output_shape(x.shape, squeeze, undo), _mixed_layout(x.shape, squeeze, undo)
    if not use_triton(x, _too_wide(channels)):
        return _mix_on_cpu(x, weight, bias, mask, squeeze, undo, dtype)
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    x = laid_out(x, channels_last)
    y = empty_image(shape, x, channels_last)
    masked = x.new_empty(0) if mask is None else empty_image(shape, x, channels_last, dtype)
    if x.numel() == 0:
        return y, masked
    rows, block, warps, unroll = _forward_tile(channels, acc)
    chunks, v = cdiv(pixels, block), vector_width(pixels, x.stride(0))
    weight, bias = weight.to(acc).contiguous(), bias.to(acc).contiguous()
    launch(
        _mix_fwd_kernel, shape[0] * chunks, x, warps,
        x, weight, bias if undo else None, None if undo else bias, mask_bytes(mask, shape), y, None if mask is None else masked,
        x.stride(0) // v, pixels // v, width, chunks,
        V=v, CHANNELS=channels, ROWS=rows, UNROLL=min(unroll, channels), BLOCK=block, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, IN_SQUEEZED=squeeze and not undo, OUT_SQUEEZED=squeeze and undo,
        BEFORE=undo, AFTER=not undo, NEXT=mask is not None,
        WIDE=is_wide(channels * pixels, channels * block),
    )  # fmt: skip
    return y, masked


def _mix_backward_launch(
    grad: Tensor, grad_masked: Tensor, saved: Tensor, weight: Tensor, rebuild: Tensor, bias: Tensor,
    mask: Tensor | None, squeeze: bool, undo: bool, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    channels, acc = weight.shape[0], accumulator(saved.dtype)
    if not use_triton(grad, _too_wide(channels)):
        return _mix_backward_on_cpu(grad, grad_masked, saved, weight, rebuild, bias, mask, squeeze, undo, recompute)
    channels_last = is_channels_last(saved)
    shape = _output_shape(grad.shape, squeeze, not undo)
    _, pixels, width = _mixed_layout(torch.Size(shape), squeeze, undo)
    dx = empty_image(shape, saved, channels_last)
    if saved.numel() == 0:
        return dx, saved.new_zeros(channels, channels, dtype=acc), saved.new_zeros(channels, dtype=acc)
    grad, saved = laid_out(grad, channels_last), laid_out(saved, channels_last)
    strides = [grad.stride(0), grad.stride(0), saved.stride(0)]
    if mask is not None:
        grad_masked = laid_out(grad_masked, channels_last)
        strides[1] = grad_masked.stride(0)
    rows, block, warps, unroll = _backward_tile(channels, acc)
    tiles = min(SPAN // block, power_of_two(cdiv(pixels, block)))
    chunks, v = cdiv(pixels, block * tiles), vector_width(pixels, *strides)
    parts = shape[0] * chunks
    d_weight = saved.new_empty(parts, channels, channels, dtype=acc)
    d_bias = saved.new_empty(parts, channels, dtype=acc)
    weight, rebuild, bias = (value.to(acc).contiguous() for value in (weight, rebuild, bias))
    launch(
        _mix_bwd_kernel, parts, grad, warps,
        grad, None if mask is None else grad_masked, saved, weight, rebuild if recompute else None, bias if undo else None,
        None if undo else bias, mask_bytes(mask, tuple(grad.shape)), dx, d_weight, d_bias,
        *(stride // v for stride in strides), pixels // v, width, chunks,
        V=v, CHANNELS=channels, ROWS=rows, UNROLL=min(unroll, channels), BLOCK=block, TILES=tiles,
        ACC=triton_dtype(acc), CHANNELS_LAST=channels_last, IN_SQUEEZED=squeeze and not undo, OUT_SQUEEZED=squeeze and undo,
        BEFORE=undo, AFTER=not undo, NEXT=mask is not None,
        RECOMPUTE=recompute, WIDE=is_wide(channels * pixels, channels * block * tiles),
    )  # fmt: skip
    total = d_bias.sum(dim=0)
    # Summed over all pixels, the input's gradient is A^T times the output's.
    return dx, d_weight.sum(dim=0), -(weight * total[:, None]).sum(dim=0) if undo else total


# -- op and autograd ------------------------------------------------------------------------------------------------------


def _mix_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, squeeze: bool, undo: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    layout = memory_format(is_channels_last(x))
    y = (channel_unmix_reference if undo else channel_mix_reference)(x, weight, bias, squeeze).contiguous(memory_format=layout)
    if mask is None:
        return y, x.new_empty(0)
    return y, y.masked_fill(~mask, 0.0).to(dtype or x.dtype).contiguous(memory_format=layout)


def _mix_fake(
    x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor | None, squeeze: bool, undo: bool, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    shape, channels_last = _output_shape(x.shape, squeeze, undo), is_channels_last(x)
    masked = x.new_empty(0) if mask is None else empty_image(shape, x, channels_last, dtype)
    return empty_image(shape, x, channels_last), masked


def _mix_backward_fake(
    grad: Tensor, grad_masked: Tensor, saved: Tensor, weight: Tensor, rebuild: Tensor, bias: Tensor,
    mask: Tensor | None, squeeze: bool, undo: bool, recompute: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accumulator(saved.dtype)
    shape = _output_shape(grad.shape, squeeze, not undo)
    return (
        empty_image(shape, saved, is_channels_last(saved)),
        saved.new_empty(weight.shape, dtype=acc),
        saved.new_empty(bias.shape, dtype=acc),
    )


def _mix_backward_on_cpu(
    grad: Tensor, grad_masked: Tensor, saved: Tensor, *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, d_weight, d_bias = channel_mix_backward_reference(grad, grad_masked, saved, *rest)
    return dx.contiguous(memory_format=memory_format(is_channels_last(saved))), d_weight.contiguous(), d_bias


_forward = register(
    "channel_mix(Tensor x, Tensor weight, Tensor bias, Tensor? mask, bool squeeze, bool undo, ScalarType? dtype) "
    "-> (Tensor, Tensor)",
    reference=_mix_on_cpu,
    triton=_mix_launch,
    fake=_mix_fake,
)
_backward = register(
    "channel_mix_backward(Tensor grad, Tensor grad_masked, Tensor saved, Tensor weight, Tensor rebuild, Tensor bias, "
    "Tensor? mask, bool squeeze, bool undo, bool recompute) -> (Tensor, Tensor, Tensor)",
    reference=_mix_backward_on_cpu,
    triton=_mix_backward_launch,
    fake=_mix_backward_fake,
)


class ChannelMix(torch.autograd.Function):
    """The op under autograd, in both directions. With `rebuild`, the inverse of `weight`, it saves its output instead of x.

    A second derivative is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mask: Tensor | None,
        rebuild: Tensor | None,
        squeeze: bool,
        undo: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        y, masked = _forward(x, weight, bias, mask, squeeze, undo, dtype)
        ctx.save_for_backward(x if rebuild is None else y, weight, weight if rebuild is None else rebuild, bias, mask)
        ctx.flags = squeeze, undo, rebuild is not None
        return y, masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_masked: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("channel_mix")
        _, weight, _, bias, _ = ctx.saved_tensors
        dx, d_weight, d_bias = _backward(grad, grad_masked, *ctx.saved_tensors, *ctx.flags)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None, None, None, None, None


def _check(x: Tensor, weight: Tensor, bias: Tensor, channels: int) -> None:
    if tuple(weight.shape) != (channels, channels):
        raise ValueError(f"weight must be ({channels}, {channels}) for x {tuple(x.shape)}, got {tuple(weight.shape)}")
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


def channel_mix(x: Tensor, weight: Tensor, bias: Tensor, squeeze: bool = False, *, recompute: bool = False) -> Tensor:
    """Apply `weight @ pixel + bias` at every pixel.

    Args:
        x: (B, C, H, W).
        weight: (C', C').
        bias: (C',).
        squeeze: squeeze `x` first (C' = 4C), else C' = C.
        recompute: keep the result for the backward pass instead of `x`, and rebuild `x` by the weight's inverse.

    Returns:
        (B, C', H', W').

    Raises:
        ValueError: a shape, dtype or device does not fit, an odd image is to be squeezed, or C' is above `MAX_CHANNELS` while
            the backend is ``"triton"``, which has no fall-back.

    Example:
        >>> channel_mix(torch.ones(1, 1, 1, 1), torch.tensor([[2.0]]), torch.tensor([1.0])).item()
        3.0
    """
    _check_mix(x, weight, bias, squeeze)
    if takes_reference():
        return channel_mix_reference(x, weight, bias, squeeze)
    y, _ = ChannelMix.apply(x, weight, bias, None, _inverse(weight) if recompute else None, squeeze, False, None)
    return y


def channel_mix_masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor,
    squeeze: bool = False,
    *,
    dtype: torch.dtype | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """`channel_mix` and the input of the conditioner that reads its result, in one pass over memory.

    Args:
        x: (B, C, H, W).
        weight: (C', C').
        bias: (C',).
        mask: (C', H', W') or (1, H', W'), bool; the conditioner sees the result where it is True, and 0 elsewhere.
        squeeze: squeeze `x` first (C' = 4C), else C' = C.
        dtype: of the conditioner's input; that of x when None.
        recompute: see `channel_mix`.

    Returns:
        `(y, masked)`, both (B, C', H', W').

    Raises:
        ValueError: as `channel_mix`, or the mask does not fit.

    Example:
        >>> mask = torch.tensor([[[True, False]]])
        >>> y, masked = channel_mix_masked(torch.ones(1, 1, 1, 2), torch.tensor([[2.0]]), torch.tensor([1.0]), mask)
        >>> y.flatten().tolist(), masked.flatten().tolist()
        ([3.0, 3.0], [3.0, 0.0])
    """
    _check_mix(x, weight, bias, squeeze)
    check_mask(mask, x, shape=_output_shape(x.shape, squeeze, False))
    if takes_reference():
        y = channel_mix_reference(x, weight, bias, squeeze)
        return y, y.masked_fill(~mask, 0.0).to(dtype or x.dtype)
    y, masked = ChannelMix.apply(x, weight, bias, mask, _inverse(weight) if recompute else None, squeeze, False, dtype or x.dtype)
    return y, masked


def channel_unmix(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    squeeze: bool = False,
    inverse_weight: Tensor | None = None,
    *,
    recompute: bool = False,
) -> Tensor:
    """Undo `channel_mix`: ``weight^-1 @ (pixel - bias)`` at every pixel, then unsqueeze when `squeeze`.

    Args:
        y: (B, C', H', W'), an output of `channel_mix`.
        weight: (C', C'), the weight given to `channel_mix`.
        bias: (C',), the same bias.
        squeeze: whether `channel_mix` squeezed.
        inverse_weight: (C', C'), the weight's inverse where the caller has it (from its LU factors, say); computed in float64
            when None. Gradients then go to it instead of `weight`.
        recompute: keep the result for the backward pass instead of `y`.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, or C' is above `MAX_CHANNELS` while the backend is ``"triton"``.

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
        raise ValueError(f"inverse_weight must be {tuple(weight.shape)} like weight, got {tuple(inverse_weight.shape)}")
    if takes_reference():
        return channel_unmix_reference(y, inverse_weight, bias, squeeze)
    x, _ = ChannelMix.apply(y, inverse_weight, bias, None, weight if recompute else None, squeeze, True, None)
    return x


def _inverse(weight: Tensor) -> Tensor:
    return torch.linalg.inv(weight.detach().double())
