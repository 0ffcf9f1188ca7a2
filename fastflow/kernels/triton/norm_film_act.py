"""Triton kernels of `norm_film_act`, forward; `norm_film_act_backward` holds those of its backward pass.

A group that fits a program is read once. A larger one is cut into chunks whose means and centred squares are
joined in a fixed order by Chan's formula. `pixels_v` and `*_stride_v` are in units of V elements; `sums` and
`stats` hold two numbers each.
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
    drop,
    gelu,
    group_tile,
    group_total,
    modulate,
    normalise,
    packed_tile,
    split_tile,
)
from fastflow.kernels.triton.parts import elements, image_tile
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _group_fwd_kernel(
    x_ptr, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, seeds_ptr, y_ptr, stats_ptr,
    x_stride_v, residual_stride_v, pixels_v,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    PACK: tl.constexpr, EPS: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, SAMPLED: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Whole groups in one read."""
    b, g, i, c, p, pixels, real, inside, place = packed_tile(
        pixels_v, V, CHANNELS, GROUPS, BLOCK_C, BLOCK, PACK, CHANNELS_LAST, INT64_OFFSETS
    )
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    count = tl.cast(pixels * (CHANNELS // GROUPS), ACC)
    mean = group_total(tl.sum(x, axis=1), BLOCK_C, PACK) / count
    x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(group_total(tl.sum(x * x, axis=1), BLOCK_C, PACK) / count + EPS)
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    z, _ = modulate(
        x * rstd[:, None], gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, b, c, real,
        place, inside, CHANNELS, ACC, RESIDUAL, SAMPLED,
    )  # fmt: skip
    y = gelu(z)
    if THRESHOLD > 0:
        y = drop(y, seeds_ptr + b, c[:, None], p[None, :], pixels, THRESHOLD)
    tl.store(y_ptr + b * (CHANNELS * pixels) + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    stats_ptr += (b * GROUPS + g) * 2
    tl.store(stats_ptr, mean, mask=real & (i == 0))
    tl.store(stats_ptr + 1, rstd, mask=real & (i == 0))


@kernel
def _chunk_stats_kernel(
    x_ptr, sums_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a chunk, per channel."""
    b, chunk, pixels, c, _, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    count = tl.cast(tl.minimum(pixels - chunk * BLOCK, BLOCK), ACC)
    mean = tl.sum(x, axis=1) / count
    x = tl.where(inside, x - mean[:, None], 0.0)
    sums_ptr += ((b * CHANNELS + c) * n_chunks + chunk) * 2
    tl.store(sums_ptr, mean, mask=real)
    tl.store(sums_ptr + 1, tl.sum(x * x, axis=1), mask=real)


@kernel
def _join_stats_kernel(
    sums_ptr, stats_ptr, pixels_v, n_chunks,
    V: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr,
    ACC: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of a group of SIZE channels from those of its chunks of SPAN pixels."""
    group = tl.cast(tl.program_id(0), tl.int64)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    parts = SIZE * n_chunks
    sums_ptr += group * parts * 2
    k = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, parts, BLOCK):
        real = start + k < parts
        count = tl.minimum(pixels - (start + k) % n_chunks * SPAN, SPAN).to(ACC)
        total += count * tl.load(sums_ptr + (start + k) * 2, mask=real, other=0.0)
    n = tl.cast(pixels * SIZE, ACC)
    mean = tl.sum(total, axis=0) / n
    total = tl.zeros((BLOCK,), ACC)
    for start in range(0, parts, BLOCK):
        real = start + k < parts
        count = tl.minimum(pixels - (start + k) % n_chunks * SPAN, SPAN).to(ACC)
        off = tl.load(sums_ptr + (start + k) * 2, mask=real, other=0.0) - mean
        squares = tl.load(sums_ptr + (start + k) * 2 + 1, mask=real, other=0.0)
        total += tl.where(real, squares + count * off * off, 0.0)
    tl.store(stats_ptr + group * 2, mean)
    tl.store(stats_ptr + group * 2 + 1, 1.0 / tl.sqrt(tl.sum(total, axis=0) / n + EPS))


@kernel
def _split_fwd_kernel(
    x_ptr, stats_ptr, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, seeds_ptr, y_ptr,
    x_stride_v, residual_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr,
    SAMPLED: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The result of a chunk, when the statistics of its groups are known."""
    b, _, pixels, c, p, real, inside, place = image_tile(
        n_chunks, pixels_v, V, CHANNELS, BLOCK_C, BLOCK, CHANNELS_LAST, INT64_OFFSETS
    )
    normed, _ = normalise(
        x_ptr + b * x_stride_v * V, stats_ptr, b, c, real, place, inside, CHANNELS, GROUPS, ACC
    )
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    z, _ = modulate(
        normed, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, b, c, real, place, inside,
        CHANNELS, ACC, RESIDUAL, SAMPLED,
    )  # fmt: skip
    y = gelu(z)
    if THRESHOLD > 0:
        y = drop(y, seeds_ptr + b, c[:, None], p[None, :], pixels, THRESHOLD)
    tl.store(y_ptr + b * (CHANNELS * pixels) + place, y.to(y_ptr.dtype.element_ty), mask=inside)


# -- launchers ---------------------------------------------------------------------------------------------


def launch_norm_film_act(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    label_index: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(result, mean and 1/deviation of each group (B, groups, 2)); see `fastflow.kernels.norm_film_act`."""
    modulation = by_label(gamma, beta, label_index)
    return launch_norm(x, modulation, residual, seeds, groups, eps, dropout, dtype)


def launch_norm(
    x: Tensor,
    modulation: Modulation,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The op with tables or with a modulation per sample."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    y = empty_image(x.shape, x, channels_last, dtype)
    stats = torch.empty(batch, groups, 2, dtype=acc, device=x.device)
    if x.numel() == 0:
        return y, stats.zero_()
    x, x_stride = dense(x, channels_last)
    residual, residual_stride = (None, x_stride) if residual is None else dense(residual, channels_last)
    v = vector_width(pixels, x_stride, residual_stride)
    sizes = (x_stride // v, residual_stride // v, pixels // v)
    threshold = 0 if seeds is None else drop_threshold(dropout)
    shared = {
        "V": v, "CHANNELS": channels, "GROUPS": groups, "THRESHOLD": threshold, "ACC": triton_dtype(acc),
        "CHANNELS_LAST": channels_last, "RESIDUAL": residual is not None,
        "SAMPLED": modulation.label_index is None,
    }  # fmt: skip
    inputs = (*modulation, residual, seeds)
    tile = group_tile(channels, groups, pixels, acc, plain=seeds is None)
    if tile is not None:
        launch(
            _group_fwd_kernel, batch * cdiv(groups, tile.pack), x, tile.warps, x, *inputs, y, stats, *sizes,
            BLOCK_C=tile.channels, BLOCK=tile.pixels, PACK=tile.pack, EPS=eps,
            INT64_OFFSETS=needs_int64_offsets(channels * pixels, tile.channels * tile.pixels), **shared,
        )  # fmt: skip
        return y, stats
    tile = split_tile(channels, pixels, channels_last, acc)
    chunks, size = cdiv(pixels, tile.pixels), channels // groups
    int64 = needs_int64_offsets(channels * pixels, tile.channels * tile.pixels)
    sums = torch.empty(batch, channels, chunks, 2, dtype=acc, device=x.device)
    programs = batch * cdiv(channels, tile.channels) * chunks
    launch(
        _chunk_stats_kernel, programs, x, tile.warps, x, sums, x_stride // v, pixels // v, chunks,
        V=v, CHANNELS=channels, BLOCK_C=tile.channels, BLOCK=tile.pixels, ACC=triton_dtype(acc),
        CHANNELS_LAST=channels_last, INT64_OFFSETS=int64,
    )  # fmt: skip
    launch(
        _join_stats_kernel, batch * groups, x, 1, sums, stats, pixels // v, chunks,
        V=v, SIZE=size, SPAN=tile.pixels, BLOCK=min(256, power_of_two(size * chunks)), EPS=eps,
        ACC=triton_dtype(acc), INT64_OFFSETS=int64,
    )  # fmt: skip
    launch(
        _split_fwd_kernel, programs, x, tile.warps, x, stats, *inputs, y, *sizes, chunks,
        BLOCK_C=tile.channels, BLOCK=tile.pixels, INT64_OFFSETS=int64, **shared,
    )  # fmt: skip
    return y, stats
