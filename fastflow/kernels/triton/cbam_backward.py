"""Triton kernels of the backward pass of `cbam`, in five launches.

1. Products of gradient, x and gates: their sums over channels give the gradient of the spatial logits, those
   over chunks of pixels go on.
2. The convolution backward: the gradient of the pooled channels, shares of the weight's gradient, and the
   chunks of 1 joined.
3. Sums over pixels of x times the gradient that came through the pooled channels.
4. The shared layers backward: the gradients of the pooled pixels and of all weights.
5. The gradient of x.

x is read twice and its gradient written once: nothing that is as large as x is stored in between. `pixels_v`
and `*_stride_v` are in units of V elements.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out
from fastflow.kernels.triton import pool_parts
from fastflow.kernels.triton.cbam import layer_blocks
from fastflow.kernels.triton.cbam_convolution import convolution_backward
from fastflow.kernels.triton.launch import (
    kernel,
    launch,
    needs_int64_offsets,
    power_of_two,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, image_tile, locate, place_of
from fastflow.kernels.triton.pool_parts import column_tile, plane_tile, sigmoid, tile_elements
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# Samples that a program of the shared layers takes at once.
SAMPLES = 16

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _gates_bwd_kernel(
    grad_ptr, x_ptr, logits_ptr, spatial_ptr, partial_ptr, d_spatial_ptr, grad_stride_v, x_stride_v, pixels_v,
    n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The gradient of the spatial logits of a run of pixels, and its sums for each channel's logit."""
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    logit = tl.load(spatial_ptr + b * pixels + p, mask=p < pixels, other=0.0)
    spatial = sigmoid(logit)
    grad_ptr += b * grad_stride_v * V
    x_ptr += b * x_stride_v * V
    partial_ptr += (b * n_chunks + chunk) * CHANNELS
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    for start in range(0, CHANNELS, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < CHANNELS)[:, None] & (p < pixels)[None, :]
        gate = sigmoid(tl.load(logits_ptr + b * CHANNELS + c, mask=c < CHANNELS, other=0.0))
        place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(ACC)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
        product = grad * gate[:, None] * spatial[None, :] * x
        total += product
        tl.store(partial_ptr + c, tl.sum(product, axis=1), mask=c < CHANNELS)
    d_spatial = tl.sum(total, axis=0) * sigmoid(-logit)
    tl.store(d_spatial_ptr + b * pixels + p, d_spatial, mask=p < pixels)


