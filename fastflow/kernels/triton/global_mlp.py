"""Triton kernels of the global contexts: sums over chunks of pixels, the MLP of a sample, its use.

Backward, the MLP's kernel takes some channels of all samples, so that its sums over samples need no second
stage. `pixels_v` is in units of V elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last
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
from fastflow.kernels.triton.norm_parts import gelu, gelu_slope
from fastflow.kernels.triton.parts import image_tile
from fastflow.kernels.triton.pool_parts import plane_tile, sigmoid
from fastflow.kernels.triton.pyramid import BLOCK_N, dense, joined, matrix_tile, multiply
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# Samples are summed in groups, which makes a sample's gradient independent of its batch.
SAMPLES = 16
# Channels and hidden values whose gradients a program computes; a product has no fewer.
BLOCK_C = BLOCK_H = 16

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _context_sums_kernel(
    x_ptr, factor_ptr, sums_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PRODUCT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Sums over a chunk of pixels of x; PRODUCT: of x times another image."""
    b, chunk, pixels, c, _, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    base = b * (CHANNELS * pixels)
    x = tl.load(x_ptr + base + place, mask=inside, other=0.0).to(ACC)
    if PRODUCT:
        x *= tl.load(factor_ptr + base + place, mask=inside, other=0.0).to(ACC)
    tl.store(sums_ptr + (b * n_chunks + chunk) * CHANNELS + c, tl.sum(x, axis=1), mask=real)


