"""Triton kernels of the channel mix.

A program takes one chunk of one sample's pixels; a program of the backward pass takes a few chunks.
`pixels_v` counts the pixels of the mixed (squeezed) image in units of V. Both directions are one map with
different ends, ``out = A (in - before) + after``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out, mask_bytes
from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    power_of_two,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, locate
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# The kernels hold one accumulator per channel and pixel in registers, which have no room for more channels.
MAX_CHANNELS = 64
# Pixels per program of the backward kernel. For so many pixels it writes one C' x C' sum of the weight's
# gradient, which is C' / (1.5 BACKWARD_PIXELS) of what it moves.
BACKWARD_PIXELS = 1024

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _offset(
    i, p, pixels, width, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, SQUEEZED: tl.constexpr,
):  # fmt: skip
    """Where channel i of pixel p of the mixed image lies in a sample; SQUEEZED: in its unsqueezed form."""
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
    x_ptr, weight_ptr, before_ptr, after_ptr, mask_ptr, y_ptr, masked_ptr,
    x_stride_v, pixels_v, width, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, IN_SQUEEZED: tl.constexpr, OUT_SQUEEZED: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr, NEXT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = p < pixels
    o = tl.arange(0, BLOCK_C)
    real = o < CHANNELS
    x_ptr += b * x_stride_v * V
    acc = tl.zeros((BLOCK_C, BLOCK), ACC)
    for i in tl.range(0, CHANNELS, loop_unroll_factor=UNROLL):
        in_offset = _offset(i, p, pixels, width, CHANNELS, CHANNELS_LAST, IN_SQUEEZED)
        x = tl.load(x_ptr + in_offset, mask=inside, other=0.0).to(ACC)
        if BEFORE:
            x -= tl.load(before_ptr + i)
        acc += tl.load(weight_ptr + o * CHANNELS + i, mask=real, other=0.0)[:, None] * x[None, :]
    if AFTER:
        acc += tl.load(after_ptr + o, mask=real, other=0.0)[:, None]
    stored = real[:, None] & inside[None, :]
    out_offset = _offset(o[:, None], p[None, :], pixels, width, CHANNELS, CHANNELS_LAST, OUT_SQUEEZED)
    base = b * (pixels * CHANNELS)
    tl.store(y_ptr + base + out_offset, acc.to(y_ptr.dtype.element_ty), mask=stored)
    if NEXT:
        mask_offset = _offset(o[:, None], p[None, :], pixels, width, CHANNELS, False, OUT_SQUEEZED)
        keep = tl.load(mask_ptr + mask_offset, mask=stored, other=0) != 0
        masked = tl.where(keep, acc, 0.0).to(masked_ptr.dtype.element_ty)
        tl.store(masked_ptr + base + out_offset, masked, mask=stored)


@kernel
def _mix_bwd_kernel(
    grad_ptr, grad_masked_ptr, x_ptr, weight_ptr, before_ptr, mask_ptr, dx_ptr, d_weight_ptr, d_bias_ptr,
    grad_stride_v, grad_masked_stride_v, x_stride_v, pixels_v, width, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
    TILES: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, IN_SQUEEZED: tl.constexpr,
    OUT_SQUEEZED: tl.constexpr, BEFORE: tl.constexpr, NEXT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    grad_ptr += b * grad_stride_v * V
    if NEXT:
        grad_masked_ptr += b * grad_masked_stride_v * V
    x_ptr += b * x_stride_v * V
    dx_ptr += b * (pixels * CHANNELS)
    i = tl.arange(0, BLOCK_C)
    real = i < CHANNELS
    d_weight = tl.zeros((BLOCK_C, BLOCK_C), ACC)
    d_bias = tl.zeros((BLOCK_C,), ACC)
    for tile in range(TILES):
        p = (chunk * TILES + tile) * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        stored = real[:, None] & inside[None, :]
        in_offset = _offset(i[:, None], p[None, :], pixels, width, CHANNELS, CHANNELS_LAST, IN_SQUEEZED)
        x = tl.load(x_ptr + in_offset, mask=stored, other=0.0).to(ACC)
        if BEFORE:
            x -= tl.load(before_ptr + i, mask=real, other=0.0)[:, None]
        # One channel of the output's gradient is read at a time, for the input's gradient and for one row of
        # the weight's. Outside of the image that gradient is 0, so the products vanish even where the bias
        # leaves x other than 0.
        dx = tl.zeros((BLOCK_C, BLOCK), ACC)
        for o in tl.range(0, CHANNELS, loop_unroll_factor=UNROLL):
            out_offset = _offset(o, p, pixels, width, CHANNELS, CHANNELS_LAST, OUT_SQUEEZED)
            g = tl.load(grad_ptr + out_offset, mask=inside, other=0.0).to(ACC)
            if NEXT:
                mask_offset = _offset(o, p, pixels, width, CHANNELS, False, OUT_SQUEEZED)
                keep = tl.load(mask_ptr + mask_offset, mask=inside, other=0) != 0
                extra = tl.load(grad_masked_ptr + out_offset, mask=inside, other=0.0).to(ACC)
                g += tl.where(keep, extra, 0.0)
            dx += tl.load(weight_ptr + o * CHANNELS + i, mask=real, other=0.0)[:, None] * g[None, :]
            row = tl.sum(x * g[None, :], axis=1)
            d_weight += tl.where(i[:, None] == o, row[None, :], 0.0)
            d_bias += tl.where(i == o, tl.sum(g, axis=0), 0.0)
        tl.store(dx_ptr + in_offset, dx.to(dx_ptr.dtype.element_ty), mask=stored)
    part = b * n_chunks + chunk
    square = i[:, None] * CHANNELS + i[None, :]
    d_weight_ptr += part * (CHANNELS * CHANNELS)
    tl.store(d_weight_ptr + square, d_weight, mask=real[:, None] & real[None, :])
    tl.store(d_bias_ptr + part * CHANNELS + i, d_bias, mask=real)


# -- launchers -----------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A program's channels (a power of two), pixels, warps, and the turns of its loop that are unrolled."""

    channels: int
    pixels: int
    warps: int
    unroll: int


