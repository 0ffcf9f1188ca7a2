"""The convolution of `cbam`: its window, and its backward pass with the joins that run beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    power_of_two,
    triton_dtype,
)
from fastflow.kernels.triton.parts import locate
from fastflow.kernels.triton.pool_parts import tile_elements

if TYPE_CHECKING:
    import triton.language as tl

# Pixels of a program of the backward pass.
CONVOLUTION_PIXELS = 128

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def shifted_place(t, p, pixels, width, SIZE: tl.constexpr):
    """(offset of tap t of a window of SIZE x SIZE, whether it lies in the image) for each tap and pixel p."""
    dy = t // SIZE - SIZE // 2
    dx = t % SIZE - SIZE // 2
    place = p[None, :] + (dy * width + dx)[:, None]
    x = (p % width)[None, :] + dx[:, None]
    # A column within the image leaves a row outside of it for places before the first or after the last.
    inside = (x >= 0) & (x < width) & (place >= 0) & (place < pixels)
    return place, inside


@kernel
def _convolution_bwd_kernel(
    d_spatial_ptr, pooled_ptr, weight_ptr, partial_ptr, d_pooled_ptr, shares_ptr, sums_ptr,
    batch, pixels, width, n_chunks, n_parts,
    CHANNELS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """A run of pixels backward through the convolution; the last `batch` programs join a sample's chunks."""
    program = tl.program_id(0)
    if program < batch * n_chunks:
        _convolution_backward(
            program, d_spatial_ptr, pooled_ptr, weight_ptr, d_pooled_ptr, shares_ptr, pixels, width, n_chunks,
            SIZE, BLOCK, BLOCK_T, ACC, INT64_OFFSETS,
        )  # fmt: skip
    else:
        b = tl.cast(program - batch * n_chunks, tl.int64)
        for first in range(0, CHANNELS, BLOCK_C):
            c = first + tl.arange(0, BLOCK_C)
            total = tl.zeros((BLOCK_K, BLOCK_C), ACC)
            for start in range(0, n_parts, BLOCK_K):
                k = start + tl.arange(0, BLOCK_K)
                place = (b * n_parts + k)[:, None] * CHANNELS + c[None, :]
                there = (k < n_parts)[:, None] & (c < CHANNELS)[None, :]
                total += tl.load(partial_ptr + place, mask=there, other=0.0)
            tl.store(sums_ptr + b * CHANNELS + c, tl.sum(total, axis=0), mask=c < CHANNELS)


@kernel
def _convolution_backward(
    program, d_spatial_ptr, pooled_ptr, weight_ptr, d_pooled_ptr, shares_ptr, pixels, width, n_chunks,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, ACC: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of a run of pooled pixels and its share of the weight's gradient."""
    b, chunk = locate(program, n_chunks, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    taps: tl.constexpr = SIZE * SIZE
    d_spatial_ptr += b * pixels
    pooled_ptr += b * (2 * pixels)
    shares_ptr += (b * n_chunks + chunk) * (2 * taps)
    grad = tl.load(d_spatial_ptr + p, mask=p < pixels, other=0.0)
    d_mean = tl.zeros((BLOCK_T, BLOCK), ACC)
    d_top = tl.zeros((BLOCK_T, BLOCK), ACC)
    for start in range(0, taps, BLOCK_T):
        k = start + tl.arange(0, BLOCK_T)
        real = (k < taps)[:, None] & (p < pixels)[None, :]
        # Pixel p gets back from the opposite tap what a tap read there.
        place, inside = shifted_place(taps - 1 - k, p, pixels, width, SIZE)
        given = tl.load(d_spatial_ptr + place, mask=inside & real, other=0.0)
        d_mean += tl.load(weight_ptr + k, mask=k < taps, other=0.0).to(ACC)[:, None] * given
        d_top += tl.load(weight_ptr + taps + k, mask=k < taps, other=0.0).to(ACC)[:, None] * given
        place, inside = shifted_place(k, p, pixels, width, SIZE)
        mean = tl.load(pooled_ptr + place, mask=inside & real, other=0.0)
        top = tl.load(pooled_ptr + pixels + place, mask=inside & real, other=0.0)
        tl.store(shares_ptr + k, tl.sum(mean * grad[None, :], axis=1), mask=k < taps)
        tl.store(shares_ptr + taps + k, tl.sum(top * grad[None, :], axis=1), mask=k < taps)
    d_pooled_ptr += b * (2 * pixels) + p
    tl.store(d_pooled_ptr, tl.sum(d_mean, axis=0), mask=p < pixels)
    tl.store(d_pooled_ptr + pixels, tl.sum(d_top, axis=0), mask=p < pixels)


# -- launcher ------------------------------------------------------------------------------------------------


def tap_block(taps: int, pixels: int, acc: torch.dtype) -> int:
    """How many taps of the convolution a program takes at once for a run of pixels."""
    return min(power_of_two(taps), max(1, tile_elements(acc) // pixels))


def convolution_backward(
    d_spatial: Tensor, pooled: Tensor, weight: Tensor, parts: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of `pooled`, shares of that of the weight (n, 2 k k), and the sums of `parts` (B, C)."""
    acc, (batch, pixels), size = d_spatial.dtype, d_spatial.shape, weight.shape[2]
    _, n_parts, channels = parts.shape
    block = min(power_of_two(pixels), CONVOLUTION_PIXELS)
    chunks = cdiv(pixels, block)
    d_pooled = torch.empty_like(pooled)
    shares = torch.empty(batch * chunks, weight.numel(), dtype=acc, device=weight.device)
    sums = torch.empty(batch, channels, dtype=acc, device=weight.device)
    block_c = min(128, power_of_two(channels))
    launch(
        _convolution_bwd_kernel, batch * (chunks + 1), weight, 4,
        d_spatial, pooled, weight, parts, d_pooled, shares, sums, batch, pixels, width, chunks, n_parts,
        CHANNELS=channels, SIZE=size, BLOCK=block,
        BLOCK_T=min(16, tap_block(size * size, block, acc)), BLOCK_C=block_c,
        BLOCK_K=min(power_of_two(n_parts), 2048 // block_c), ACC=triton_dtype(acc),
        INT64_OFFSETS=needs_int64_offsets(2 * pixels, block),
    )  # fmt: skip
    return d_pooled, shares, sums