@kernel
def _context_kernel(
    sums_ptr, down_ptr, down_bias_ptr, up_ptr, up_bias_ptr, mean_ptr, hidden_ptr, context_ptr, pixels,
    n_chunks,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The MLP of a sample's means; the hidden values are kept as they are before their activation."""
    b = tl.cast(tl.program_id(0), tl.int64)
    h = tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    hidden = tl.zeros((BLOCK_H,), ACC)
    if not GATED:
        hidden += tl.load(down_bias_ptr + h, mask=inside, other=0.0).to(ACC)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        real = c < CHANNELS
        mean = joined(sums_ptr, b, c, real, n_chunks, CHANNELS, BLOCK_N, ACC) / pixels
        tl.store(mean_ptr + b * CHANNELS + c, mean, mask=real)
        down = matrix_tile(down_ptr, h, c, inside, real, CHANNELS, ACC)
        hidden += tl.sum(down * mean[None, :], axis=1)
    tl.store(hidden_ptr + b * HIDDEN + h, hidden, mask=inside)
    active = tl.where(hidden < 0, 0.0, hidden) if GATED else gelu(hidden)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        real = c < CHANNELS
        context = tl.sum(matrix_tile(up_ptr, c, h, real, inside, HIDDEN, ACC) * active[None, :], axis=1)
        if not GATED:
            context += tl.load(up_bias_ptr + c, mask=real, other=0.0).to(ACC)
        tl.store(context_ptr + b * CHANNELS + c, context, mask=real)


@kernel
def _context_apply_kernel(
    x_ptr, context_ptr, d_mean_ptr, out_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GATED: tl.constexpr, PARTS: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """x with its context; with PARTS of the mean's gradient: the gradient of x from that of the result."""
    b, _, pixels, c, _, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    place += b * (CHANNELS * pixels)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
    if GATED:
        context = tl.load(context_ptr + b * CHANNELS + c, mask=real, other=0.0)
        x *= (1.0 + sigmoid(context))[:, None]
    for part in tl.static_range(PARTS):
        x += tl.load(d_mean_ptr + (b * PARTS + part) * CHANNELS + c, mask=real, other=0.0)[:, None]
    if not GATED and PARTS == 0:
        x += tl.load(context_ptr + b * CHANNELS + c, mask=real, other=0.0)[:, None]
    tl.store(out_ptr + place, x.to(out_ptr.dtype.element_ty), mask=inside)


@kernel
def _context_gradients(
    sums_ptr, context_ptr, b, c, exists, real, n_chunks, CHANNELS: tl.constexpr, ACC: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """(samples, channels): the gradients of the context, the sums added up over chunks in their order."""
    total = tl.zeros((b.shape[0], c.shape[0]), ACC)
    for n in range(n_chunks):
        total += matrix_tile(sums_ptr, b * n_chunks + n, c, exists, real, CHANNELS, ACC)
    if GATED:
        context = matrix_tile(context_ptr, b, c, exists, real, CHANNELS, ACC)
        total *= sigmoid(context) * sigmoid(-context)
    return total


@kernel
def _context_bwd_kernel(
    sums_ptr, mean_ptr, hidden_ptr, context_ptr, down_ptr, up_ptr, d_mean_ptr, d_down_ptr, d_down_bias_ptr,
    d_up_ptr, d_up_bias_ptr, batch, pixels, channels, n_chunks,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr, SAMPLES: tl.constexpr, ACC: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The part of the MLP's gradients that BLOCK_C channels and BLOCK_H hidden values have.

    The gradients of the means over pixels come in PARTS, one of each block of hidden values.
    """
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    h = part * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < HIDDEN
    d_up = tl.zeros((BLOCK_C, BLOCK_H), ACC)
    d_down = tl.zeros((BLOCK_C, BLOCK_H), ACC)
    d_up_bias = tl.zeros((BLOCK_C,), ACC)
    d_down_bias = tl.zeros((BLOCK_H,), ACC)
    for start in tl.range(0, batch, SAMPLES, num_stages=1):
        b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
        exists = b < batch
        d_active = tl.zeros((SAMPLES, BLOCK_H), ACC)
        # The end is an argument, since the compiler would unroll a constant loop and run out of registers.
        for offset in tl.range(0, channels, BLOCK_C, num_stages=1):
            i = offset + tl.arange(0, BLOCK_C)
            grad = _context_gradients(
                sums_ptr, context_ptr, b, i, exists, i < CHANNELS, n_chunks, CHANNELS, ACC, GATED
            )
            up = matrix_tile(up_ptr, i, h, i < CHANNELS, inside, HIDDEN, ACC)
            d_active += multiply(grad, up, "ieee")
        hidden = matrix_tile(hidden_ptr, b, h, exists, inside, HIDDEN, ACC)
        if GATED:
            active = tl.where(hidden < 0, 0.0, hidden)
            d_hidden = tl.where(hidden > 0, d_active, 0.0)
        else:
            active = gelu(hidden)
            d_hidden = d_active * gelu_slope(hidden)
        grad = _context_gradients(
            sums_ptr, context_ptr, b, c, exists, real, n_chunks, CHANNELS, ACC, GATED
        )  # fmt: skip
        d_up += multiply(tl.trans(grad), active, "ieee")
        d_up_bias += tl.sum(grad, axis=0)
        mean = matrix_tile(mean_ptr, b, c, exists, real, CHANNELS, ACC)
        d_down += multiply(tl.trans(mean), d_hidden, "ieee")
        d_down_bias += tl.sum(d_hidden, axis=0)
        down = matrix_tile(down_ptr, h, c, inside, real, CHANNELS, ACC)
        d_mean = multiply(d_hidden, down, "ieee") / pixels
        ptrs = d_mean_ptr + (b * PARTS + part)[:, None] * CHANNELS + c[None, :]
        tl.store(ptrs, d_mean, mask=exists[:, None] & real[None, :])
    layer = real[:, None] & inside[None, :]
    of_up = c[:, None] * HIDDEN + h[None, :]
    tl.store(d_up_ptr + of_up, d_up.to(d_up_ptr.dtype.element_ty), mask=layer)
    of_down = h[None, :] * CHANNELS + c[:, None]
    tl.store(d_down_ptr + of_down, d_down.to(d_down_ptr.dtype.element_ty), mask=layer)
    if not GATED:
        tl.store(d_up_bias_ptr + c, d_up_bias.to(d_up_bias_ptr.dtype.element_ty), mask=real & (part == 0))
        if block == 0:
            tl.store(d_down_bias_ptr + h, d_down_bias.to(d_down_bias_ptr.dtype.element_ty), mask=inside)


# -- launchers ----------------------------------------------------------------------------------------------


class _Images:
    """How kernels take the images of an op: their tiles, and the arguments that they share."""

    def __init__(self, x: Tensor) -> None:
        self.channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
        self.batch, self.channels = x.shape[:2]
        self.pixels = x.shape[2] * x.shape[3]
        self.tile = plane_tile(self.channels, self.pixels, self.channels_last, acc, pool_parts.MAX_RUN_PIXELS)
        self.chunks, v = self.tile.chunks(self.pixels), vector_width(self.pixels)
        self.programs = self.batch * self.tile.blocks(self.channels) * self.chunks
        self.sizes = self.pixels // v, self.chunks
        self.shared = {
            "V": v, "CHANNELS": self.channels, "BLOCK_C": self.tile.channels, "BLOCK": self.tile.pixels,
            "ACC": triton_dtype(acc), "CHANNELS_LAST": self.channels_last,
            "INT64_OFFSETS": needs_int64_offsets(self.channels * self.pixels, pool_parts.TILE_ELEMENTS),
        }  # fmt: skip

    def sums(self, x: Tensor, factor: Tensor | None) -> Tensor:
        """(B, chunks, C): sums of x, or of its products with another image."""
        sums = x.new_empty(self.batch, self.chunks, self.channels, dtype=acc_dtype(x.dtype))
        launch(
            _context_sums_kernel, self.programs, x, self.tile.warps, x, factor, sums, *self.sizes,
            PRODUCT=factor is not None, **self.shared,
        )  # fmt: skip
        return sums


def _layers(weights: Sequence[Tensor], gated: bool) -> list[Tensor | None]:
    """The first layer and its bias, the second one and its bias; gates have no biases."""
    return [weights[0], None, weights[1], None] if gated else list(weights)


def launch_global_mlp(x: Tensor, weights: Sequence[Tensor], gated: bool) -> list[Tensor]:
    """The result, and for the backward pass the means (B, C), hidden values (B, h) and contexts (B, C)."""
    acc, hidden_size = acc_dtype(x.dtype), weights[0].shape[0]
    batch, channels = x.shape[:2]
    y = empty_image(x.shape, x, is_channels_last(x))
    mean, hidden, context = (
        x.new_empty(batch, size, dtype=acc) for size in (channels, hidden_size, channels)
    )
    if x.numel() == 0:
        return [y, mean, hidden, context]
    images = _Images(x)
    x = dense(x, images.channels_last)
    launch(
        _context_kernel, batch, x, 4,
        images.sums(x, None), *_layers([weight.contiguous() for weight in weights], gated), mean, hidden,
        context, images.pixels, images.chunks,
        CHANNELS=channels, HIDDEN=hidden_size, BLOCK_H=power_of_two(hidden_size),
        BLOCK_C=min(32, power_of_two(channels)), BLOCK_N=min(BLOCK_N, power_of_two(images.chunks)),
        ACC=triton_dtype(acc), GATED=gated,
    )  # fmt: skip
    launch(
        _context_apply_kernel, images.programs, x, images.tile.warps, x, context, None, y, *images.sizes,
        GATED=gated, PARTS=0, **images.shared,
    )  # fmt: skip
    return [y, mean, hidden, context]


def launch_global_mlp_backward(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor], gated: bool
) -> list[Tensor]:
    """The gradients of x and of the weights; `kept` is what the forward pass gave beside its result."""
    acc, hidden_size = acc_dtype(x.dtype), weights[0].shape[0]
    batch, channels = x.shape[:2]
    d_x = empty_image(x.shape, x, is_channels_last(x))
    d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    if x.numel() == 0:
        return [d_x, *(d_weight.zero_() for d_weight in d_weights)]
    images = _Images(x)
    grad, x = dense(grad, images.channels_last), dense(x, images.channels_last)
    parts = cdiv(hidden_size, BLOCK_H)
    sums, d_mean = images.sums(grad, x if gated else None), x.new_empty(batch, parts, channels, dtype=acc)
    down, _, up, _ = _layers([weight.contiguous() for weight in weights], gated)
    launch(
        _context_bwd_kernel, cdiv(channels, BLOCK_C) * parts, x, 8,
        sums, *kept, down, up, d_mean, *_layers(d_weights, gated), batch, images.pixels, channels,
        images.chunks,
        CHANNELS=channels, HIDDEN=hidden_size, BLOCK_H=BLOCK_H, BLOCK_C=BLOCK_C, PARTS=parts, SAMPLES=SAMPLES,
        ACC=triton_dtype(acc), GATED=gated,
    )  # fmt: skip
    launch(
        _context_apply_kernel, images.programs, x, images.tile.warps, grad, kept[2], d_mean, d_x,
        *images.sizes, GATED=gated, PARTS=parts, **images.shared,
    )  # fmt: skip
    return [d_x, *d_weights]
