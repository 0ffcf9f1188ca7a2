r"""GroupNorm, FiLM by label, an optional residual, GELU and an optional dropout.

.. math:: y = m \cdot \mathrm{gelu}(z), \quad z = \gamma_k \hat x + \beta_k + r, \quad
          \hat x = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}}

`x` and `residual` r (B, C, H, W); `gamma` and `beta` are tables (K, C) with one row per label, GroupNorm's own weight and bias
already folded in (gamma*w, gamma*b + beta); `rows` (B,) names each sample's row k. GELU is the exact one (erf). Statistics, z and
all sums are float32 (float64 for float64 x), the variance is that of centred values; y has the dtype asked for.

Dropout is counter-based: element e (its index in C, H, W order) of a sample is kept, m = 1/(1 - p), where a hash of e and the
sample's 32-bit key is at least p 2^32, else m = 0. Whoever has the keys has the mask again: nothing else is saved. The hash is
the multiply and xor-shift mixer of C. Wellons ("hash-prospector", lowbias32) without its last shift, which the comparison does
not see.

Backward, with a = dy m gelu'(z) and means over the n elements of a group:
dx = rstd (gamma a - mean(gamma a) - xhat mean(gamma a xhat)), dr = a, dgamma_k = sum a xhat, dbeta_k = sum a over the samples of
row k. The mean and 1/deviation of each group are saved, z is computed again.

A group that fits a block (`GROUP_ELEMENTS`) is read once by one program; a larger one is cut into chunks whose means and centred
squares are joined by Chan's formula in a fixed order. Contiguous or channels_last, any batch stride. Sources: Wu & He, 2018
(GroupNorm); Perez et al., 2018 (FiLM, here without the "1 +"); Chan, Golub & LeVeque, 1983 (joining variances).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels._launch import (
    cdiv,
    elements,
    is_wide,
    kernel,
    launch,
    locate,
    place_of,
    power_of_two,
    tile_of,
    triton_dtype,
    vector_width,
)
from fastflow.kernels._library import (
    accumulator,
    check_device,
    check_dtype,
    check_image,
    check_rows,
    check_same_shape,
    check_tables,
    empty_image,
    gelu_,
    is_channels_last,
    laid_out,
    memory_format,
    refuse_second_derivative,
    register,
    takes_reference,
)

if TYPE_CHECKING:
    import triton.language as tl

GOLDEN, FIRST, SECOND = 0x9E3779B9, 0x7FEB352D, 0x846CA68B


# -- definition -----------------------------------------------------------------------------------------------------------


def drop_threshold(dropout: float) -> int:
    """The 32-bit number below which a hash drops its element."""
    return round(dropout * 2**32)


def keep_scale(threshold: int) -> float:
    """What kept elements are multiplied by: 1/(1 - p)."""
    return 2**32 / (2**32 - threshold)


def _signed(value: int) -> int:
    return value - 2**32 if value >= 2**31 else value


def dropout_mask(keys: Tensor, shape: tuple[int, ...], threshold: int) -> Tensor:
    """Which elements are kept.

    Args:
        keys: (B,) int32.
        shape: (C, H, W).
        threshold: of `drop_threshold`.

    Returns:
        (B, C, H, W) bool.
    """
    n = shape[0] * shape[1] * shape[2]
    # int32 products wrap as the kernel's uint32 ones do; what is shifted in from the sign is masked off.
    counter = torch.arange(n, dtype=torch.int32, device=keys.device) * _signed(GOLDEN)
    h = keys[:, None] ^ counter
    h ^= (h >> 16) & 0xFFFF
    h *= FIRST
    h ^= (h >> 15) & 0x1FFFF
    h *= _signed(SECOND)
    # Unsigned order in signed numbers.
    return ((h ^ -(2**31)) >= threshold - 2**31).view(-1, *shape)


def film_act_reference(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None) -> Tensor:
    """The definition, in plain ATen."""
    y = torch.addcmul(beta[rows][:, :, None, None], x, gamma[rows][:, :, None, None])
    return F.gelu(y if residual is None else y + residual)


def norm_film_act_reference(
    x: Tensor,
    groups: int,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor,
    residual: Tensor | None,
    eps: float,
    dropout: float = 0.0,
    keys: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, in plain ATen: the native normalisation without its affine part is the fastest unfused form."""
    wide = accumulator(x.dtype)
    # torch.group_norm: the functional form refuses a group of one element, which is simply zero after normalisation.
    normed = torch.group_norm(x.to(wide), groups, eps=eps)
    y = film_act_reference(normed, gamma.to(wide), beta.to(wide), rows, None if residual is None else residual.to(wide))
    if keys is not None:
        threshold = drop_threshold(dropout)
        y = y * dropout_mask(keys, x.shape[1:], threshold) * keep_scale(threshold)
    return y.to(dtype or x.dtype)


