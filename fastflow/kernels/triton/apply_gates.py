"""Triton kernels of `apply_gates`: a gate per channel and a gate per pixel.

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
from fastflow.kernels.triton.pool_parts import column_tile, join_logits, plane_tile, sigmoid
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _apply_gates_kernel(
    x_ptr, channel_ptr, spatial_ptr, y_ptr, x_stride_v, spatial_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, _, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    gate = sigmoid(tl.load(channel_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC))
    spatial = sigmoid(tl.load(spatial_ptr + b * spatial_stride_v * V + p, mask=p < pixels, other=0.0).to(ACC))
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    y = x * gate[:, None] * spatial[None, :]
    tl.store(y_ptr + b * (CHANNELS * pixels) + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def _apply_gates_bwd_kernel(
    grad_ptr, x_ptr, channel_ptr, spatial_ptr, dx_ptr, partial_ptr, d_channel_ptr, d_spatial_ptr,
    grad_stride_v, x_stride_v, spatial_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """All channels of a run of pixels, so that the sum over channels is whole."""
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    spatial_logit = tl.load(spatial_ptr + b * spatial_stride_v * V + p, mask=p < pixels, other=0.0).to(ACC)
    spatial = sigmoid(spatial_logit)
    grad_ptr += b * grad_stride_v * V
    x_ptr += b * x_stride_v * V
    dx_ptr += b * (CHANNELS * pixels)
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        real = c < CHANNELS
        inside = real[:, None] & (p < pixels)[None, :]
        place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
        logit = tl.load(channel_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(ACC)
        dx = grad * sigmoid(logit)[:, None] * spatial[None, :]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        product = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC) * dx
        total += product
        if SPLIT:
            tl.store(partial_ptr + (b * n_chunks + chunk) * CHANNELS + c, tl.sum(product, axis=1), mask=real)
        else:
            d_channel = (tl.sum(product, axis=1) * sigmoid(-logit)).to(d_channel_ptr.dtype.element_ty)
            tl.store(d_channel_ptr + b * CHANNELS + c, d_channel, mask=real)
    d_spatial = tl.sum(total, axis=0) * sigmoid(-spatial_logit)
    tl.store(d_spatial_ptr + b * pixels + p, d_spatial.to(d_spatial_ptr.dtype.element_ty), mask=p < pixels)


# -- launchers ---------------------------------------------------------------------------------------------


def launch_apply_gates(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    """See `fastflow.kernels.apply_gates`."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    y = empty_image(x.shape, x, channels_last)
    if x.numel() == 0:
        return y
    x, spatial_logits = laid_out(x, channels_last), laid_out(spatial_logits, False)
    strides = (x.stride(0), spatial_logits.stride(0))
    v = vector_width(pixels, *strides)
    tile = plane_tile(channels, pixels, channels_last, acc, pool_parts.MAX_RUN_PIXELS)
    chunks = tile.chunks(pixels)
    launch(
        _apply_gates_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        x, channel_logits.contiguous(), spatial_logits, y,
        *(stride // v for stride in strides), pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, pool_parts.TILE_ELEMENTS),
    )  # fmt: skip
    return y


def launch_apply_gates_backward(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and of both logits."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    dx = empty_image(x.shape, x, channels_last)
    d_channel = torch.empty(batch, channels, dtype=channel_logits.dtype, device=x.device)
    d_spatial = torch.empty(batch, 1, h, w, dtype=spatial_logits.dtype, device=x.device)
    if x.numel() == 0:
        return dx, d_channel, d_spatial
    grad, x = laid_out(grad, channels_last), laid_out(x, channels_last)
    channel_logits, spatial_logits = channel_logits.contiguous(), laid_out(spatial_logits, False)
    strides = (grad.stride(0), x.stride(0), spatial_logits.stride(0))
    tile, v = column_tile(channels, pixels, acc), vector_width(pixels, *strides)
    chunks = tile.chunks(pixels)
    partial = torch.empty(batch, chunks, channels, dtype=acc, device=x.device) if chunks > 1 else None
    launch(
        _apply_gates_bwd_kernel, batch * chunks, x, tile.warps,
        grad, x, channel_logits, spatial_logits, dx, partial, d_channel, d_spatial,
        *(stride // v for stride in strides), pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, SPLIT=chunks > 1,
        INT64_OFFSETS=needs_int64_offsets(channels * pixels, pool_parts.TILE_ELEMENTS),
    )  # fmt: skip
    join_logits(partial, channel_logits, d_channel)
    return dx, d_channel, d_spatial
