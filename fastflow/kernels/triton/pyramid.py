"""Triton kernels of the atrous pyramid: the forward pass, and the parts that its backward pass shares.

Convolutions are the library's. Three kernels do the rest: sums of x and of the branches over chunks of
pixels, a sample's gates and maps of them, and the product of the maps with x and the branches, each of which
is read once. `pixels_v` is in units of V elements; columns are the 4C channels of the pyramid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.cpu.pyramid import PyramidWeights
from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out, memory_format
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton import pool_parts
from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    power_of_two,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, locate, place_of, tile_of
from fastflow.kernels.triton.pool_parts import plane_tile, sigmoid
from fastflow.numerics import acc_dtype, full_precision

if TYPE_CHECKING:
    import triton.language as tl

# The kernels take x and so many dilated branches.
DILATED = 3
BRANCHES = 1 + DILATED
# Sums of chunks that are loaded at a time.
BLOCK_N = 16

# -- parts of kernels ---------------------------------------------------------------------------------------


@kernel
def multiply(a, b, PRECISION: tl.constexpr):
    """a @ b. Matrix units take float64 operands in some layouts only, so those are multiplied out."""
    if a.dtype == tl.float64:
        return tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@kernel
def joined(sums_ptr, b, column, real, n_chunks, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Columns of a sample's sums (B, chunks, WIDTH), added up over chunks in their order."""
    total = tl.zeros((column.shape[0], BLOCK), ACC)
    for start in range(0, n_chunks, BLOCK):
        n = start + tl.arange(0, BLOCK)
        place = (b * n_chunks + n)[None, :] * WIDTH + column[:, None]
        total += tl.load(sums_ptr + place, mask=real[:, None] & (n < n_chunks)[None, :], other=0.0)
    return tl.sum(total, axis=1)


@kernel
def matrix_tile(ptr, row, column, row_real, column_real, WIDTH: tl.constexpr, ACC: tl.constexpr):
    """Some rows and columns of a matrix (..., WIDTH), 0 where there are none."""
    mask = row_real[:, None] & column_real[None, :]
    return tl.load(ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0).to(ACC)


