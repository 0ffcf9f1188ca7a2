"""Triton kernels of `cbam`, forward; `cbam_backward` holds those of its backward pass.

Four launches: poolings of pixels in chunks; the gate logits of each channel, from joined chunks through the
shared layers; poolings of gated channels; the convolution of these and both gates. `pixels_v` and
`*_stride_v` are in units of V elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.kernels.triton.cbam_convolution import shifted_place, tap_block
from fastflow.kernels.triton.launch import (
    kernel,
    launch,
    needs_int64_offsets,
    power_of_two,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, locate, place_of
from fastflow.kernels.triton.pool_channels import pool_gated_channels
from fastflow.kernels.triton.pool_parts import (
    column_tile,
    rank_of,
    sigmoid,
    tile_elements,
    value_of,
)
from fastflow.kernels.triton.pool_pixels import pool_chunks
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# A program of the shared layers holds all channels of a sample.
MAX_CHANNELS = 4096

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _gate_logits_kernel(
    sums_ptr, ranks_ptr, firsts_ptr, down_ptr, up_ptr, pooled_ptr, index_ptr, units_ptr, logits_ptr,
    batch, pixels, n_chunks,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Joins a sample's poolings in the order of their chunks and takes them through the shared layers."""
    b = tl.cast(tl.program_id(0), tl.int64)
    c = tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    total = tl.zeros((BLOCK_C,), ACC)
    lowest = rank_of(tl.full((BLOCK_C,), float("-inf"), ACC))
    rank = lowest
    at = tl.full((BLOCK_C,), 0x7FFFFFFF, tl.int32)
    for chunk in range(n_chunks):
        place = (b * n_chunks + chunk) * CHANNELS + c
        total += tl.load(sums_ptr + place, mask=real, other=0.0)
        here = tl.load(ranks_ptr + place, mask=real, other=0)
        if KEEP:
            first = tl.load(firsts_ptr + place, mask=real, other=0)
            # Among equals the earlier chunk stays; before the first chunk `at` is the largest place.
            at = tl.where((here > rank) | ((here == rank) & (first < at)), first, at)
        rank = tl.maximum(rank, here)
    mean = total / tl.cast(pixels, ACC)
    top = tl.where(real, value_of(rank, ACC), 0.0)
    if KEEP:
        tl.store(pooled_ptr + b * CHANNELS + c, mean, mask=real)
        tl.store(pooled_ptr + (batch + b) * CHANNELS + c, top, mask=real)
        tl.store(index_ptr + b * CHANNELS + c, at, mask=real)
    logits = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, HIDDEN, BLOCK_H):
        j = start + tl.arange(0, BLOCK_H)
        there = (j < HIDDEN)[:, None] & real[None, :]
        down = tl.load(down_ptr + j[:, None] * CHANNELS + c[None, :], mask=there, other=0.0).to(ACC)
        of_mean = tl.sum(down * mean[None, :], axis=1)
        of_top = tl.sum(down * top[None, :], axis=1)
        if KEEP:
            tl.store(units_ptr + b * HIDDEN + j, of_mean, mask=j < HIDDEN)
            tl.store(units_ptr + (batch + b) * HIDDEN + j, of_top, mask=j < HIDDEN)
        # A comparison keeps a NaN, which a maximum would drop.
        hidden = tl.where(of_mean < 0, 0.0, of_mean) + tl.where(of_top < 0, 0.0, of_top)
        up = tl.load(up_ptr + c[None, :] * HIDDEN + j[:, None], mask=there, other=0.0).to(ACC)
        logits += tl.sum(up * hidden[:, None], axis=0)
    tl.store(logits_ptr + b * CHANNELS + c, logits, mask=real)


