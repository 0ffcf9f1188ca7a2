"""Triton kernels of the backward pass of `norm_film_act`.

A group that fits a program is read once. For a larger one, sums of chunks come first, then their means over
the group, then the gradients. The gradients of the tables are sums over samples, in the order of the batch.
`pixels_v` and `*_stride_v` are in units of V elements; `sums` hold two numbers each, those of the gradient
times the normalised values and those of the gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.dropout import drop_threshold
from fastflow.kernels.layouts import empty_image, is_channels_last
from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    power_of_two,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.norm_parts import (
    Modulation,
    by_label,
    dense,
    group_tile,
    group_total,
    normalise,
    packed_tile,
    split_tile,
    table_row,
    z_gradient,
)
from fastflow.kernels.triton.parts import elements, image_tile, locate
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _group_bwd_kernel(
    grad_ptr, x_ptr, stats_ptr, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, seeds_ptr,
    dx_ptr, d_residual_ptr, sums_ptr, grad_stride_v, x_stride_v, residual_stride_v, pixels_v,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr, SAMPLED: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Whole groups in one read."""
    b, _, _, c, p, pixels, real, inside, place = packed_tile(
        pixels_v, V, CHANNELS, GROUPS, BLOCK_C, BLOCK, PACK, CHANNELS_LAST, INT64_OFFSETS
    )
    base = b * (CHANNELS * pixels)
    normed, rstd = normalise(
        x_ptr + b * x_stride_v * V, stats_ptr, b, c, real, place, inside, CHANNELS, GROUPS, ACC
    )
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    a, gamma = z_gradient(
        grad_ptr + b * grad_stride_v * V, normed, gamma_ptr, beta_ptr, label_index_ptr, sample_stride,
        residual_ptr, seeds_ptr, b, c, p, real, place, inside, pixels, CHANNELS, THRESHOLD, ACC, RESIDUAL,
        SAMPLED,
    )  # fmt: skip
    if RESIDUAL:
        tl.store(d_residual_ptr + base + place, a.to(d_residual_ptr.dtype.element_ty), mask=inside)
    plain = tl.sum(a, axis=1)
    product = tl.sum(a * normed, axis=1)
    sums_ptr += (b * CHANNELS + c) * 2
    tl.store(sums_ptr, product, mask=real)
    tl.store(sums_ptr + 1, plain, mask=real)
    count = tl.cast(pixels * (CHANNELS // GROUPS), ACC)
    plain_mean = group_total(gamma * plain, BLOCK_C, PACK) / count
    product_mean = group_total(gamma * product, BLOCK_C, PACK) / count
    dx = rstd[:, None] * (gamma[:, None] * a - plain_mean[:, None] - normed * product_mean[:, None])
    tl.store(dx_ptr + base + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def _split_bwd_kernel(
    grad_ptr, x_ptr, stats_ptr, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, seeds_ptr,
    means_ptr, dx_ptr, d_residual_ptr, sums_ptr, grad_stride_v, x_stride_v, residual_stride_v, pixels_v,
    n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr,
    WRITE: tl.constexpr, SAMPLED: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The sums of a chunk per channel; with WRITE its gradients, from the means of its groups."""
    b, chunk, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    normed, rstd = normalise(
        x_ptr + b * x_stride_v * V, stats_ptr, b, c, real, place, inside, CHANNELS, GROUPS, ACC
    )
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    a, gamma = z_gradient(
        grad_ptr + b * grad_stride_v * V, normed, gamma_ptr, beta_ptr, label_index_ptr, sample_stride,
        residual_ptr, seeds_ptr, b, c, p, real, place, inside, pixels, CHANNELS, THRESHOLD, ACC, RESIDUAL,
        SAMPLED,
    )  # fmt: skip
    if WRITE:
        base = b * (CHANNELS * pixels)
        means_ptr += (b * GROUPS + c // (CHANNELS // GROUPS)) * 2
        product_mean = tl.load(means_ptr, mask=real, other=0.0)
        plain_mean = tl.load(means_ptr + 1, mask=real, other=0.0)
        dx = rstd[:, None] * (gamma[:, None] * a - plain_mean[:, None] - normed * product_mean[:, None])
        tl.store(dx_ptr + base + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if RESIDUAL:
            tl.store(d_residual_ptr + base + place, a.to(d_residual_ptr.dtype.element_ty), mask=inside)
    else:
        sums_ptr += ((b * CHANNELS + c) * n_chunks + chunk) * 2
        tl.store(sums_ptr, tl.sum(a * normed, axis=1), mask=real)
        tl.store(sums_ptr + 1, tl.sum(a, axis=1), mask=real)


@kernel
def _join_sums_kernel(
    parts_ptr, gamma_ptr, label_index_ptr, sample_stride, sums_ptr, means_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, SAMPLED: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The sums of each channel from those of its chunks, and their means over the group, times gamma."""
    b, g = locate(tl.program_id(0), GROUPS, INT64_OFFSETS)
    size: tl.constexpr = CHANNELS // GROUPS
    k = tl.arange(0, BLOCK)
    product_mean = tl.zeros((BLOCK_C,), ACC)
    plain_mean = tl.zeros((BLOCK_C,), ACC)
    for start in range(0, size, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)
        c = g * size + i
        real = i < size
        product = tl.zeros((BLOCK_C, BLOCK), ACC)
        plain = tl.zeros((BLOCK_C, BLOCK), ACC)
        for chunk in range(0, n_chunks, BLOCK):
            part = parts_ptr + ((b * CHANNELS + c)[:, None] * n_chunks + chunk + k[None, :]) * 2
            there = real[:, None] & (chunk + k < n_chunks)[None, :]
            product += tl.load(part, mask=there, other=0.0)
            plain += tl.load(part + 1, mask=there, other=0.0)
        gamma = table_row(gamma_ptr, label_index_ptr, sample_stride, b, c, real, CHANNELS, ACC, SAMPLED)
        products = tl.sum(product, axis=1)
        plains = tl.sum(plain, axis=1)
        tl.store(sums_ptr + (b * CHANNELS + c) * 2, products, mask=real)
        tl.store(sums_ptr + (b * CHANNELS + c) * 2 + 1, plains, mask=real)
        product_mean += gamma * products
        plain_mean += gamma * plains
    count = tl.cast(elements(pixels_v, V, INT64_OFFSETS) * size, ACC)
    tl.store(means_ptr + (b * GROUPS + g) * 2, tl.sum(product_mean, axis=0) / count)
    tl.store(means_ptr + (b * GROUPS + g) * 2 + 1, tl.sum(plain_mean, axis=0) / count)


@kernel
def _tables_kernel(
    sums_ptr, label_index_ptr, d_gamma_ptr, d_beta_ptr, batch,
    CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of one row of the tables: sums over its samples in the order of the batch."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    row, block = locate(tl.program_id(0), blocks, False)
    c = block * BLOCK + tl.arange(0, BLOCK)
    d_gamma = tl.zeros((BLOCK,), ACC)
    d_beta = tl.zeros((BLOCK,), ACC)
    for sample in range(batch):
        b = tl.cast(sample, tl.int64)
        mine = (c < CHANNELS) & (tl.load(label_index_ptr + b) == row)
        d_gamma += tl.load(sums_ptr + (b * CHANNELS + c) * 2, mask=mine, other=0.0)
        d_beta += tl.load(sums_ptr + (b * CHANNELS + c) * 2 + 1, mask=mine, other=0.0)
    tl.store(d_gamma_ptr + row * CHANNELS + c, d_gamma, mask=c < CHANNELS)
    tl.store(d_beta_ptr + row * CHANNELS + c, d_beta, mask=c < CHANNELS)


# -- launchers ---------------------------------------------------------------------------------------------


def launch_norm_film_act_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    label_index: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, the residual (empty without one), gamma and beta, the last two not narrowed."""
    modulation = by_label(gamma, beta, label_index)
    dx, d_residual, sums = launch_norm_backward(grad, x, stats, modulation, residual, seeds, groups, dropout)
    d_gamma, d_beta = (torch.empty(gamma.shape, dtype=sums.dtype, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return dx, d_residual, d_gamma.zero_(), d_beta.zero_()
    batch, channels = x.shape[:2]
    block = min(128, power_of_two(channels))
    launch(
        _tables_kernel, gamma.shape[0] * cdiv(channels, block), x, 1,
        sums, modulation.label_index, d_gamma, d_beta, batch,
        CHANNELS=channels, BLOCK=block, ACC=triton_dtype(sums.dtype),
    )  # fmt: skip
    return dx, d_residual, d_gamma, d_beta


def launch_norm_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    modulation: Modulation,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, the residual and the scale and shift of each sample and channel (B, C, 2)."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    dx = empty_image(x.shape, x, channels_last)
    d_residual = x.new_empty(0) if residual is None else empty_image(x.shape, residual, channels_last)
    sums = torch.empty(batch, channels, 2, dtype=acc, device=x.device)
    if x.numel() == 0:
        return dx, d_residual, sums.zero_()
    x, x_stride = dense(x, channels_last)
    grad, grad_stride = dense(grad, channels_last)
    residual, residual_stride = (None, x_stride) if residual is None else dense(residual, channels_last)
    v = vector_width(pixels, grad_stride, x_stride, residual_stride)
    sizes = (grad_stride // v, x_stride // v, residual_stride // v, pixels // v)
    threshold = 0 if seeds is None else drop_threshold(dropout)
    shared = {
        "V": v, "CHANNELS": channels, "GROUPS": groups, "THRESHOLD": threshold, "ACC": triton_dtype(acc),
        "CHANNELS_LAST": channels_last, "RESIDUAL": residual is not None,
        "SAMPLED": modulation.label_index is None,
    }  # fmt: skip
    inputs = (grad, x, stats, *modulation, residual, seeds)
    outputs = (dx, None if residual is None else d_residual)
    tile = group_tile(channels, groups, pixels, acc, plain=False)
    if tile is not None:
        launch(
            _group_bwd_kernel, batch * cdiv(groups, tile.pack), x, tile.warps, *inputs, *outputs, sums,
            *sizes, BLOCK_C=tile.channels, BLOCK=tile.pixels, PACK=tile.pack,
            INT64_OFFSETS=needs_int64_offsets(channels * pixels, tile.channels * tile.pixels), **shared,
        )  # fmt: skip
    else:
        tile = split_tile(channels, pixels, channels_last, acc)
        chunks = cdiv(pixels, tile.pixels)
        int64 = needs_int64_offsets(channels * pixels, tile.channels * tile.pixels)
        parts = torch.empty(batch, channels, chunks, 2, dtype=acc, device=x.device)
        means = torch.empty(batch, groups, 2, dtype=acc, device=x.device)
        programs = batch * cdiv(channels, tile.channels) * chunks
        shared |= {"BLOCK_C": tile.channels, "BLOCK": tile.pixels, "INT64_OFFSETS": int64}
        launch(
            _split_bwd_kernel, programs, x, tile.warps, *inputs, None, None, None, parts, *sizes, chunks,
            WRITE=False, **shared,
        )  # fmt: skip
        launch(
            _join_sums_kernel, batch * groups, x, 1,
            parts, modulation.gamma, modulation.label_index, modulation.sample_stride, sums, means,
            pixels // v, chunks,
            V=v, CHANNELS=channels, GROUPS=groups, BLOCK_C=min(16, power_of_two(channels // groups)),
            BLOCK=min(16, power_of_two(chunks)), ACC=triton_dtype(acc), SAMPLED=shared["SAMPLED"],
            INT64_OFFSETS=int64,
        )  # fmt: skip
        launch(
            _split_bwd_kernel, programs, x, tile.warps, *inputs, means, *outputs, None, *sizes, chunks,
            WRITE=True, **shared,
        )  # fmt: skip
    return dx, d_residual, sums