# Pixels and warps by channels, the next power of two.
_FORWARD_TILES = {
    1: (1024, 4),
    2: (1024, 4),
    4: (512, 4),
    8: (256, 4),
    16: (256, 4),
    32: (64, 4),
    64: (64, 8),
}
_BACKWARD_TILES = {
    1: (1024, 4),
    2: (1024, 4),
    4: (512, 4),
    8: (256, 4),
    16: (128, 4),
    32: (64, 4),
    64: (32, 8),
}


def _forward_tile(channels: int, acc: torch.dtype) -> _Tile:
    """The forward tile: at most 32 accumulators a thread, fewer in float64."""
    rounded = power_of_two(channels)
    pixels, warps = _FORWARD_TILES[rounded]
    unroll = 4 if rounded <= 4 else 2 if rounded <= 8 else 1
    return _Tile(rounded, pixels // 2 if acc == torch.float64 else pixels, warps, min(unroll, channels))


def _backward_tile(channels: int, acc: torch.dtype) -> _Tile:
    """The backward tile: 16 values a thread of each of x, dx and their product, fewer in float64."""
    rounded = power_of_two(channels)
    pixels, warps = _BACKWARD_TILES[rounded]
    unroll = 4 if rounded <= 2 else 2 if rounded <= 16 else 1
    return _Tile(rounded, pixels // 2 if acc == torch.float64 else pixels, warps, min(unroll, channels))


class _MixedImage(NamedTuple):
    """The image whose pixels are multiplied: the squeezed one where there is a squeeze."""

    channels: int
    pixels: int
    width: int


def _mixed_image(shape: tuple[int, ...], squeeze: bool, inverse: bool) -> _MixedImage:
    """The mixed image of an input of `shape`."""
    _, c, h, w = shape
    if squeeze and not inverse:
        return _MixedImage(4 * c, h * w // 4, w // 2)
    return _MixedImage(c, h * w, w)


def output_shape(shape: tuple[int, ...], squeeze: bool, inverse: bool) -> tuple[int, int, int, int]:
    """The shape of the result for an input of `shape`."""
    batch, c, h, w = shape
    if not squeeze:
        return batch, c, h, w
    return (batch, c // 4, 2 * h, 2 * w) if inverse else (batch, 4 * c, h // 2, w // 2)


def launch_channel_mix(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(y, masked copy of y); the copy is empty without a mask."""
    shape = output_shape(x.shape, squeeze, inverse)
    channels, pixels, width = _mixed_image(x.shape, squeeze, inverse)
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    x = laid_out(x, channels_last)
    y = empty_image(shape, x, channels_last)
    masked = x.new_empty(0) if mask is None else empty_image(shape, x, channels_last, dtype)
    if x.numel() == 0:
        return y, masked
    tile = _forward_tile(channels, acc)
    chunks, v = cdiv(pixels, tile.pixels), vector_width(pixels, x.stride(0))
    weight, bias = weight.to(acc).contiguous(), bias.to(acc).contiguous()
    launch(
        _mix_fwd_kernel, shape[0] * chunks, x, tile.warps,
        x, weight, bias if inverse else None, None if inverse else bias, mask_bytes(mask, shape),
        y, None if mask is None else masked, x.stride(0) // v, pixels // v, width, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, UNROLL=tile.unroll, BLOCK=tile.pixels,
        ACC=triton_dtype(acc), CHANNELS_LAST=channels_last, IN_SQUEEZED=squeeze and not inverse,
        OUT_SQUEEZED=squeeze and inverse, BEFORE=inverse, AFTER=not inverse, NEXT=mask is not None,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, channels * tile.pixels),
    )  # fmt: skip
    return y, masked


def launch_channel_mix_backward(
    grad: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    squeeze: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    channels, acc = weight.shape[0], acc_dtype(x.dtype)
    channels_last = is_channels_last(x)
    shape = output_shape(grad.shape, squeeze, not inverse)
    _, pixels, width = _mixed_image(shape, squeeze, inverse)
    dx = empty_image(shape, x, channels_last)
    if x.numel() == 0:
        return dx, x.new_zeros(channels, channels, dtype=acc), x.new_zeros(channels, dtype=acc)
    grad, x = laid_out(grad, channels_last), laid_out(x, channels_last)
    # Without a masked copy, its stride is that of the result's gradient: it must not lower the vector width.
    grad_masked = grad if mask is None else laid_out(grad_masked, channels_last)
    tile = _backward_tile(channels, acc)
    tiles = min(BACKWARD_PIXELS // tile.pixels, power_of_two(cdiv(pixels, tile.pixels)))
    chunks = cdiv(pixels, tile.pixels * tiles)
    v = vector_width(pixels, grad.stride(0), grad_masked.stride(0), x.stride(0))
    parts = shape[0] * chunks
    d_weight = x.new_empty(parts, channels, channels, dtype=acc)
    d_bias = x.new_empty(parts, channels, dtype=acc)
    weight, bias = weight.to(acc).contiguous(), bias.to(acc).contiguous()
    launch(
        _mix_bwd_kernel, parts, grad, tile.warps,
        grad, None if mask is None else grad_masked, x, weight, bias if inverse else None,
        mask_bytes(mask, tuple(grad.shape)), dx, d_weight, d_bias,
        grad.stride(0) // v, grad_masked.stride(0) // v, x.stride(0) // v, pixels // v, width, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, UNROLL=tile.unroll, BLOCK=tile.pixels, TILES=tiles,
        ACC=triton_dtype(acc), CHANNELS_LAST=channels_last, IN_SQUEEZED=squeeze and not inverse,
        OUT_SQUEEZED=squeeze and inverse, BEFORE=inverse, NEXT=mask is not None,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, channels * tile.pixels * tiles),
    )  # fmt: skip
    total = d_bias.sum(dim=0)
    # Summed over all pixels, the input's gradient is A^T times the output's.
    return dx, d_weight.sum(dim=0), -(weight * total[:, None]).sum(dim=0) if inverse else total