@kernel
def _gates_kernel(
    x_ptr, logits_ptr, pooled_ptr, weight_ptr, y_ptr, spatial_ptr, x_stride_v, pixels_v, n_chunks, width,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, KEEP: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The convolution of a run of pixels, then their gates and those of all channels."""
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    taps: tl.constexpr = SIZE * SIZE
    pooled_ptr += b * (2 * pixels)
    total = tl.zeros((BLOCK_T, BLOCK), ACC)
    for start in range(0, 2 * taps, BLOCK_T):
        k = start + tl.arange(0, BLOCK_T)
        place, inside = shifted_place(k % taps, p, pixels, width, SIZE)
        inside = inside & (k < 2 * taps)[:, None] & (p < pixels)[None, :]
        weight = tl.load(weight_ptr + k, mask=k < 2 * taps, other=0.0).to(ACC)
        value = tl.load(pooled_ptr + (k // taps)[:, None] * pixels + place, mask=inside, other=0.0)
        total += weight[:, None] * value
    logit = tl.sum(total, axis=0)
    if KEEP:
        tl.store(spatial_ptr + b * pixels + p, logit, mask=p < pixels)
    spatial = sigmoid(logit)
    x_ptr += b * x_stride_v * V
    y_ptr += b * (CHANNELS * pixels)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < CHANNELS)[:, None] & (p < pixels)[None, :]
        gate = sigmoid(tl.load(logits_ptr + b * CHANNELS + c, mask=c < CHANNELS, other=0.0))
        place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
        y = x * gate[:, None] * spatial[None, :]
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------


def layer_blocks(channels: int, hidden: int, acc: torch.dtype) -> tuple[int, int, int]:
    """(channels, units, warps) of a program of the shared layers, which takes all channels."""
    block_c = power_of_two(channels)
    block_h = min(power_of_two(hidden), max(1, tile_elements(acc) // block_c))
    return block_c, block_h, min(8, max(1, block_c * block_h // 512))


def launch_cbam(
    x: Tensor, down: Tensor, up: Tensor, spatial_weight: Tensor, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gated x and, with `keep`, what the backward pass takes; see `fastflow.kernels.cbam`."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels, hidden = h * w, down.shape[0]

    def kept(*shape: int, dtype: torch.dtype = acc) -> Tensor:
        return torch.empty(shape if keep else 0, dtype=dtype, device=x.device)

    y = empty_image(x.shape, x, channels_last)
    pooled_pixels, units = kept(2, batch, channels), kept(2, batch, hidden)
    first_pixel = kept(batch, channels, dtype=torch.int32)
    spatial_logits = kept(batch, 1, h, w)
    channel_logits = torch.empty(batch, channels, dtype=acc, device=x.device)
    pooled_channels = torch.empty(batch, 2, h, w, dtype=acc, device=x.device)
    first_channel = kept(batch, h, w, dtype=torch.int32)
    if x.numel() > 0:
        x = laid_out(x, channels_last)
        down, up, spatial_weight = down.contiguous(), up.contiguous(), spatial_weight.contiguous()
        sums, ranks, firsts = pool_chunks(x, channels_last, keep)
        block_c, block_h, warps = layer_blocks(channels, hidden, acc)
        launch(
            _gate_logits_kernel, batch, x, warps,
            sums, ranks, firsts, down, up, pooled_pixels if keep else None, first_pixel if keep else None,
            units if keep else None, channel_logits, batch, pixels, sums.shape[1],
            CHANNELS=channels, HIDDEN=hidden, BLOCK_C=block_c, BLOCK_H=block_h, ACC=triton_dtype(acc),
            KEEP=keep,
        )  # fmt: skip
        pool_gated_channels(
            x, channel_logits, pooled_channels, first_channel if keep else None, channels_last
        )
        _apply_gates(
            x, channel_logits, pooled_channels, spatial_weight, y, spatial_logits if keep else None,
            channels_last,
        )  # fmt: skip
    if not keep:
        channel_logits, pooled_channels = (x.new_empty(0, dtype=acc) for _ in range(2))
    return (
        y, pooled_pixels, first_pixel, units, channel_logits, pooled_channels, first_channel, spatial_logits,
    )  # fmt: skip


def _apply_gates(
    x: Tensor,
    channel_logits: Tensor,
    pooled_channels: Tensor,
    spatial_weight: Tensor,
    y: Tensor,
    spatial_logits: Tensor | None,
    channels_last: bool,
) -> None:
    """Fill `y`, and `spatial_logits` where these are kept."""
    acc = acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels, size = h * w, spatial_weight.shape[2]
    tile, v = column_tile(channels, pixels, acc), vector_width(pixels, x.stride(0))
    chunks, taps = tile.chunks(pixels), tap_block(2 * size * size, tile.pixels, acc)
    launch(
        _gates_kernel, batch * chunks, x, min(8, max(tile.warps, taps * tile.pixels // 512)),
        x, channel_logits, pooled_channels, spatial_weight, y, spatial_logits,
        x.stride(0) // v, pixels // v, chunks, w,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, SIZE=size,
        BLOCK_T=taps, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last, KEEP=spatial_logits is not None,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, tile_elements(acc)),
    )  # fmt: skip
