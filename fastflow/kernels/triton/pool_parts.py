"""Parts of the kernels of poolings and gates: order of numbers with NaN, sizes of tiles, gradients of logits.

A program takes a tile of channels by pixels of one sample.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.triton.launch import cdiv, kernel, launch, power_of_two, triton_dtype
from fastflow.kernels.triton.parts import locate

if TYPE_CHECKING:
    import triton.language as tl

# -- parts of kernels ---------------------------------------------------------------------------------------


@kernel
def rank_of(x):
    """Integers in the order of x: both zeros are one, a NaN is above all."""
    # Adding 0 makes a zero positive.
    if x.dtype == tl.float64:
        bits = (x + 0.0).to(tl.int64, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFFFFFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits))
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@kernel
def value_of(rank, ACC: tl.constexpr):
    """The number with a rank of `rank_of`."""
    if rank.dtype == tl.int64:
        return tl.where(rank < 0, rank ^ 0x7FFFFFFFFFFFFFFF, rank).to(ACC, bitcast=True)
    else:
        return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(ACC, bitcast=True)


@kernel
def places_of_top(rank, at, top):
    """The places `at` where the highest rank is, and the largest integer elsewhere."""
    return tl.where(rank == top, at, 0x7FFFFFFF)


@kernel
def sigmoid(x):
    """The logistic function."""
    return 1.0 / (1.0 + tl.exp(-x))


# -- sizes of tiles ----------------------------------------------------------------------------------------

TILE_ELEMENTS = 4096
MAX_RUN_PIXELS = 1024


class Tile(NamedTuple):
    """How much a program takes: channels, pixels, warps."""

    channels: int
    pixels: int
    warps: int

    def chunks(self, pixels: int) -> int:
        """The number of tiles along the pixels of a plane."""
        return cdiv(pixels, self.pixels)

    def blocks(self, channels: int) -> int:
        """The number of tiles along channels."""
        return cdiv(channels, self.channels)


def tile_elements(acc: torch.dtype) -> int:
    """The largest number of elements in a tile."""
    return TILE_ELEMENTS // 2 if acc == torch.float64 else TILE_ELEMENTS


def _tile(channels: int, pixels: int) -> Tile:
    return Tile(channels, pixels, min(8, max(1, channels * pixels // 512)))


def plane_tile(channels: int, pixels: int, channels_last: bool, acc: torch.dtype, max_run: int) -> Tile:
    """Some channels by at most `max_run` pixels; channels_last takes channels for whole memory sectors."""
    size = tile_elements(acc)
    if channels_last:
        block_c = min(32, power_of_two(channels))
        return _tile(block_c, min(power_of_two(pixels), size // block_c))
    block = min(power_of_two(pixels), max_run, size)
    return _tile(min(power_of_two(channels), size // block), block)


def column_tile(channels: int, pixels: int, acc: torch.dtype) -> Tile:
    """All channels, or 128 at a time, by a run of pixels."""
    size = tile_elements(acc)
    block_c = min(size // 32, power_of_two(channels))
    return _tile(block_c, min(power_of_two(pixels), size // block_c, 256))


def join_tile(channels: int, chunks: int) -> Tile:
    """Some channels by some chunks, for kernels that join chunks; its `pixels` are chunks."""
    block = min(64, power_of_two(chunks))
    return _tile(min(power_of_two(channels), 1024 // block), block)


# -- gradients of logits -----------------------------------------------------------------------------------


@kernel
def _join_logits_kernel(
    partial_ptr, logits_ptr, d_logits_ptr, n_chunks,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the logit of a channel from the sums of its chunks, in their order."""
    b, block = locate(tl.program_id(0), (CHANNELS + BLOCK_C - 1) // BLOCK_C, False)
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    for start in range(0, n_chunks, BLOCK):
        k = start + tl.arange(0, BLOCK)
        place = (b * n_chunks + k)[None, :] * CHANNELS + c[:, None]
        total += tl.load(partial_ptr + place, mask=real[:, None] & (k < n_chunks)[None, :], other=0.0)
    logit = tl.load(logits_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
    d_logits = tl.sum(total, axis=1) * sigmoid(-logit)
    tl.store(d_logits_ptr + b * CHANNELS + c, d_logits.to(d_logits_ptr.dtype.element_ty), mask=real)


def join_logits(partial: Tensor | None, channel_logits: Tensor, d_logits: Tensor) -> None:
    """Fill `d_logits` (B, C) from the sums `partial` (B, chunks, C); nothing to do without any."""
    if partial is None:
        return
    batch, chunks, channels = partial.shape
    tile = join_tile(channels, chunks)
    launch(
        _join_logits_kernel, batch * tile.blocks(channels), partial, tile.warps,
        partial, channel_logits, d_logits, chunks,
        CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(partial.dtype),
    )  # fmt: skip
