"""Triton kernels of `pool_pixels`: mean and max over the pixels of each channel.

A plane that is longer than a chunk is pooled in chunks, which a second kernel joins in their order.
`pixels_v` and `*_stride_v` are in units of V elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.kernels.triton import pool_parts
from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, image_tile, locate, place_of, tile_of
from fastflow.kernels.triton.pool_parts import (
    Tile,
    join_tile,
    places_of_top,
    plane_tile,
    rank_of,
    tile_elements,
    value_of,
)
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _pool_pixels_kernel(
    x_ptr, mean_ptr, top_ptr, index_ptr, sums_ptr, ranks_ptr, firsts_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, MAXIMUM: tl.constexpr, INDEX: tl.constexpr,
    SPLIT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, BLOCK_C, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    c = first + tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    x_ptr += b * x_stride_v * V
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    rank = rank_of(tl.full((BLOCK_C, BLOCK), float("-inf"), ACC))
    start = (chunk * (STEPS * BLOCK) + tl.arange(0, BLOCK)).to(tl.int32)
    at = tl.zeros((BLOCK_C, BLOCK), tl.int32) + start[None, :]
    for step in range(STEPS):
        p = (chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (p < pixels)[None, :]
        place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
        total += x
        if MAXIMUM:
            here = rank_of(tl.where(inside, x, float("-inf")))
            if INDEX:
                at = tl.where(here > rank, p.to(tl.int32)[None, :], at)
            rank = tl.maximum(rank, here)
    place = b * CHANNELS + c
    if SPLIT:
        place = (b * n_chunks + chunk) * CHANNELS + c
        tl.store(sums_ptr + place, tl.sum(total, axis=1), mask=real)
    else:
        mean = tl.sum(total, axis=1) / tl.cast(pixels, ACC)
        tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=real)
    if MAXIMUM:
        top = tl.max(rank, axis=1)
        if SPLIT:
            tl.store(ranks_ptr + place, top, mask=real)
        else:
            tl.store(top_ptr + place, value_of(top, ACC).to(top_ptr.dtype.element_ty), mask=real)
        if INDEX:
            where = tl.min(places_of_top(rank, at, top[:, None]), axis=1)
            if SPLIT:
                tl.store(firsts_ptr + place, where, mask=real)
            else:
                tl.store(index_ptr + place, where, mask=real)


@kernel
def _join_pixels_kernel(
    sums_ptr, ranks_ptr, firsts_ptr, mean_ptr, top_ptr, index_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    MAXIMUM: tl.constexpr, INDEX: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The poolings of a channel from those of its chunks, in their order."""
    b, block = locate(tl.program_id(0), (CHANNELS + BLOCK_C - 1) // BLOCK_C, False)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    lowest = rank_of(tl.full((BLOCK_C, BLOCK), float("-inf"), ACC))
    rank = lowest
    at = tl.full((BLOCK_C, BLOCK), 0x7FFFFFFF, tl.int32)
    for start in range(0, n_chunks, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (k < n_chunks)[None, :]
        place = (b * n_chunks + k)[None, :] * CHANNELS + c[:, None]
        total += tl.load(sums_ptr + place, mask=inside, other=0.0)
        if MAXIMUM:
            here = tl.where(inside, tl.load(ranks_ptr + place, mask=inside, other=0), lowest)
            if INDEX:
                first = tl.load(firsts_ptr + place, mask=inside, other=0x7FFFFFFF)
                # Among equals the earlier chunk stays; a lane that has seen nothing holds the largest place.
                at = tl.where((here > rank) | ((here == rank) & (first < at)), first, at)
            rank = tl.maximum(rank, here)
    place = b * CHANNELS + c
    mean = tl.sum(total, axis=1) / tl.cast(elements(pixels_v, V, INT64_OFFSETS), ACC)
    tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=real)
    if MAXIMUM:
        top = tl.max(rank, axis=1)
        tl.store(top_ptr + place, value_of(top, ACC).to(top_ptr.dtype.element_ty), mask=real)
        if INDEX:
            tl.store(index_ptr + place, tl.min(places_of_top(rank, at, top[:, None]), axis=1), mask=real)


@kernel
def _pool_pixels_bwd_kernel(
    mean_ptr, top_ptr, index_ptr, passed_ptr, dx_ptr, passed_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, MAXIMUM: tl.constexpr, PASSED: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, _, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    mean = tl.load(mean_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC) / tl.cast(pixels, ACC)
    dx = tl.zeros((BLOCK_C, BLOCK), ACC) + mean[:, None]
    if MAXIMUM:
        top = tl.load(top_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
        at = tl.load(index_ptr + b * CHANNELS + c, mask=real, other=0)
        dx += tl.where(at[:, None] == p[None, :], top[:, None], 0.0)
    if PASSED:
        dx += tl.load(passed_ptr + b * passed_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    tl.store(dx_ptr + b * (CHANNELS * pixels) + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# -- launchers ---------------------------------------------------------------------------------------------


def _runs(channels: int, pixels: int, channels_last: bool, acc: torch.dtype) -> tuple[Tile, int, int]:
    """(tile, tiles that a program takes one after another, programs along the pixels of a plane)."""
    tile = plane_tile(channels, pixels, channels_last, acc, pool_parts.TILE_ELEMENTS)
    # A program goes on over several blocks where one is short.
    steps = cdiv(min(pixels, pool_parts.MAX_RUN_PIXELS), tile.pixels) if channels_last else 1
    return tile, steps, cdiv(pixels, tile.pixels * steps)


def _empty_parts(
    x: Tensor, chunks: int, acc: torch.dtype, maximum: bool, index: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums, ranks of maxima and their first pixels (B, chunks, C), the last two where they are needed."""
    parts = (x.shape[0], chunks, x.shape[1])
    rank_dtype = torch.int64 if acc == torch.float64 else torch.int32
    return (
        torch.empty(parts, dtype=acc, device=x.device),
        torch.empty(parts, dtype=rank_dtype, device=x.device) if maximum else None,
        torch.empty(parts, dtype=torch.int32, device=x.device) if index else None,
    )


def pool_chunks(x: Tensor, channels_last: bool, index: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums, ranks of maxima and with `index` their first pixels (B, chunks, C), for a kernel that joins them.

    `x` has a pixel and lies in the layout.
    """
    acc = acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    tile, steps, chunks = _runs(channels, pixels, channels_last, acc)
    parts, v = _empty_parts(x, chunks, acc, True, index), vector_width(pixels, x.stride(0))
    launch(
        _pool_pixels_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        x, None, None, None, *parts, x.stride(0) // v, pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, STEPS=steps, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, MAXIMUM=True, INDEX=index, SPLIT=True,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, tile_elements(acc) * steps),
    )  # fmt: skip
    return parts


def launch_pool_pixels(x: Tensor, maximum: bool, index: bool) -> tuple[Tensor, Tensor]:
    """(mean and, with `maximum`, max (1 or 2, B, C); with `index` the pixel of the first maximum (B, C))."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    pooled = torch.empty(2 if maximum else 1, batch, channels, dtype=x.dtype, device=x.device)
    first = torch.empty((batch, channels) if index else 0, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return pooled, first
    x = laid_out(x, channels_last)
    tile, steps, chunks = _runs(channels, pixels, channels_last, acc)
    v = vector_width(pixels, x.stride(0))
    top, where = pooled[1] if maximum else None, first if index else None
    sums = ranks = firsts = None
    if chunks > 1:
        sums, ranks, firsts = _empty_parts(x, chunks, acc, maximum, index)
    shared = {
        "V": v, "CHANNELS": channels, "ACC": triton_dtype(acc), "MAXIMUM": maximum, "INDEX": index,
        "INT64_OFFSETS": needs_int64_offsets(channels * pixels, tile_elements(acc) * steps),
    }  # fmt: skip
    launch(
        _pool_pixels_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        x, pooled[0], top, where, sums, ranks, firsts, x.stride(0) // v, pixels // v, chunks,
        BLOCK_C=tile.channels, BLOCK=tile.pixels, STEPS=steps, CHANNELS_LAST=channels_last, SPLIT=chunks > 1,
        **shared,
    )  # fmt: skip
    if chunks > 1:
        join = join_tile(channels, chunks)
        launch(
            _join_pixels_kernel, batch * join.blocks(channels), x, join.warps,
            sums, ranks, firsts, pooled[0], top, where, pixels // v, chunks,
            BLOCK_C=join.channels, BLOCK=join.pixels, **shared,
        )  # fmt: skip
    return pooled, first


def launch_pool_pixels_backward(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    """The gradient of x from those of the poolings and, where it was used, of the handed-on x (`passed`)."""
    acc = acc_dtype(grad.dtype)
    _, batch, channels = grad.shape
    pixels = height * width
    dx = empty_image((batch, channels, height, width), grad, channels_last)
    if dx.numel() == 0:
        return dx
    grad = grad.contiguous()
    passed = None if passed is None else laid_out(passed, channels_last)
    stride = channels * pixels if passed is None else passed.stride(0)
    v = vector_width(pixels, stride)
    tile = plane_tile(channels, pixels, channels_last, acc, pool_parts.MAX_RUN_PIXELS)
    chunks = tile.chunks(pixels)
    launch(
        _pool_pixels_bwd_kernel, batch * tile.blocks(channels) * chunks, grad, tile.warps,
        grad[0], None if index is None else grad[1], index, passed, dx, stride // v, pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, MAXIMUM=index is not None, PASSED=passed is not None,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, pool_parts.TILE_ELEMENTS),
    )  # fmt: skip
    return dx
