"""Triton kernels of the gradients of the atrous pyramid's weights, but for its dilated convolutions.

Sums over chunks of pixels of the result's gradient times x and the branches are the gradients of a sample's
maps; a second kernel takes them to the sample's gates and biases, a third one sums over samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.cpu.pyramid import PyramidWeights
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
from fastflow.kernels.triton.pyramid import (
    BLOCK_N,
    Blocks,
    branch_bias,
    choose_blocks,
    image_rows,
    is_narrow,
    joined,
    matrix_tile,
    multiply,
    precision,
)
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# Samples are summed in groups, which makes a sample's gradient independent of its batch.
SAMPLES = 16
# For so many pixels a program writes a matrix of sums, at most a tenth of what it reads.
MIN_CHUNK_PIXELS = 1024
# The kernel that sums over samples holds several tiles of so many channels, which fills its registers.
WEIGHTS_BLOCK = 16

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _map_sums_kernel(
    grad_ptr, x_ptr, first_ptr, second_ptr, third_ptr, d_maps_ptr, d_constant_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    NARROW: tl.constexpr, PRECISION: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of each map and of the constants, summed over a chunk of pixels."""
    columns: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    rows: tl.constexpr = (CHANNELS + BLOCK_O - 1) // BLOCK_O
    b, rest = locate(tl.program_id(0), n_chunks * rows * columns, INT64_OFFSETS)
    chunk = rest // (rows * columns)
    o = rest // columns % rows * BLOCK_O + tl.arange(0, BLOCK_O)
    i = rest % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    row, real = o < CHANNELS, i < CHANNELS
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    base = b * (CHANNELS * pixels)
    of_x = tl.zeros((BLOCK_O, BLOCK_C), ACC)
    of_first = tl.zeros((BLOCK_O, BLOCK_C), ACC)
    of_second = tl.zeros((BLOCK_O, BLOCK_C), ACC)
    of_third = tl.zeros((BLOCK_O, BLOCK_C), ACC)
    total = tl.zeros((BLOCK_O,), ACC)
    for step in tl.range(0, STEPS, num_stages=1):
        p = (chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        g = image_rows(grad_ptr + base, o, p, row, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
        total += tl.sum(g.to(ACC), axis=1)
        v = image_rows(x_ptr + base, i, p, real, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
        of_x += multiply(g, tl.trans(v), PRECISION)
        v = image_rows(first_ptr + base, i, p, real, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
        of_first += multiply(g, tl.trans(v), PRECISION)
        v = image_rows(second_ptr + base, i, p, real, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
        of_second += multiply(g, tl.trans(v), PRECISION)
        v = image_rows(third_ptr + base, i, p, real, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
        of_third += multiply(g, tl.trans(v), PRECISION)
    part = b * n_chunks + chunk
    mask = row[:, None] & real[None, :]
    ptrs = d_maps_ptr + part * (CHANNELS * 4 * CHANNELS) + o[:, None] * (4 * CHANNELS) + i[None, :]
    tl.store(ptrs, of_x, mask=mask)
    tl.store(ptrs + CHANNELS, of_first, mask=mask)
    tl.store(ptrs + 2 * CHANNELS, of_second, mask=mask)
    tl.store(ptrs + 3 * CHANNELS, of_third, mask=mask)
    if rest % columns == 0:
        tl.store(d_constant_ptr + part * CHANNELS + o, total, mask=row)


@kernel
def _joined_tile(
    sums_ptr, b, row, column, row_real, column_real, n_chunks, CHANNELS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """A tile of the maps' gradients of a sample, added up over chunks in their order."""
    total = tl.zeros((row.shape[0], column.shape[0]), ACC)
    sums_ptr += b * n_chunks * (CHANNELS * 4 * CHANNELS)
    for _ in range(n_chunks):
        total += matrix_tile(sums_ptr, row, column, row_real, column_real, 4 * CHANNELS, ACC)
        sums_ptr += CHANNELS * 4 * CHANNELS
    return total


@kernel
def _maps_bwd_kernel(
    sums_ptr, constant_sums_ptr, point_ptr, point_bias_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr,
    output_ptr, gates_ptr, d_maps_ptr, d_gated_ptr, d_constant_ptr, d_logits_ptr, d_bias_ptr, n_chunks,
    CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """For BLOCK_C columns of a sample: gradients of the gated last map, of gates' logits and of biases.

    The gradient of the map of x itself is kept too, for the weight of the undilated branch.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    b, rest = locate(tl.program_id(0), 4 * blocks, False)
    k, block = rest // blocks, rest % blocks
    lane = tl.arange(0, BLOCK_C)
    i = block * BLOCK_C + lane
    real = i < CHANNELS
    column = k * CHANNELS + i
    gate = tl.load(gates_ptr + b * (4 * CHANNELS) + column, mask=real, other=0.0)
    bias = branch_bias(point_bias_ptr, first_bias_ptr, second_bias_ptr, third_bias_ptr, k, i, real, ACC)
    d_gate = tl.zeros((BLOCK_C,), ACC)
    d_bias = tl.zeros((BLOCK_C,), ACC)
    for offset in range(0, CHANNELS, BLOCK_C):
        o = offset + lane
        row = o < CHANNELS
        grad = joined(constant_sums_ptr, b, o, row, n_chunks, CHANNELS, BLOCK_N, ACC)
        d_gated = grad[:, None] * bias[None, :]
        if k == 0:
            for from_x in range(0, CHANNELS, BLOCK_C):
                j = from_x + lane
                inside = j < CHANNELS
                d_map = _joined_tile(sums_ptr, b, o, j, row, inside, n_chunks, CHANNELS, ACC)
                point = matrix_tile(point_ptr, i, j, real, inside, CHANNELS, ACC)
                d_gated += multiply(d_map, tl.trans(point), PRECISION)
                if block == 0:
                    ptrs = d_maps_ptr + b * (CHANNELS * CHANNELS) + o[:, None] * CHANNELS + j[None, :]
                    tl.store(ptrs, d_map, mask=row[:, None] & inside[None, :])
        else:
            d_gated += _joined_tile(sums_ptr, b, o, column, row, real, n_chunks, CHANNELS, ACC)
        if rest == 0:
            tl.store(d_constant_ptr + b * CHANNELS + o, grad, mask=row)
        ptrs = d_gated_ptr + b * (CHANNELS * 4 * CHANNELS) + o[:, None] * (4 * CHANNELS) + column[None, :]
        tl.store(ptrs, d_gated, mask=row[:, None] & real[None, :])
        output = matrix_tile(output_ptr, o, column, row, real, 4 * CHANNELS, ACC)
        d_gate += tl.sum(output * d_gated, axis=0)
        d_bias += tl.sum(output * grad[:, None], axis=0) * gate
    place = b * (4 * CHANNELS) + column
    tl.store(d_logits_ptr + place, d_gate * gate * (1.0 - gate), mask=real)
    tl.store(d_bias_ptr + place, d_bias, mask=real)


@kernel
def _hidden_gradients(
    d_logits_ptr, up_ptr, hidden_ptr, b, exists, h, channels, CHANNELS: tl.constexpr, HIDDEN: tl.constexpr,
    SAMPLES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """(samples, h): the gradients of the hidden values before their rectifier."""
    total = tl.zeros((SAMPLES, BLOCK_H), ACC)
    for start in tl.range(0, 4 * channels, BLOCK_C, num_stages=1):
        column = start + tl.arange(0, BLOCK_C)
        real = column < 4 * CHANNELS
        d_logits = matrix_tile(d_logits_ptr, b, column, exists, real, 4 * CHANNELS, ACC)
        up = matrix_tile(up_ptr, column, h, real, h < HIDDEN, HIDDEN, ACC)
        total += multiply(d_logits, up, PRECISION)
    hidden = matrix_tile(hidden_ptr, b, h, exists, h < HIDDEN, HIDDEN, ACC)
    return tl.where(hidden > 0, total, 0.0)


@kernel
def _weights_bwd_kernel(
    d_maps_ptr, d_gated_ptr, d_constant_ptr, d_logits_ptr, d_bias_ptr, means_ptr, hidden_ptr, gates_ptr,
    point_ptr, down_ptr, up_ptr, output_ptr, d_means_ptr, d_point_ptr, d_point_bias_ptr, d_first_bias_ptr,
    d_second_bias_ptr, d_third_bias_ptr, d_down_ptr, d_down_bias_ptr, d_up_ptr, d_up_bias_ptr, d_output_ptr,
    d_output_bias_ptr, batch, pixels, channels,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    SAMPLES: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over samples: a tile of the last map's gradient, and what belongs to its rows or columns.

    Programs of branch 0 take as many rows of x for the undilated branch; those of the first rows take what
    belongs to columns alone, which is all of the gates' layers, biases, and the gradients of the means. Loops
    end at the argument `channels`: the compiler would unroll constant ones, and run out of registers.
    """
    blocks: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    k, block, rows = pid // (blocks * blocks), pid // blocks % blocks, pid % blocks
    lane = tl.arange(0, BLOCK_C)
    i, o = block * BLOCK_C + lane, rows * BLOCK_C + lane
    real, row = i < CHANNELS, o < CHANNELS
    column = k * CHANNELS + i
    h = tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    d_output = tl.zeros((BLOCK_C, BLOCK_C), ACC)
    d_constant = tl.zeros((BLOCK_C,), ACC)
    for sample in tl.range(0, batch, num_stages=1):
        b = tl.cast(sample, tl.int64)
        gate = tl.load(gates_ptr + b * (4 * CHANNELS) + column, mask=real, other=0.0)
        ptr = d_gated_ptr + b * (CHANNELS * 4 * CHANNELS)
        d_output += matrix_tile(ptr, o, column, row, real, 4 * CHANNELS, ACC) * gate[None, :]
        d_constant += tl.load(d_constant_ptr + b * CHANNELS + o, mask=row, other=0.0)
    place = o[:, None] * (4 * CHANNELS) + column[None, :]
    stored = row[:, None] & real[None, :]
    tl.store(d_output_ptr + place, d_output.to(d_output_ptr.dtype.element_ty), mask=stored)
    if k + block == 0:
        tl.store(d_output_bias_ptr + o, d_constant.to(d_output_bias_ptr.dtype.element_ty), mask=row)
    d_point = tl.zeros((BLOCK_C, BLOCK_C), ACC)
    if k == 0:
        for sample in tl.range(0, batch, num_stages=1):
            b = tl.cast(sample, tl.int64)
            gate = tl.load(gates_ptr + b * (4 * CHANNELS) + column, mask=real, other=0.0)
            for offset in tl.range(0, channels, BLOCK_C, num_stages=1):
                c = offset + lane
                gated = matrix_tile(output_ptr, c, i, c < CHANNELS, real, 4 * CHANNELS, ACC) * gate[None, :]
                ptr = d_maps_ptr + b * (CHANNELS * CHANNELS)
                d_map = matrix_tile(ptr, c, o, c < CHANNELS, row, CHANNELS, ACC)
                d_point += multiply(tl.trans(gated), d_map, PRECISION)
    if (k == 0) | (rows == 0):
        d_up = tl.zeros((BLOCK_C, BLOCK_H), ACC)
        d_down = tl.zeros((BLOCK_C, BLOCK_H), ACC)
        d_up_bias = tl.zeros((BLOCK_C,), ACC)
        d_bias = tl.zeros((BLOCK_C,), ACC)
        d_down_bias = tl.zeros((BLOCK_H,), ACC)
        for start in tl.range(0, batch, SAMPLES, num_stages=1):
            b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
            exists = b < batch
            d_logits = matrix_tile(d_logits_ptr, b, column, exists, real, 4 * CHANNELS, ACC)
            hidden = matrix_tile(hidden_ptr, b, h, exists, inside, HIDDEN, ACC)
            d_up += multiply(tl.trans(d_logits), hidden, PRECISION)
            d_up_bias += tl.sum(d_logits, axis=0)
            d_hidden = _hidden_gradients(
                d_logits_ptr, up_ptr, hidden_ptr, b, exists, h, channels, CHANNELS, HIDDEN, SAMPLES, BLOCK_H,
                BLOCK_C, ACC, PRECISION,
            )  # fmt: skip
            down = matrix_tile(down_ptr, h, column, inside, real, 4 * CHANNELS, ACC)
            d_mean = multiply(d_hidden, down, PRECISION)
            mean = matrix_tile(means_ptr, b, column, exists, real, 5 * CHANNELS, ACC)
            d_down += multiply(tl.trans(mean), d_hidden, PRECISION)
            d_down_bias += tl.sum(d_hidden, axis=0)
            d_bias += tl.sum(
                d_mean + matrix_tile(d_bias_ptr, b, column, exists, real, 4 * CHANNELS, ACC), axis=0
            )
            if k == 0:
                of_x = matrix_tile(means_ptr, b, 4 * CHANNELS + o, exists, row, 5 * CHANNELS, ACC)
                d_point += multiply(tl.trans(d_mean), of_x, PRECISION)
                if rows == 0:
                    # The mean of x has its gradient by way of all channels of the undilated branch.
                    d_mean = tl.zeros((SAMPLES, BLOCK_C), ACC)
                    for offset in tl.range(0, channels, BLOCK_C, num_stages=1):
                        c = offset + lane
                        down = matrix_tile(down_ptr, h, c, inside, c < CHANNELS, 4 * CHANNELS, ACC)
                        point = matrix_tile(point_ptr, c, i, c < CHANNELS, real, CHANNELS, ACC)
                        d_mean += multiply(multiply(d_hidden, down, PRECISION), point, PRECISION)
            if rows == 0:
                of_sample = b[:, None] * (4 * CHANNELS) + column[None, :]
                tl.store(d_means_ptr + of_sample, d_mean / pixels, mask=exists[:, None] & real[None, :])
        if k == 0:
            square = i[:, None] * CHANNELS + o[None, :]
            d_point = d_point.to(d_point_ptr.dtype.element_ty)
            tl.store(d_point_ptr + square, d_point, mask=real[:, None] & row[None, :])
        if rows == 0:
            layer = real[:, None] & inside[None, :]
            of_up = column[:, None] * HIDDEN + h[None, :]
            tl.store(d_up_ptr + of_up, d_up.to(d_up_ptr.dtype.element_ty), mask=layer)
            of_down = h[None, :] * (4 * CHANNELS) + column[:, None]
            tl.store(d_down_ptr + of_down, d_down.to(d_down_ptr.dtype.element_ty), mask=layer)
            tl.store(d_up_bias_ptr + column, d_up_bias.to(d_up_bias_ptr.dtype.element_ty), mask=real)
            narrowed = d_bias.to(d_point_bias_ptr.dtype.element_ty)
            tl.store(d_point_bias_ptr + i, narrowed, mask=real & (k == 0))
            tl.store(d_first_bias_ptr + i, narrowed, mask=real & (k == 1))
            tl.store(d_second_bias_ptr + i, narrowed, mask=real & (k == 2))
            tl.store(d_third_bias_ptr + i, narrowed, mask=real & (k == 3))
            if k + block == 0:
                tl.store(d_down_bias_ptr + h, d_down_bias.to(d_down_bias_ptr.dtype.element_ty), mask=inside)


# -- launchers ----------------------------------------------------------------------------------------------

_SUMS = {"narrow": Blocks(32, 32, 32, 8), "float32": Blocks(32, 16, 32, 8), "float64": Blocks(16, 16, 16, 4)}


class MapGradients(NamedTuple):
    """Gradients of maps and constants, summed over chunks of pixels.

    Attributes:
        maps: (B, chunks, C, 4C) of x and of the branches.
        constants: (B, chunks, C).
    """

    maps: Tensor
    constants: Tensor


def launch_map_sums(grad: Tensor, x: Tensor, branches: Sequence[Tensor], channels_last: bool) -> MapGradients:
    """The gradients of the maps of x and of the branches; all images are dense in the layout."""
    acc, narrow = acc_dtype(x.dtype), is_narrow(x)
    batch, channels, height, width = x.shape
    pixels = height * width
    v, blocks = vector_width(pixels), choose_blocks(_SUMS, channels, narrow, acc)
    steps = cdiv(min(pixels, max(MIN_CHUNK_PIXELS, 8 * channels)), blocks.pixels)
    chunks = cdiv(pixels, steps * blocks.pixels)
    sums = MapGradients(
        x.new_empty(batch, chunks, channels, 4 * channels, dtype=acc),
        x.new_empty(batch, chunks, channels, dtype=acc),
    )
    tiles = cdiv(channels, blocks.rows) * cdiv(channels, blocks.channels)
    launch(
        _map_sums_kernel, batch * chunks * tiles, x, blocks.warps,
        grad, x, *branches, *sums, pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_O=blocks.rows, BLOCK_C=blocks.channels, BLOCK=blocks.pixels,
        STEPS=steps, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last, NARROW=narrow,
        PRECISION=precision(x),
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, channels * blocks.pixels * steps),
    )  # fmt: skip
    return sums


def launch_weights_backward(
    sums: MapGradients, kept: Sequence[Tensor], weights: PyramidWeights, into: PyramidWeights, pixels: int
) -> Tensor:
    """Fill the gradients `into`, but for dilated weights; returns those of the means over pixels (B, 4C)."""
    means, hidden, gates = kept
    batch, chunks, channels, _ = sums.maps.shape
    acc = sums.maps.dtype
    block = 16 if acc == torch.float64 else min(32, max(16, power_of_two(channels)))
    blocks = cdiv(channels, block)
    d_maps, d_gated = (
        sums.maps.new_empty(batch, channels, channels),
        sums.maps.new_empty(sums.maps[:, 0].shape),
    )
    d_constant = sums.maps.new_empty(batch, channels)
    d_logits, d_bias, d_means = (sums.maps.new_empty(batch, 4 * channels) for _ in range(3))
    shared = {"CHANNELS": channels, "ACC": triton_dtype(acc), "PRECISION": "ieee"}
    biases = [bias.contiguous() for _, bias in (weights.point, *weights.dilated)]
    point, down, up, output = (
        layer[0].contiguous() for layer in (weights.point, weights.down, weights.up, weights.output)
    )
    launch(
        _maps_bwd_kernel, batch * 4 * blocks, means, 4,
        *sums, point, *biases, output, gates, d_maps, d_gated, d_constant, d_logits, d_bias, chunks,
        BLOCK_C=block, BLOCK_N=min(BLOCK_N, power_of_two(chunks)), **shared,
    )  # fmt: skip
    launch(
        _weights_bwd_kernel, 4 * cdiv(channels, WEIGHTS_BLOCK) ** 2, means, 8,
        d_maps, d_gated, d_constant, d_logits, d_bias, means, hidden, gates, point, down, up, output, d_means,
        *into.point, *(bias for _, bias in into.dilated), *into.down, *into.up, *into.output, batch, pixels,
        channels,
        HIDDEN=hidden.shape[1], BLOCK_H=max(16, power_of_two(hidden.shape[1])), BLOCK_C=WEIGHTS_BLOCK,
        SAMPLES=SAMPLES, **shared,
    )  # fmt: skip
    return d_means