# -- kernels --------------------------------------------------------------------------------------------------------------
# Tiles are (channels, pixels). Of small groups a program takes PACK whole ones, each padded to ROWS channels and BLOCK pixels; of
# a large one ROWS channels and BLOCK pixels. `pixels_v`, `*_stride_v` are in units of V elements. `sums` hold two numbers each.


@kernel
def _packed(pid, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, PACK: tl.constexpr, WIDE: tl.constexpr):
    """(sample, group, channel within the group, whether there is such a group and channel) of the rows of a packed tile."""
    b, first = locate(pid, (GROUPS + PACK - 1) // PACK, WIDE)
    row = tl.arange(0, PACK * ROWS)
    g = first * PACK + row // ROWS
    return b, g, row % ROWS, (row % ROWS < CHANNELS // GROUPS) & (g < GROUPS)


@kernel
def _group_total(value, ROWS: tl.constexpr, PACK: tl.constexpr):
    """The sum over each group of a packed tile's rows, at every row of the group."""
    total = tl.sum(tl.reshape(value, (PACK, ROWS)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (PACK, ROWS)), (PACK * ROWS,))


@kernel
def _kept(key_ptr, e, THRESHOLD: tl.constexpr):
    key = tl.load(key_ptr).to(tl.uint32, bitcast=True)
    h = (tl.cast(e, tl.uint32) * 0x9E3779B9) ^ key
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h >= THRESHOLD


@kernel
def _dropped(y, key_ptr, c, p, pixels, THRESHOLD: tl.constexpr):
    keep = _kept(key_ptr, c * pixels + p, THRESHOLD)
    return tl.where(keep, y * (4294967296.0 / (4294967296 - THRESHOLD)), 0.0)


@kernel
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@kernel
def _gelu_slope(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@kernel
def _table_row(table_ptr, rows_ptr, b, c, real, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    return tl.load(table_ptr + tl.load(rows_ptr + b) * CHANNELS + c, mask=real, other=0.0).to(ACC)


@kernel
def _modulate(
    normed, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, b, c, real, place, inside,
    CHANNELS: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """(z, gamma) of normalised values."""
    gamma = _table_row(gamma_ptr, rows_ptr, b, c, real, CHANNELS, ACC)
    beta = _table_row(beta_ptr, rows_ptr, b, c, real, CHANNELS, ACC)
    z = normed * gamma[:, None] + beta[:, None]
    if RESIDUAL:
        z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(ACC)
    return z, gamma


@kernel
def _group_fwd_kernel(
    x_ptr, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, y_ptr, stats_ptr, x_stride_v, residual_stride_v, pixels_v,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    EPS: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    b, g, i, real = _packed(tl.program_id(0), CHANNELS, GROUPS, ROWS, PACK, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    size: tl.constexpr = CHANNELS // GROUPS
    c = g * size + i
    p = tl.arange(0, BLOCK)
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    count = tl.cast(pixels * size, ACC)
    mean = _group_total(tl.sum(x, axis=1), ROWS, PACK) / count
    x = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(_group_total(tl.sum(x * x, axis=1), ROWS, PACK) / count + EPS)
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    z, _ = _modulate(
        x * rstd[:, None], gamma_ptr, beta_ptr, rows_ptr, residual_ptr, b, c, real, place, inside, CHANNELS, ACC, RESIDUAL
    )
    y = _gelu(z)
    if THRESHOLD > 0:
        y = _dropped(y, keys_ptr + b, c[:, None], p[None, :], pixels, THRESHOLD)
    tl.store(y_ptr + b * (CHANNELS * pixels) + place, y.to(y_ptr.dtype.element_ty), mask=inside)
    stats_ptr += (b * GROUPS + g) * 2
    tl.store(stats_ptr, mean, mask=real & (i == 0))
    tl.store(stats_ptr + 1, rstd, mask=real & (i == 0))


@kernel
def _normed(x_ptr, stats_ptr, b, c, real, place, inside, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr):
    """(normalised values, 1/deviation of each channel's group) of a tile."""
    stats_ptr += (b * GROUPS + c // (CHANNELS // GROUPS)) * 2
    mean = tl.load(stats_ptr, mask=real, other=0.0)
    rstd = tl.load(stats_ptr + 1, mask=real, other=0.0)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0), rstd


@kernel
def _slope(
    grad_ptr, normed, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, b, c, p, real, place, inside, pixels,
    CHANNELS: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """(the gradient of z, gamma)."""
    z, gamma = _modulate(normed, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, b, c, real, place, inside, CHANNELS, ACC, RESIDUAL)
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(ACC)
    if THRESHOLD > 0:
        grad = _dropped(grad, keys_ptr + b, c[:, None], p[None, :], pixels, THRESHOLD)
    return grad * _gelu_slope(z), gamma


@kernel
def _group_bwd_kernel(
    grad_ptr, x_ptr, stats_ptr, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, dx_ptr, d_residual_ptr, sums_ptr,
    grad_stride_v, x_stride_v, residual_stride_v, pixels_v,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PACK: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, g, i, real = _packed(tl.program_id(0), CHANNELS, GROUPS, ROWS, PACK, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    size: tl.constexpr = CHANNELS // GROUPS
    c = g * size + i
    p = tl.arange(0, BLOCK)
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    base = b * (CHANNELS * pixels)
    normed, rstd = _normed(x_ptr + b * x_stride_v * V, stats_ptr, b, c, real, place, inside, CHANNELS, GROUPS, ACC)
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    a, gamma = _slope(
        grad_ptr + b * grad_stride_v * V, normed, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, b, c, p, real, place,
        inside, pixels, CHANNELS, THRESHOLD, ACC, RESIDUAL,
    )  # fmt: skip
    if RESIDUAL:
        tl.store(d_residual_ptr + base + place, a.to(d_residual_ptr.dtype.element_ty), mask=inside)
    plain = tl.sum(a, axis=1)
    product = tl.sum(a * normed, axis=1)
    sums_ptr += (b * CHANNELS + c) * 2
    tl.store(sums_ptr, product, mask=real)
    tl.store(sums_ptr + 1, plain, mask=real)
    count = tl.cast(pixels * size, ACC)
    first = _group_total(gamma * plain, ROWS, PACK) / count
    second = _group_total(gamma * product, ROWS, PACK) / count
    dx = rstd[:, None] * (gamma[:, None] * a - first[:, None] - normed * second[:, None])
    tl.store(dx_ptr + base + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def _chunk_stats_kernel(
    x_ptr, sums_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and centred squares of a chunk, per channel."""
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = c < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
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
    V: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Mean and 1/deviation of a group from those of its chunks."""
    group = tl.cast(tl.program_id(0), tl.int64)
    pixels = elements(pixels_v, V, WIDE)
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
    x_ptr, stats_ptr, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, y_ptr,
    x_stride_v, residual_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = c < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    normed, _ = _normed(x_ptr + b * x_stride_v * V, stats_ptr, b, c, real, place, inside, CHANNELS, GROUPS, ACC)
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    z, _ = _modulate(normed, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, b, c, real, place, inside, CHANNELS, ACC, RESIDUAL)
    y = _gelu(z)
    if THRESHOLD > 0:
        y = _dropped(y, keys_ptr + b, c[:, None], p[None, :], pixels, THRESHOLD)
    tl.store(y_ptr + b * (CHANNELS * pixels) + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def _split_bwd_kernel(
    grad_ptr, x_ptr, stats_ptr, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, means_ptr, dx_ptr, d_residual_ptr,
    sums_ptr, grad_stride_v, x_stride_v, residual_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    THRESHOLD: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, RESIDUAL: tl.constexpr, WRITE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """First (not WRITE) the sums of a chunk per channel; then, when the group's means are known, the gradients."""
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = c < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    normed, rstd = _normed(x_ptr + b * x_stride_v * V, stats_ptr, b, c, real, place, inside, CHANNELS, GROUPS, ACC)
    if RESIDUAL:
        residual_ptr += b * residual_stride_v * V
    a, gamma = _slope(
        grad_ptr + b * grad_stride_v * V, normed, gamma_ptr, beta_ptr, rows_ptr, residual_ptr, keys_ptr, b, c, p, real, place,
        inside, pixels, CHANNELS, THRESHOLD, ACC, RESIDUAL,
    )  # fmt: skip
    if WRITE:
        base = b * (CHANNELS * pixels)
        means_ptr += (b * GROUPS + c // (CHANNELS // GROUPS)) * 2
        second = tl.load(means_ptr, mask=real, other=0.0)
        plain = tl.load(means_ptr + 1, mask=real, other=0.0)
        dx = rstd[:, None] * (gamma[:, None] * a - plain[:, None] - normed * second[:, None])
        tl.store(dx_ptr + base + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if RESIDUAL:
            tl.store(d_residual_ptr + base + place, a.to(d_residual_ptr.dtype.element_ty), mask=inside)
    else:
        sums_ptr += ((b * CHANNELS + c) * n_chunks + chunk) * 2
        tl.store(sums_ptr, tl.sum(a * normed, axis=1), mask=real)
        tl.store(sums_ptr + 1, tl.sum(a, axis=1), mask=real)


@kernel
def _join_sums_kernel(
    parts_ptr, gamma_ptr, rows_ptr, sums_ptr, means_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The sums of each channel from those of its chunks, and their means over the group, weighted by gamma."""
    b, g = locate(tl.program_id(0), GROUPS, WIDE)
    size: tl.constexpr = CHANNELS // GROUPS
    k = tl.arange(0, BLOCK)
    product_mean = tl.zeros((ROWS,), ACC)
    plain_mean = tl.zeros((ROWS,), ACC)
    for start in range(0, size, ROWS):
        i = start + tl.arange(0, ROWS)
        c = g * size + i
        real = i < size
        product = tl.zeros((ROWS, BLOCK), ACC)
        plain = tl.zeros((ROWS, BLOCK), ACC)
        for chunk in range(0, n_chunks, BLOCK):
            part = parts_ptr + ((b * CHANNELS + c)[:, None] * n_chunks + chunk + k[None, :]) * 2
            there = real[:, None] & (chunk + k < n_chunks)[None, :]
            product += tl.load(part, mask=there, other=0.0)
            plain += tl.load(part + 1, mask=there, other=0.0)
        gamma = _table_row(gamma_ptr, rows_ptr, b, c, real, CHANNELS, ACC)
        products = tl.sum(product, axis=1)
        plains = tl.sum(plain, axis=1)
        tl.store(sums_ptr + (b * CHANNELS + c) * 2, products, mask=real)
        tl.store(sums_ptr + (b * CHANNELS + c) * 2 + 1, plains, mask=real)
        product_mean += gamma * products
        plain_mean += gamma * plains
    count = tl.cast(elements(pixels_v, V, WIDE) * size, ACC)
    tl.store(means_ptr + (b * GROUPS + g) * 2, tl.sum(product_mean, axis=0) / count)
    tl.store(means_ptr + (b * GROUPS + g) * 2 + 1, tl.sum(plain_mean, axis=0) / count)


@kernel
def _tables_kernel(
    sums_ptr, rows_ptr, d_gamma_ptr, d_beta_ptr, batch, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """The gradients of one row of the tables: its samples' sums in the order of the batch."""
    blocks: tl.constexpr = (CHANNELS + BLOCK - 1) // BLOCK
    row, block = locate(tl.program_id(0), blocks, False)
    c = block * BLOCK + tl.arange(0, BLOCK)
    d_gamma = tl.zeros((BLOCK,), ACC)
    d_beta = tl.zeros((BLOCK,), ACC)
    for sample in range(batch):
        b = tl.cast(sample, tl.int64)
        mine = (c < CHANNELS) & (tl.load(rows_ptr + b) == row)
        d_gamma += tl.load(sums_ptr + (b * CHANNELS + c) * 2, mask=mine, other=0.0)
        d_beta += tl.load(sums_ptr + (b * CHANNELS + c) * 2 + 1, mask=mine, other=0.0)
    tl.store(d_gamma_ptr + row * CHANNELS + c, d_gamma, mask=c < CHANNELS)
    tl.store(d_beta_ptr + row * CHANNELS + c, d_beta, mask=c < CHANNELS)


# -- launchers ------------------------------------------------------------------------------------------------------------

GROUP_ELEMENTS = 8192
# Forward and without dropout, few enough values are alive in a program for a group twice as large.
PLAIN_GROUP_ELEMENTS = 16_384
SPLIT_ELEMENTS = 4096
# Groups are packed up to this size: a program of a few dozen elements costs as much as one of a thousand.
PACKED_ELEMENTS = 2048


class _Tile(NamedTuple):
    rows: int
    block: int
    warps: int
    pack: int = 1


def _group_tile(channels: int, groups: int, pixels: int, acc: torch.dtype, limit: int) -> _Tile | None:
    """The tile of whole groups, 16 values a thread up to 8192; None when a group has more elements than `limit`."""
    rows, block = power_of_two(channels // groups), power_of_two(pixels)
    limit = limit // 2 if acc == torch.float64 else limit
    if rows * block > limit:
        return None
    pack = min(power_of_two(groups), max(1, PACKED_ELEMENTS // (rows * block)))
    return _Tile(rows, block, min(16, max(1, pack * rows * block // 512)), pack)


def _split_tile(channels: int, pixels: int, channels_last: bool, acc: torch.dtype) -> _Tile:
    """The tile of a chunk: long runs of what lies together in memory."""
    size = SPLIT_ELEMENTS // 2 if acc == torch.float64 else SPLIT_ELEMENTS
    if channels_last:
        rows = min(64, power_of_two(channels))
        return _Tile(rows, min(power_of_two(pixels), size // rows), 8)
    block = min(size, power_of_two(pixels))
    return _Tile(min(power_of_two(channels), size // block), block, 8)


def _dense(x: Tensor, channels_last: bool) -> tuple[Tensor, int]:
    """(x in the layout, its batch stride)."""
    x = laid_out(x, channels_last)
    return x, x.stride(0)


def _norm_launch(
    x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None, keys: Tensor | None,
    groups: int, eps: float, dropout: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    y = empty_image(x.shape, x, channels_last, dtype)
    stats = torch.empty(batch, groups, 2, dtype=acc, device=x.device)
    if x.numel() == 0:
        return y, stats.zero_()
    x, x_stride = _dense(x, channels_last)
    residual, residual_stride = (None, x_stride) if residual is None else _dense(residual, channels_last)
    gamma, beta, rows = gamma.contiguous(), beta.contiguous(), rows.contiguous()
    v = vector_width(pixels, x_stride, residual_stride)
    sizes = (x_stride // v, residual_stride // v, pixels // v)
    threshold = 0 if keys is None else drop_threshold(dropout)
    shared = {
        "V": v, "CHANNELS": channels, "GROUPS": groups, "THRESHOLD": threshold, "ACC": triton_dtype(acc),
        "CHANNELS_LAST": channels_last, "RESIDUAL": residual is not None,
    }  # fmt: skip
    tables = (gamma, beta, rows, residual, keys)
    tile = _group_tile(channels, groups, pixels, acc, PLAIN_GROUP_ELEMENTS if keys is None else GROUP_ELEMENTS)
    if tile is not None:
        launch(
            _group_fwd_kernel, batch * cdiv(groups, tile.pack), x, tile.warps, x, *tables, y, stats, *sizes,
            ROWS=tile.rows, BLOCK=tile.block, PACK=tile.pack, EPS=eps,
            WIDE=is_wide(channels * pixels, tile.rows * tile.block), **shared,
        )  # fmt: skip
        return y, stats
    tile = _split_tile(channels, pixels, channels_last, acc)
    chunks, wide = cdiv(pixels, tile.block), is_wide(channels * pixels, tile.rows * tile.block)
    sums = torch.empty(batch, channels, chunks, 2, dtype=acc, device=x.device)
    programs = batch * cdiv(channels, tile.rows) * chunks
    launch(
        _chunk_stats_kernel, programs, x, tile.warps, x, sums, x_stride // v, pixels // v, chunks,
        V=v, CHANNELS=channels, ROWS=tile.rows, BLOCK=tile.block, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last, WIDE=wide,
    )  # fmt: skip
    size = channels // groups
    launch(
        _join_stats_kernel, batch * groups, x, 1, sums, stats, pixels // v, chunks,
        V=v, SIZE=size, SPAN=tile.block, BLOCK=min(256, power_of_two(size * chunks)), EPS=eps, ACC=triton_dtype(acc), WIDE=wide,
    )  # fmt: skip
    launch(
        _split_fwd_kernel, programs, x, tile.warps, x, stats, *tables, y, *sizes, chunks,
        ROWS=tile.rows, BLOCK=tile.block, WIDE=wide, **shared,
    )  # fmt: skip
    return y, stats


def _norm_backward_launch(
    grad: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None,
    keys: Tensor | None, groups: int, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    dx = empty_image(x.shape, x, channels_last)
    d_residual = x.new_empty(0) if residual is None else empty_image(x.shape, residual, channels_last)
    d_gamma, d_beta = (torch.empty(gamma.shape, dtype=acc, device=x.device) for _ in range(2))
    if x.numel() == 0:
        return dx, d_residual, d_gamma.zero_(), d_beta.zero_()
    x, x_stride = _dense(x, channels_last)
    grad, grad_stride = _dense(grad, channels_last)
    residual, residual_stride = (None, x_stride) if residual is None else _dense(residual, channels_last)
    gamma, beta, rows = gamma.contiguous(), beta.contiguous(), rows.contiguous()
    v = vector_width(pixels, grad_stride, x_stride, residual_stride)
    sizes = (grad_stride // v, x_stride // v, residual_stride // v, pixels // v)
    shared = {
        "V": v, "CHANNELS": channels, "GROUPS": groups, "THRESHOLD": 0 if keys is None else drop_threshold(dropout),
        "ACC": triton_dtype(acc), "CHANNELS_LAST": channels_last, "RESIDUAL": residual is not None,
    }  # fmt: skip
    inputs = (grad, x, stats, gamma, beta, rows, residual, keys)
    outputs = (dx, None if residual is None else d_residual)
    sums = torch.empty(batch, channels, 2, dtype=acc, device=x.device)
    tile = _group_tile(channels, groups, pixels, acc, GROUP_ELEMENTS)
    if tile is not None:
        launch(
            _group_bwd_kernel, batch * cdiv(groups, tile.pack), x, tile.warps, *inputs, *outputs, sums, *sizes,
            ROWS=tile.rows, BLOCK=tile.block, PACK=tile.pack, WIDE=is_wide(channels * pixels, tile.rows * tile.block), **shared,
        )  # fmt: skip
    else:
        tile = _split_tile(channels, pixels, channels_last, acc)
        chunks, wide = cdiv(pixels, tile.block), is_wide(channels * pixels, tile.rows * tile.block)
        parts = torch.empty(batch, channels, chunks, 2, dtype=acc, device=x.device)
        means = torch.empty(batch, groups, 2, dtype=acc, device=x.device)
        programs = batch * cdiv(channels, tile.rows) * chunks
        shared |= {"ROWS": tile.rows, "BLOCK": tile.block, "WIDE": wide}
        launch(
            _split_bwd_kernel, programs, x, tile.warps, *inputs, None, None, None, parts, *sizes, chunks, WRITE=False, **shared
        )
        rows_block = min(16, power_of_two(channels // groups))
        launch(
            _join_sums_kernel, batch * groups, x, 1, parts, gamma, rows, sums, means, pixels // v, chunks,
            V=v, CHANNELS=channels, GROUPS=groups, ROWS=rows_block, BLOCK=min(16, power_of_two(chunks)),
            ACC=triton_dtype(acc), WIDE=wide,
        )  # fmt: skip
        launch(_split_bwd_kernel, programs, x, tile.warps, *inputs, means, *outputs, None, *sizes, chunks, WRITE=True, **shared)
    block = min(128, power_of_two(channels))
    launch(
        _tables_kernel, gamma.shape[0] * cdiv(channels, block), x, 1, sums, rows, d_gamma, d_beta, batch,
        CHANNELS=channels, BLOCK=block, ACC=triton_dtype(acc),
    )  # fmt: skip
    return dx, d_residual, d_gamma, d_beta


# -- op and autograd ------------------------------------------------------------------------------------------------------


def _as_one(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Sizes of x as one sample, whose channels and groups are those of the whole batch.

    In that form the native op applies the rows of the tables, and its backward returns their gradients per sample.
    """
    batch, channels, h, w = x.shape
    return 1, batch * channels, h * w, batch * groups


@functools.lru_cache(maxsize=32)
def _counter(n: int) -> Tensor:
    """(n,) int32: the share of an element's index in the hash after its first shift."""
    return _shifted(torch.arange(n, dtype=torch.int32).mul_(_signed(GOLDEN)))


def _shifted(value: Tensor) -> Tensor:
    return (value >> 16).bitwise_and_(0xFFFF).bitwise_xor_(value)


def _kept_on_cpu(keys: Tensor, like: Tensor, threshold: int) -> Tensor:
    """`dropout_mask` times `keep_scale`, in the dtype and shape of `like`, in few passes over memory."""
    # The first shift of (key ^ counter) is that of its parts.
    h = _shifted(keys)[:, None] ^ _counter(like[0].numel())
    h *= FIRST
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= _signed(SECOND)
    h ^= -(2**31)
    # Comparisons into booleans are not vectorised.
    kept = torch.ge(h, threshold - 2**31, out=torch.empty(h.shape, dtype=like.dtype))
    return kept.mul_(keep_scale(threshold)).view(like.shape)


def _norm_on_cpu(
    x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None, keys: Tensor | None,
    groups: int, eps: float, dropout: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout, wide = memory_format(is_channels_last(x)), accumulator(x.dtype)
    batch = x.shape[0]
    if x.numel() == 0:
        return x.to(dtype or x.dtype).contiguous(memory_format=layout), x.new_zeros(batch, groups, 2, dtype=wide)
    inner = x.to(wide).contiguous()
    gammas, betas = gamma.to(wide).index_select(0, rows), beta.to(wide).index_select(0, rows)
    z, mean, rstd = torch.native_group_norm(
        inner.view(1, -1, *x.shape[2:]), gammas.flatten(), betas.flatten(), *_as_one(x, groups), eps
    )
    z = z.view(x.shape)
    if residual is not None:
        z += residual
    # In place: on a CPU every fresh tensor costs page faults.
    y = gelu_(z)
    if keys is not None:
        y *= _kept_on_cpu(keys, y, drop_threshold(dropout))
    stats = torch.stack((mean.view(batch, groups), rstd.view(batch, groups)), dim=2)
    return y.to(dtype or x.dtype).contiguous(memory_format=layout), stats


def _norm_fake(
    x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None, keys: Tensor | None,
    groups: int, eps: float, dropout: float, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    stats = x.new_empty(x.shape[0], groups, 2, dtype=accumulator(x.dtype))
    return empty_image(x.shape, x, is_channels_last(x), dtype), stats


def _norm_backward_on_cpu(
    grad: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None,
    keys: Tensor | None, groups: int, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    last, wide = is_channels_last(x), accumulator(x.dtype)
    layout = memory_format(last)
    batch, channels = x.shape[:2]
    if x.numel() == 0:
        none = torch.zeros(gamma.shape, dtype=wide)
        return torch.empty_like(x), x.new_empty(0) if residual is None else torch.empty_like(residual), none, none.clone()
    # The native backward of channels_last takes ten times longer, and reads raw memory whatever the strides say.
    inner, upper = x.to(wide).contiguous(), grad.to(wide).contiguous()
    gammas, betas = gamma.to(wide).index_select(0, rows), beta.to(wide).index_select(0, rows)
    mean, rstd = (part.contiguous() for part in stats.unbind(2))
    # z = x * slope + offset, with the statistics and the tables in one pair a channel.
    slope = gammas * rstd.repeat_interleave(channels // groups, dim=1)
    offset = torch.addcmul(betas, slope, mean.repeat_interleave(channels // groups, dim=1), value=-1)
    z = (inner * slope[:, :, None, None]).add_(offset[:, :, None, None])
    if residual is not None:
        z += residual
    if keys is not None:
        upper = _kept_on_cpu(keys, upper, drop_threshold(dropout)).mul_(upper)
    a = torch.ops.aten.gelu_backward.grad_input(upper, z, grad_input=z)
    one = inner.view(1, -1, *x.shape[2:])
    dx, d_gammas, d_betas = torch.ops.aten.native_group_norm_backward(
        a.view_as(one), one, mean.view(1, -1), rstd.view(1, -1), gammas.flatten(), *_as_one(x, groups), [True] * 3
    )
    dx, d_gammas, d_betas = dx.view(x.shape), d_gammas.view(batch, channels), d_betas.view(batch, channels)
    d_gamma, d_beta = (torch.zeros(gamma.shape, dtype=wide).index_add_(0, rows, part) for part in (d_gammas, d_betas))
    d_residual = x.new_empty(0) if residual is None else a.to(residual.dtype).contiguous(memory_format=layout)
    return dx.to(x.dtype).contiguous(memory_format=layout), d_residual, d_gamma, d_beta


def _norm_backward_fake(
    grad: Tensor, x: Tensor, stats: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None,
    keys: Tensor | None, groups: int, dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    last, wide = is_channels_last(x), accumulator(x.dtype)
    d_residual = x.new_empty(0) if residual is None else empty_image(x.shape, residual, last)
    return (
        empty_image(x.shape, x, last), d_residual, gamma.new_empty(gamma.shape, dtype=wide),
        gamma.new_empty(gamma.shape, dtype=wide),
    )  # fmt: skip


_forward = register(
    "norm_film_act(Tensor x, Tensor gamma, Tensor beta, Tensor rows, Tensor? residual, Tensor? keys, int groups, float eps, "
    "float dropout, ScalarType? dtype) -> (Tensor, Tensor)",
    reference=_norm_on_cpu,
    triton=_norm_launch,
    fake=_norm_fake,
)
_backward = register(
    "norm_film_act_backward(Tensor grad, Tensor x, Tensor stats, Tensor gamma, Tensor beta, Tensor rows, Tensor? residual, "
    "Tensor? keys, int groups, float dropout) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_norm_backward_on_cpu,
    triton=_norm_backward_launch,
    fake=_norm_backward_fake,
)


class NormFilmAct(torch.autograd.Function):
    """The op under autograd. Saves x, the residual, two numbers per group and the keys; a second derivative is an error."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        rows: Tensor,
        residual: Tensor | None,
        keys: Tensor | None,
        groups: int,
        eps: float,
        dropout: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        y, stats = _forward(x, gamma, beta, rows, residual, keys, groups, eps, dropout, dtype)
        ctx.save_for_backward(x, stats, gamma, beta, rows, residual, keys)
        ctx.groups, ctx.dropout = groups, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("norm_film_act")
        # Once: a second look is an error under activation checkpointing.
        saved = ctx.saved_tensors
        _, _, gamma, beta, _, residual, _ = saved
        dx, d_residual, d_gamma, d_beta = _backward(grad, *saved, ctx.groups, ctx.dropout)
        return (
            dx, d_gamma.to(gamma.dtype), d_beta.to(beta.dtype), None, None if residual is None else d_residual,
            None, None, None, None, None,
        )  # fmt: skip


def _check(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None) -> None:
    check_image("x", x)
    check_tables(("gamma", gamma), ("beta", beta), x.shape[1], x)
    check_rows(rows, x.shape[0], gamma.shape[0], x)
    if residual is not None:
        check_same_shape("residual", residual, x)


def film_act(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None = None) -> Tensor:
    """`norm_film_act` without the normalisation, for values that another norm (BatchNorm) has normalised.

    Args:
        x: (B, C, H, W).
        gamma: (K, C) table.
        beta: (K, C) table.
        rows: (B,) int64, the table row of each sample.
        residual: (B, C, H, W) or None, added before the activation.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape does not fit, or a row is not in the tables.
    """
    _check(x, gamma, beta, rows, residual)
    return film_act_reference(x, gamma, beta, rows, residual)


def dropout_keys(batch: int, device: torch.device) -> Tensor:
    """A fresh key per sample, (B,) int32, from torch's default generator of the device."""
    return torch.randint(-(2**31), 2**31, (batch,), dtype=torch.int32, device=device)


def norm_film_act(
    x: Tensor,
    groups: int,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    keys: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise over groups of channels, modulate by label, add the residual, activate, drop.

    Args:
        x: (B, C, H, W).
        groups: number of channel groups; divides C.
        gamma: (K, C) table.
        beta: (K, C) table.
        rows: (B,) int64, the table row of each sample.
        residual: (B, C, H, W) or None.
        eps: added to the variance.
        dropout: probability that an element becomes 0; the others are multiplied by 1/(1 - dropout).
        keys: (B,) int32, what each sample's dropout is drawn from: the same keys drop the same elements. Fresh ones when None.
        dtype: of the result; that of x when None.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, `groups` does not divide C, a row is not in the tables, or `dropout` is
            not in [0, 1).

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
        >>> norm_film_act(x, 1, torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0])).flatten()
        tensor([-0.1587,  0.8413])
    """
    _check(x, gamma, beta, rows, residual)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
    if drop_threshold(dropout) == 0:
        keys = None
    elif keys is None:
        keys = dropout_keys(x.shape[0], x.device)
    elif tuple(keys.shape) != (x.shape[0],) or keys.dtype != torch.int32:
        raise ValueError(f"keys must be ({x.shape[0]},) int32, got {tuple(keys.shape)} {keys.dtype}")
    else:
        check_device("keys", keys, x)
    if dtype is not None:
        check_dtype("dtype", torch.empty(0, dtype=dtype))
    if takes_reference():
        return norm_film_act_reference(x, groups, gamma, beta, rows, residual, eps, dropout, keys, dtype)
    if not (torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in (x, gamma, beta, residual))):
        y: Tensor = _forward(x, gamma, beta, rows, residual, keys, groups, eps, dropout, dtype)[0]
        return y
    out: Tensor = NormFilmAct.apply(x, gamma, beta, rows, residual, keys, groups, eps, dropout, dtype)
    return out