@kernel
def image_rows(
    ptr, c, p, real, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """Channels c by pixels p of a sample, widened unless NARROW."""
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    v = tl.load(ptr + place, mask=inside, other=0.0)
    return v if NARROW else v.to(ACC)


@kernel
def branch_bias(point_ptr, first_ptr, second_ptr, third_ptr, k, c, real, ACC: tl.constexpr):
    """Channels c of the bias of branch k: the others are not loaded."""
    bias = tl.load(point_ptr + c, mask=real & (k == 0), other=0.0).to(ACC)
    bias += tl.load(first_ptr + c, mask=real & (k == 1), other=0.0).to(ACC)
    bias += tl.load(second_ptr + c, mask=real & (k == 2), other=0.0).to(ACC)
    return bias + tl.load(third_ptr + c, mask=real & (k == 3), other=0.0).to(ACC)


@kernel
def _gate(up_ptr, up_bias_ptr, hidden, column, real, h, HIDDEN: tl.constexpr, ACC: tl.constexpr):
    """The gates of some columns."""
    up = matrix_tile(up_ptr, column, h, real, h < HIDDEN, HIDDEN, ACC)
    bias = tl.load(up_bias_ptr + column, mask=real, other=0.0).to(ACC)
    return sigmoid(tl.sum(up * hidden[None, :], axis=1) + bias)


# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _branch_sums_kernel(
    x_ptr, first_ptr, second_ptr, third_ptr, sums_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, start, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, BLOCK_C, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    c = start + tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    base = b * (CHANNELS * pixels)
    sums_ptr += (b * n_chunks + chunk) * (4 * CHANNELS)
    for k in tl.static_range(4):
        if k == 0:
            ptr = x_ptr + base
        elif k == 1:
            ptr = first_ptr + base
        elif k == 2:
            ptr = second_ptr + base
        else:
            ptr = third_ptr + base
        total = tl.zeros((BLOCK_C, BLOCK), ACC)
        for step in range(STEPS):
            p = (chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
            total += image_rows(ptr, c, p, real, pixels, CHANNELS, CHANNELS_LAST, ACC, False)
        tl.store(sums_ptr + k * CHANNELS + c, tl.sum(total, axis=1), mask=real)


@kernel
def _maps_kernel(
    sums_ptr, point_ptr, point_bias_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr, down_ptr,
    down_bias_ptr, up_ptr, up_bias_ptr, output_ptr, output_bias_ptr, means_ptr, hidden_ptr, gates_ptr,
    maps_ptr, constant_ptr, pixels, n_chunks,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_O rows of a sample's maps. Each program computes the gates; the first of a sample keeps them."""
    b, block = locate(tl.program_id(0), (CHANNELS + BLOCK_O - 1) // BLOCK_O, False)
    h = tl.arange(0, BLOCK_H)
    lane = tl.arange(0, BLOCK_C)
    pre = tl.load(down_bias_ptr + h, mask=h < HIDDEN, other=0.0).to(ACC)
    means_ptr += b * (5 * CHANNELS)
    for start in range(0, 4 * CHANNELS, CHANNELS):
        k = start // CHANNELS
        for offset in range(0, CHANNELS, BLOCK_C):
            i = offset + lane
            real = i < CHANNELS
            mean = branch_bias(
                point_bias_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr, k, i, real, ACC
            )
            if k == 0:
                for from_x in range(0, CHANNELS, BLOCK_C):
                    j = from_x + lane
                    of_x = joined(sums_ptr, b, j, j < CHANNELS, n_chunks, 4 * CHANNELS, BLOCK_N, ACC) / pixels
                    if block == 0:
                        tl.store(means_ptr + 4 * CHANNELS + j, of_x, mask=j < CHANNELS)
                    point = matrix_tile(point_ptr, i, j, real, j < CHANNELS, CHANNELS, ACC)
                    mean += tl.sum(point * of_x[None, :], axis=1)
            else:
                mean += joined(sums_ptr, b, start + i, real, n_chunks, 4 * CHANNELS, BLOCK_N, ACC) / pixels
            if block == 0:
                tl.store(means_ptr + start + i, mean, mask=real)
            down = matrix_tile(down_ptr, h, start + i, h < HIDDEN, real, 4 * CHANNELS, ACC)
            pre += tl.sum(down * tl.where(real, mean, 0.0)[None, :], axis=1)
    hidden = tl.where(pre < 0, 0.0, pre)
    if block == 0:
        tl.store(hidden_ptr + b * HIDDEN + h, hidden, mask=h < HIDDEN)
    o = block * BLOCK_O + tl.arange(0, BLOCK_O)
    row = o < CHANNELS
    constant = tl.load(output_bias_ptr + o, mask=row, other=0.0).to(ACC)
    maps_ptr += b * (CHANNELS * 4 * CHANNELS)
    for start in range(0, 4 * CHANNELS, CHANNELS):
        k = start // CHANNELS
        for offset in range(0, CHANNELS, BLOCK_C):
            i = offset + lane
            real = i < CHANNELS
            gate = _gate(up_ptr, up_bias_ptr, hidden, start + i, real, h, HIDDEN, ACC)
            if block == 0:
                tl.store(gates_ptr + b * (4 * CHANNELS) + start + i, gate, mask=real)
            gated = matrix_tile(output_ptr, o, start + i, row, real, 4 * CHANNELS, ACC) * gate[None, :]
            bias = branch_bias(
                point_bias_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr, k, i, real, ACC
            )
            constant += tl.sum(gated * bias[None, :], axis=1)
            if k > 0:
                place = o[:, None] * (4 * CHANNELS) + (start + i)[None, :]
                mask = row[:, None] & real[None, :]
                tl.store(maps_ptr + place, gated.to(maps_ptr.dtype.element_ty), mask=mask)
    tl.store(constant_ptr + b * CHANNELS + o, constant, mask=row)
    # The map of x is that of the undilated branch times the branch.
    for to in range(0, CHANNELS, BLOCK_C):
        j = to + lane
        mapped = tl.zeros((BLOCK_O, BLOCK_C), ACC)
        for offset in range(0, CHANNELS, BLOCK_C):
            i = offset + lane
            real = i < CHANNELS
            gate = _gate(up_ptr, up_bias_ptr, hidden, i, real, h, HIDDEN, ACC)
            gated = matrix_tile(output_ptr, o, i, row, real, 4 * CHANNELS, ACC) * gate[None, :]
            point = matrix_tile(point_ptr, i, j, real, j < CHANNELS, CHANNELS, ACC)
            mapped += multiply(gated, point, PRECISION)
        place = o[:, None] * (4 * CHANNELS) + j[None, :]
        mask = row[:, None] & (j < CHANNELS)[None, :]
        tl.store(maps_ptr + place, mapped.to(maps_ptr.dtype.element_ty), mask=mask)


@kernel
def _map_branches_kernel(
    x_ptr, first_ptr, second_ptr, third_ptr, maps_ptr, constant_ptr, y_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The sum over x and the branches of the products with their maps."""
    b, start, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, BLOCK_O, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    o = start + tl.arange(0, BLOCK_O)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    row = o < CHANNELS
    base = b * (CHANNELS * pixels)
    maps_ptr += b * (CHANNELS * 4 * CHANNELS)
    out = tl.zeros((BLOCK_O, BLOCK), ACC)
    out += tl.load(constant_ptr + b * CHANNELS + o, mask=row, other=0.0)[:, None]
    for k in tl.static_range(4):
        if k == 0:
            ptr = x_ptr + base
        elif k == 1:
            ptr = first_ptr + base
        elif k == 2:
            ptr = second_ptr + base
        else:
            ptr = third_ptr + base
        for offset in tl.range(0, CHANNELS, BLOCK_C, num_stages=2):
            i = offset + tl.arange(0, BLOCK_C)
            real = i < CHANNELS
            v = image_rows(ptr, i, p, real, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
            place = o[:, None] * (4 * CHANNELS) + (k * CHANNELS + i)[None, :]
            mapped = tl.load(maps_ptr + place, mask=row[:, None] & real[None, :], other=0.0)
            out += multiply(mapped if NARROW else mapped.to(ACC), v, PRECISION)
    place = place_of(o[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    inside = row[:, None] & (p < pixels)[None, :]
    tl.store(y_ptr + base + place, out.to(y_ptr.dtype.element_ty), mask=inside)


# -- launchers ----------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """The largest tile of a product: channels of its result, channels that it sums, pixels, warps."""

    rows: int
    channels: int
    pixels: int
    warps: int


_MAP = {"narrow": Blocks(64, 32, 128, 8), "float32": Blocks(32, 32, 64, 8), "float64": Blocks(16, 16, 32, 4)}


def choose_blocks(table: dict[str, Blocks], channels: int, narrow: bool, acc: torch.dtype) -> Blocks:
    """The entry of a table, with no more channels than there are; products have at least 16."""
    blocks = table["narrow" if narrow else "float64" if acc == torch.float64 else "float32"]
    most = max(16, power_of_two(channels))
    warps = min(blocks.warps, 4) if most == 16 else blocks.warps
    return blocks._replace(rows=min(blocks.rows, most), channels=min(blocks.channels, most), warps=warps)


def is_narrow(x: Tensor) -> bool:
    """Whether products run in the 16 bits of x; not in the interpreter, whose bfloat16 products are wrong."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    # A launch recorded in the interpreter stands for a launch on a GPU.
    return narrow and (launching.is_recording() or not launching.interpreted())


def precision(x: Tensor) -> str:
    """How matrix units multiply float32: three products of TF32 are as exact as one of float32."""
    return "ieee" if torch.version.hip or x.dtype == torch.float64 else "tf32x3"


def dense(x: Tensor, channels_last: bool) -> Tensor:
    """`x` with its samples one after another, each dense in the layout; copied only if it is not."""
    x = laid_out(x, channels_last)
    if len(x) > 1 and x.stride(0) != x.shape[1] * x.shape[2] * x.shape[3]:
        return x.contiguous(memory_format=memory_format(channels_last))
    return x


def cast_each(values: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """`values` in a dtype, all by one launch; as they are where they have it."""
    if all(value.dtype == dtype for value in values):
        return list(values)
    cast = [torch.empty_like(value, dtype=dtype) for value in values]
    torch._foreach_copy_(cast, list(values))
    return cast


def unpack(weights: Sequence[Tensor], dilations: Sequence[int]) -> PyramidWeights:
    """The weights of the pyramid in the order of `PyramidWeights`."""
    pairs = list(zip(weights[::2], weights[1::2], strict=True))
    point, *dilated, down, up, output = pairs
    return PyramidWeights(point, tuple(dilated), tuple(dilations), down, up, output)


def launch_atrous_pyramid(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    """The result, and what the backward pass reads again.

    These are the branches without their biases, the maps (B, C, 4C) of x and of the branches, the means
    (B, 5C) of the pyramid and of x, the hidden values of the gates (B, h), and the gates (B, 4C).
    """
    named = unpack(weights, dilations)
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, height, width = x.shape
    hidden_size, pixels = named.down[0].shape[0], height * width
    x = dense(x, channels_last)
    narrow = is_narrow(x)
    y = empty_image((batch, channels, height, width), x, channels_last)
    maps = x.new_empty(batch, channels, 4 * channels)
    means, hidden, gates = (
        x.new_empty(batch, size, dtype=acc) for size in (5 * channels, hidden_size, 4 * channels)
    )
    if x.numel() == 0:
        return [y, *(torch.empty_like(x) for _ in named.dilated), maps, means, hidden, gates]
    convolved = convolve_branches(x, [weight for weight, _ in named.dilated], dilations)
    branches = [dense(branch, channels_last) for branch in convolved]
    tile = plane_tile(channels, pixels, channels_last, acc, pool_parts.MAX_RUN_PIXELS)
    chunks, v = tile.chunks(pixels), vector_width(pixels)
    sums = x.new_empty(batch, chunks, 4 * channels, dtype=acc)
    shared = {
        "V": v, "CHANNELS": channels, "ACC": triton_dtype(acc), "CHANNELS_LAST": channels_last,
        "INT64_OFFSETS": needs_int64_offsets(channels * pixels, pool_parts.TILE_ELEMENTS * 4),
    }  # fmt: skip
    launch(
        _branch_sums_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        x, *branches, sums, pixels // v, chunks,
        BLOCK_C=tile.channels, BLOCK=tile.pixels, STEPS=1, **shared,
    )  # fmt: skip
    constant = x.new_empty(batch, channels, dtype=acc)
    block = 16 if acc == torch.float64 else min(32, max(16, power_of_two(channels)))
    launch(
        _maps_kernel, batch * cdiv(channels, block), x, 4,
        sums, *(value.contiguous() for value in (*named.point, *(bias for _, bias in named.dilated))),
        *(value.contiguous() for value in (*named.down, *named.up, *named.output)),
        means, hidden, gates, maps, constant, pixels, chunks,
        CHANNELS=channels, HIDDEN=hidden_size, BLOCK_H=max(16, power_of_two(hidden_size)), BLOCK_O=block,
        BLOCK_C=block, BLOCK_N=min(BLOCK_N, power_of_two(chunks)), ACC=triton_dtype(acc),
        PRECISION="ieee",
    )  # fmt: skip
    blocks = choose_blocks(_MAP, channels, narrow, acc)
    pixel_chunks = cdiv(pixels, blocks.pixels)
    launch(
        _map_branches_kernel, batch * cdiv(channels, blocks.rows) * pixel_chunks, x, blocks.warps,
        x, *branches, maps, constant, y, pixels // v, pixel_chunks,
        BLOCK_O=blocks.rows, BLOCK_C=blocks.channels, BLOCK=blocks.pixels, NARROW=narrow,
        PRECISION=precision(x), **shared,
    )  # fmt: skip
    return [y, *branches, maps, means, hidden, gates]


def convolve_branches(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    """The dilated convolutions of x, without biases."""
    with full_precision(x):
        return [
            torch.convolution(x, weight, None, (1, 1), (d, d), (d, d), False, (0, 0), 1)
            for weight, d in zip(cast_each(weights, x.dtype), dilations, strict=True)
        ]
