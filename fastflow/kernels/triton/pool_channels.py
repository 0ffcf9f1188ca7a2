"""Triton kernels of `pool_channels`: mean and max over the gated channels of each pixel.

`pixels_v` and `*_stride_v` are in units of V elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.kernels.triton import pool_parts
from fastflow.kernels.triton.launch import kernel, launch, needs_int64_offsets, triton_dtype, vector_width
from fastflow.kernels.triton.parts import elements, image_tile, locate, place_of
from fastflow.kernels.triton.pool_parts import (
    column_tile,
    join_logits,
    places_of_top,
    plane_tile,
    rank_of,
    sigmoid,
    value_of,
)
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _pool_channels_kernel(
    x_ptr, logits_ptr, pooled_ptr, index_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    x_ptr += b * x_stride_v * V
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    rank = rank_of(tl.full((BLOCK_C, BLOCK), float("-inf"), ACC))
    at = tl.zeros((BLOCK_C, BLOCK), tl.int32) + tl.arange(0, BLOCK_C)[:, None]
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < CHANNELS)[:, None] & (p < pixels)[None, :]
        gate = sigmoid(tl.load(logits_ptr + b * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(ACC))
        place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC) * gate[:, None]
        total += x
        here = rank_of(tl.where(inside, x, float("-inf")))
        if INDEX:
            at = tl.where(here > rank, c[:, None], at)
        rank = tl.maximum(rank, here)
    pooled_ptr += b * (2 * pixels) + p
    top = tl.max(rank, axis=0)
    mean = tl.sum(total, axis=0) * (1.0 / CHANNELS)
    tl.store(pooled_ptr, mean.to(pooled_ptr.dtype.element_ty), mask=p < pixels)
    tl.store(pooled_ptr + pixels, value_of(top, ACC).to(pooled_ptr.dtype.element_ty), mask=p < pixels)
    if INDEX:
        first = tl.min(places_of_top(rank, at, top[None, :]), axis=0)
        tl.store(index_ptr + b * pixels + p, first, mask=p < pixels)


@kernel
def _pool_channels_bwd_kernel(
    grad_ptr, x_ptr, logits_ptr, index_ptr, passed_ptr, dx_ptr, partial_ptr, d_logits_ptr,
    grad_stride_v, x_stride_v, passed_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PASSED: tl.constexpr, SPLIT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, chunk, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    grad_ptr += b * grad_stride_v * V + p
    mean = tl.load(grad_ptr, mask=p < pixels, other=0.0).to(ACC) * (1.0 / CHANNELS)
    top = tl.load(grad_ptr + pixels, mask=p < pixels, other=0.0).to(ACC)
    at = tl.load(index_ptr + b * pixels + p, mask=p < pixels, other=0)
    logit = tl.load(logits_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    dx = (mean[None, :] + tl.where(at[None, :] == c[:, None], top[None, :], 0.0)) * sigmoid(logit)[:, None]
    product = tl.sum(x * dx, axis=1)
    if SPLIT:
        tl.store(partial_ptr + (b * n_chunks + chunk) * CHANNELS + c, product, mask=real)
    else:
        d_logits = product * sigmoid(-logit)
        tl.store(d_logits_ptr + b * CHANNELS + c, d_logits.to(d_logits_ptr.dtype.element_ty), mask=real)
    if PASSED:
        dx += tl.load(passed_ptr + b * passed_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    tl.store(dx_ptr + b * (CHANNELS * pixels) + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# -- launchers ---------------------------------------------------------------------------------------------


def launch_pool_channels(x: Tensor, channel_logits: Tensor, index: bool) -> tuple[Tensor, Tensor]:
    """(mean and max (B, 2, H, W), with `index` the channel of the first maximum (B, H, W))."""
    channels_last = is_channels_last(x)
    batch, _, h, w = x.shape
    pooled = torch.empty(batch, 2, h, w, dtype=x.dtype, device=x.device)
    first = torch.empty((batch, h, w) if index else 0, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return pooled, first
    x, where = laid_out(x, channels_last), first if index else None
    pool_gated_channels(x, channel_logits.contiguous(), pooled, where, channels_last)
    return pooled, first


def pool_gated_channels(
    x: Tensor, channel_logits: Tensor, pooled: Tensor, first: Tensor | None, channels_last: bool
) -> None:
    """Fill `pooled` (B, 2, H, W) and, where it is needed, `first` (B, H, W); `x` lies in the layout."""
    acc = acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    tile, v = column_tile(channels, pixels, acc), vector_width(pixels, x.stride(0))
    chunks = tile.chunks(pixels)
    launch(
        _pool_channels_kernel, batch * chunks, x, tile.warps,
        x, channel_logits, pooled, first, x.stride(0) // v, pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, INDEX=first is not None,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, pool_parts.TILE_ELEMENTS),
    )  # fmt: skip


def launch_pool_channels_backward(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the logits; `passed` is that of the handed-on x, where it was used."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    dx = empty_image(x.shape, x, channels_last)
    d_logits = torch.empty(batch, channels, dtype=channel_logits.dtype, device=x.device)
    if x.numel() == 0:
        return dx, d_logits
    grad, x, channel_logits = laid_out(grad, False), laid_out(x, channels_last), channel_logits.contiguous()
    passed = None if passed is None else laid_out(passed, channels_last)
    strides = (grad.stride(0), x.stride(0), x.stride(0) if passed is None else passed.stride(0))
    v = vector_width(pixels, *strides)
    tile = plane_tile(channels, pixels, channels_last, acc, pool_parts.MAX_RUN_PIXELS)
    chunks = tile.chunks(pixels)
    partial = torch.empty(batch, chunks, channels, dtype=acc, device=x.device) if chunks > 1 else None
    launch(
        _pool_channels_bwd_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        grad, x, channel_logits, index, passed, dx, partial, d_logits,
        *(stride // v for stride in strides), pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, PASSED=passed is not None, SPLIT=chunks > 1,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, pool_parts.TILE_ELEMENTS),
    )  # fmt: skip
    join_logits(partial, channel_logits, d_logits)
    return dx, d_logits