@kernel
def _pooled_sums_kernel(
    d_pooled_ptr, x_ptr, logits_ptr, index_ptr, partial_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The sums of a chunk for each channel's logit that come through the pooled channels."""
    b, chunk, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    through = _through_pool(d_pooled_ptr, index_ptr, b, c, p, pixels, CHANNELS)
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    gate = sigmoid(tl.load(logits_ptr + b * CHANNELS + c, mask=real, other=0.0))
    total = tl.sum(x * through, axis=1) * gate
    tl.store(partial_ptr + (b * n_chunks + chunk) * CHANNELS + c, total, mask=real)


@kernel
def _through_pool(d_pooled_ptr, index_ptr, b, c, p, pixels, CHANNELS: tl.constexpr):
    """The gradient of the gated x that comes through the pooled channels."""
    d_pooled_ptr += b * (2 * pixels) + p
    mean = tl.load(d_pooled_ptr, mask=p < pixels, other=0.0) * (1.0 / CHANNELS)
    top = tl.load(d_pooled_ptr + pixels, mask=p < pixels, other=0.0)
    at = tl.load(index_ptr + b * pixels + p, mask=p < pixels, other=0)
    return mean[None, :] + tl.where(at[None, :] == c[:, None], top[None, :], 0.0)


@kernel
def _logit_gradient(
    sums_ptr, partial_ptr, logits_ptr, b, c, there, n_chunks, CHANNELS: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """The gradients of the logits of channels c of samples b, from both sums over pixels."""
    total = tl.load(sums_ptr + b * CHANNELS + c, mask=there, other=0.0)
    for chunk in range(n_chunks):
        total += tl.load(partial_ptr + (b * n_chunks + chunk) * CHANNELS + c, mask=there, other=0.0)
    logit = tl.load(logits_ptr + b * CHANNELS + c, mask=there, other=0.0)
    return total * sigmoid(-logit)


@kernel
def _sample_backward(
    program, sums_ptr, partial_ptr, logits_ptr, units_ptr, down_ptr, up_ptr, d_pooled_ptr, batch, n_chunks,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of the pooled pixels of a sample."""
    c = tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    b = tl.cast(program, tl.int64)
    grad = _logit_gradient(sums_ptr, partial_ptr, logits_ptr, b, c, real, n_chunks, CHANNELS, ACC)
    d_mean = tl.zeros((BLOCK_C,), ACC)
    d_top = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, HIDDEN, BLOCK_H):
        j = start + tl.arange(0, BLOCK_H)
        there = (j < HIDDEN)[:, None] & real[None, :]
        up = tl.load(up_ptr + c[None, :] * HIDDEN + j[:, None], mask=there, other=0.0).to(ACC)
        down = tl.load(down_ptr + j[:, None] * CHANNELS + c[None, :], mask=there, other=0.0).to(ACC)
        hidden = tl.sum(up * grad[None, :], axis=1)
        of_mean = tl.load(units_ptr + b * HIDDEN + j, mask=j < HIDDEN, other=0.0)
        of_top = tl.load(units_ptr + (batch + b) * HIDDEN + j, mask=j < HIDDEN, other=0.0)
        d_mean += tl.sum(down * tl.where(of_mean > 0, hidden, 0.0)[:, None], axis=0)
        d_top += tl.sum(down * tl.where(of_top > 0, hidden, 0.0)[:, None], axis=0)
    tl.store(d_pooled_ptr + b * CHANNELS + c, d_mean, mask=real)
    tl.store(d_pooled_ptr + (batch + b) * CHANNELS + c, d_top, mask=real)


@kernel
def _unit_backward(
    j, sums_ptr, partial_ptr, logits_ptr, pooled_ptr, units_ptr, up_ptr, d_down_ptr, d_up_ptr, batch,
    n_chunks,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, SAMPLES: tl.constexpr, BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Stores the gradients of the weights into and out of hidden unit j."""
    c = tl.arange(0, BLOCK_C)
    real = c < CHANNELS
    up = tl.load(up_ptr + c * HIDDEN + j, mask=real, other=0.0).to(ACC)
    d_down = tl.zeros((SAMPLES, BLOCK_C), ACC)
    d_up = tl.zeros((SAMPLES, BLOCK_C), ACC)
    for start in range(0, batch, SAMPLES):
        b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
        there = (b < batch)[:, None] & real[None, :]
        grad = _logit_gradient(
            sums_ptr, partial_ptr, logits_ptr, b[:, None], c[None, :], there, n_chunks, CHANNELS, ACC
        )
        hidden = tl.sum(grad * up[None, :], axis=1)
        of_mean = tl.load(units_ptr + b * HIDDEN + j, mask=b < batch, other=0.0)
        of_top = tl.load(units_ptr + (batch + b) * HIDDEN + j, mask=b < batch, other=0.0)
        unit = tl.where(of_mean < 0, 0.0, of_mean) + tl.where(of_top < 0, 0.0, of_top)
        d_up += grad * unit[:, None]
        place = b[:, None] * CHANNELS + c[None, :]
        mean = tl.load(pooled_ptr + place, mask=there, other=0.0)
        top = tl.load(pooled_ptr + batch * CHANNELS + place, mask=there, other=0.0)
        d_down += tl.where(of_mean > 0, hidden, 0.0)[:, None] * mean
        d_down += tl.where(of_top > 0, hidden, 0.0)[:, None] * top
    total = tl.sum(d_down, axis=0)
    tl.store(d_down_ptr + j * CHANNELS + c, total.to(d_down_ptr.dtype.element_ty), mask=real)
    total = tl.sum(d_up, axis=0)
    tl.store(d_up_ptr + c * HIDDEN + j, total.to(d_up_ptr.dtype.element_ty), mask=real)


@kernel
def _taps_backward(
    shares_ptr, d_weight_ptr, n_parts,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the convolution's weight, the sum of its shares."""
    t = tl.arange(0, BLOCK_T)
    d_weight = tl.zeros((BLOCK_K, BLOCK_T), ACC)
    for start in range(0, n_parts, BLOCK_K):
        k = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_K)
        there = (k < n_parts)[:, None] & (t < TAPS)[None, :]
        d_weight += tl.load(shares_ptr + k[:, None] * TAPS + t[None, :], mask=there, other=0.0)
    total = tl.sum(d_weight, axis=0)
    tl.store(d_weight_ptr + t, total.to(d_weight_ptr.dtype.element_ty), mask=t < TAPS)


@kernel
def _layers_bwd_kernel(
    sums_ptr, partial_ptr, logits_ptr, pooled_ptr, units_ptr, down_ptr, up_ptr, shares_ptr,
    d_pooled_ptr, d_down_ptr, d_up_ptr, d_weight_ptr, batch, n_chunks, n_parts,
    CHANNELS: tl.constexpr, HIDDEN: tl.constexpr, TAPS: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """A program for the pooled pixels of each sample, for the weights of each hidden unit, and for the taps.

    Sums over samples and chunks are in their order.
    """
    program = tl.program_id(0)
    if program < batch:
        _sample_backward(
            program, sums_ptr, partial_ptr, logits_ptr, units_ptr, down_ptr, up_ptr, d_pooled_ptr, batch,
            n_chunks, CHANNELS, HIDDEN, BLOCK_C, BLOCK_H, ACC,
        )  # fmt: skip
    elif program < batch + HIDDEN:
        _unit_backward(
            program - batch, sums_ptr, partial_ptr, logits_ptr, pooled_ptr, units_ptr, up_ptr, d_down_ptr,
            d_up_ptr, batch, n_chunks, CHANNELS, HIDDEN, SAMPLES, BLOCK_C, ACC,
        )  # fmt: skip
    else:
        _taps_backward(shares_ptr, d_weight_ptr, n_parts, TAPS, BLOCK_T, BLOCK_K, ACC)


@kernel
def _input_gradient_kernel(
    grad_ptr, logits_ptr, spatial_ptr, d_channels_ptr, channel_ptr, d_pixels_ptr, pixel_ptr, dx_ptr,
    batch, grad_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The gradient of x: through the gates, the pooled channels and the pooled pixels."""
    b, _, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    grad = tl.load(grad_ptr + b * grad_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    spatial = sigmoid(tl.load(spatial_ptr + b * pixels + p, mask=p < pixels, other=0.0))
    gate = sigmoid(tl.load(logits_ptr + b * CHANNELS + c, mask=real, other=0.0))
    through = _through_pool(d_channels_ptr, channel_ptr, b, c, p, pixels, CHANNELS)
    mean = tl.load(d_pixels_ptr + b * CHANNELS + c, mask=real, other=0.0) / tl.cast(pixels, ACC)
    top = tl.load(d_pixels_ptr + (batch + b) * CHANNELS + c, mask=real, other=0.0)
    at = tl.load(pixel_ptr + b * CHANNELS + c, mask=real, other=0)
    dx = (grad * spatial[None, :] + through) * gate[:, None] + mean[:, None]
    dx += tl.where(at[:, None] == p[None, :], top[:, None], 0.0)
    tl.store(dx_ptr + b * (CHANNELS * pixels) + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------


def launch_cbam_backward(
    grad: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    spatial_weight: Tensor,
    pooled_pixels: Tensor,
    first_pixel: Tensor,
    units: Tensor,
    channel_logits: Tensor,
    pooled_channels: Tensor,
    first_channel: Tensor,
    spatial_logits: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, of both shared layers and of the convolution's weight."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    dx = empty_image(x.shape, x, channels_last)
    d_down, d_up, d_weight = (
        torch.empty_like(value, memory_format=torch.contiguous_format) for value in (down, up, spatial_weight)
    )
    if x.numel() == 0:
        return dx, d_down.zero_(), d_up.zero_(), d_weight.zero_()
    x, grad = laid_out(x, channels_last), laid_out(grad, channels_last)
    down, up, spatial_weight = down.contiguous(), up.contiguous(), spatial_weight.contiguous()
    v = vector_width(pixels, x.stride(0), grad.stride(0))
    shared = {
        "V": v, "CHANNELS": channels, "ACC": triton_dtype(acc), "CHANNELS_LAST": channels_last,
        "INT64_OFFSETS": needs_int64_offsets(channels * pixels, tile_elements(acc)),
    }  # fmt: skip

    columns = column_tile(channels, pixels, acc)
    parts = torch.empty(batch, columns.chunks(pixels), channels, dtype=acc, device=x.device)
    d_spatial = torch.empty(batch, pixels, dtype=acc, device=x.device)
    launch(
        _gates_bwd_kernel, batch * parts.shape[1], x, columns.warps,
        grad, x, channel_logits, spatial_logits, parts, d_spatial,
        grad.stride(0) // v, x.stride(0) // v, pixels // v, parts.shape[1],
        BLOCK_C=columns.channels, BLOCK=columns.pixels, **shared,
    )  # fmt: skip
    d_channels, shares, sums = convolution_backward(d_spatial, pooled_channels, spatial_weight, parts, w)

    plane = plane_tile(channels, pixels, channels_last, acc, pool_parts.MAX_RUN_PIXELS)
    chunks = plane.chunks(pixels)
    through = torch.empty(batch, chunks, channels, dtype=acc, device=x.device)
    programs = batch * plane.blocks(channels) * chunks
    shared |= {"BLOCK_C": plane.channels, "BLOCK": plane.pixels}
    launch(
        _pooled_sums_kernel, programs, x, plane.warps,
        d_channels, x, channel_logits, first_channel, through, x.stride(0) // v, pixels // v, chunks,
        **shared,
    )  # fmt: skip

    d_pixels = torch.empty(2, batch, channels, dtype=acc, device=x.device)
    hidden, taps = down.shape[0], spatial_weight.numel()
    block_c, block_h, warps = layer_blocks(channels, hidden, acc)
    samples = min(SAMPLES, max(1, tile_elements(acc) // block_c))
    launch(
        _layers_bwd_kernel, batch + hidden + 1, x, max(4, warps),
        sums, through, channel_logits, pooled_pixels, units, down, up, shares,
        d_pixels, d_down, d_up, d_weight, batch, chunks, shares.shape[0],
        CHANNELS=channels, HIDDEN=hidden, TAPS=taps, SAMPLES=samples, BLOCK_C=block_c, BLOCK_H=block_h,
        BLOCK_T=power_of_two(taps), BLOCK_K=max(1, min(16, tile_elements(acc) // power_of_two(taps))),
        ACC=triton_dtype(acc),
    )  # fmt: skip
    launch(
        _input_gradient_kernel, programs, x, plane.warps,
        grad, channel_logits, spatial_logits, d_channels, first_channel, d_pixels, first_pixel, dx,
        batch, grad.stride(0) // v, pixels // v, chunks, **shared,
    )  # fmt: skip
    return dx, d_down, d_up, d_weight
