"""Triton kernels of the maps of channels: one program per layer, which reads its parameters by address.

A program holds M x M tiles, M a power of two that the largest layer fits into, and adds up products of one
column and one row at a time. Everything is float64 between loads and stores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.triton.launch import kernel, launch, power_of_two
from fastflow.kernels.triton.pointers import integer_table, pointer_table

if TYPE_CHECKING:
    import triton.language as tl

MAX_CHANNELS = 64
# Tensors of each layer, in this order: lower, upper, log_s, log_scale, bias, permutation, sign.
TENSORS = 7
# Results begin at multiples of so many elements: kernels that read them are built for aligned addresses.
ALIGNMENT = 4
# Programs by the side of their tiles: (largest side, warps).
WARPS = ((8, 1), (16, 2), (32, 4), (64, 8))


# -- where results lie ---------------------------------------------------------------------------------------


class MapPlace(NamedTuple):
    """Where the results of a layer begin in the flat buffer; -1 for one that is not wanted."""

    weight: int
    bias: int
    inverse: int


class ParamPlace(NamedTuple):
    """Where the gradients of a layer's parameters begin in the flat buffer."""

    lower: int
    upper: int
    log_s: int
    log_scale: int
    bias: int


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


@functools.lru_cache(maxsize=256)
def map_places(
    channels: tuple[int, ...], affine: tuple[bool, ...], inverse: bool
) -> tuple[tuple[MapPlace, ...], int]:
    """Places of the results of all layers, and the size of their buffer.

    Args:
        channels: of each layer.
        affine: whether a layer of one channel gives a factor and a constant side by side.
        inverse: whether inverse matrices are wanted; the factor is then that of the inverse.
    """
    places, start = [], 0
    for c, pair in zip(channels, affine, strict=True):
        if pair:
            places.append(MapPlace(-1, start + 1, start) if inverse else MapPlace(start, start + 1, -1))
            start += ALIGNMENT
            continue
        bias = start + _aligned(c * c)
        end = bias + _aligned(c)
        places.append(MapPlace(start, bias, end if inverse else -1))
        start = end + (_aligned(c * c) if inverse else 0)
    return tuple(places), start


@functools.lru_cache(maxsize=256)
def param_places(channels: tuple[int, ...]) -> tuple[tuple[ParamPlace, ...], int]:
    """Places of the gradients of all layers' parameters, and the size of their buffer."""
    places, start = [], 0
    for c in channels:
        square, line = _aligned(c * c), _aligned(c)
        log_s = start + 2 * square
        places.append(ParamPlace(start, start + square, log_s, log_s + line, log_s + 2 * line))
        start = log_s + 3 * line
    return tuple(places), start


# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _float_ptr(pointers_ptr, index, like_ptr):
    return tl.load(pointers_ptr + index).to(tl.pointer_type(like_ptr.dtype.element_ty))


@kernel
def _line(ptr, at, channels):
    return tl.load(ptr + at, mask=at < channels, other=0.0).to(tl.float64)


@kernel
def _diagonal(log_s_ptr, sign_ptr, at, channels):
    sign = tl.load(sign_ptr + at, mask=at < channels, other=0).to(tl.float64)
    return sign * tl.exp(_line(log_s_ptr, at, channels))


@kernel
def _lower_at(lower_ptr, row, column, channels):
    """L, whose diagonal is 1, at rows and columns that broadcast."""
    found = tl.load(lower_ptr + row * channels + column, mask=(column < row) & (row < channels), other=0.0)
    return tl.where(row == column, 1.0, found.to(tl.float64))


@kernel
def _upper_at(upper_ptr, row, column, diagonal, channels):
    """U at rows and columns that broadcast, as `diagonal` does with them."""
    found = tl.load(upper_ptr + row * channels + column, mask=(row < column) & (column < channels), other=0.0)
    return tl.where(row == column, diagonal, found.to(tl.float64))


@kernel
def _inverse(lower_ptr, upper_ptr, log_s_ptr, permutation_ptr, sign_ptr, channels, M: tl.constexpr):
    """(P L U)^-1 by substitution, a row at a time."""
    rows, columns = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    permutation = tl.load(permutation_ptr + columns, mask=columns < channels, other=-1)
    y = tl.where(rows == permutation, 1.0, 0.0).to(tl.float64)
    for k in range(channels):
        row = tl.sum(tl.where(rows == k, y, 0.0), axis=0)[None, :]
        below = (rows > k) & (rows < channels)
        y -= tl.load(lower_ptr + rows * channels + k, mask=below, other=0.0).to(tl.float64) * row
    for done in range(channels):
        k = channels - 1 - done
        pivot = tl.load(sign_ptr + k).to(tl.float64) * tl.exp(tl.load(log_s_ptr + k).to(tl.float64))
        row = tl.sum(tl.where(rows == k, y, 0.0), axis=0)[None, :] / pivot
        above = tl.load(upper_ptr + rows * channels + k, mask=rows < k, other=0.0).to(tl.float64)
        y = tl.where(rows == k, row, y - above * row)
    return y


@kernel
def _lu_fwd_kernel(
    pointers_ptr, sizes_ptr, out_ptr, logdet_ptr, TENSORS: tl.constexpr, M: tl.constexpr,
    INVERSE: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0)
    channels, pixels = tl.load(sizes_ptr + 5 * s).to(tl.int32), tl.load(sizes_ptr + 5 * s + 1)
    weight_at, bias_at = tl.load(sizes_ptr + 5 * s + 2), tl.load(sizes_ptr + 5 * s + 3)
    first = s * TENSORS
    lower_ptr, upper_ptr = (
        _float_ptr(pointers_ptr, first, out_ptr),
        _float_ptr(pointers_ptr, first + 1, out_ptr),
    )
    log_s_ptr = _float_ptr(pointers_ptr, first + 2, out_ptr)
    log_scale_ptr = _float_ptr(pointers_ptr, first + 3, out_ptr)
    bias_ptr = _float_ptr(pointers_ptr, first + 4, out_ptr)
    permutation_ptr = tl.load(pointers_ptr + first + 5).to(tl.pointer_type(tl.int64))
    sign_ptr = tl.load(pointers_ptr + first + 6).to(tl.pointer_type(tl.int8))

    i = tl.arange(0, M)
    rows, columns = i[:, None], i[None, :]
    inside = (rows < channels) & (columns < channels)
    permuted = tl.load(permutation_ptr + rows, mask=rows < channels, other=0).to(tl.int32)
    diagonal = _diagonal(log_s_ptr, sign_ptr, columns, channels)
    weight = tl.zeros((M, M), dtype=tl.float64)
    for k in range(channels):
        weight += _lower_at(lower_ptr, permuted, k, channels) * _upper_at(
            upper_ptr, k, columns, diagonal, channels
        )
    kind = out_ptr.dtype.element_ty
    scaled = weight * tl.exp(_line(log_scale_ptr, columns, channels))
    tl.store(out_ptr + weight_at + rows * channels + columns, scaled.to(kind), mask=inside & (weight_at >= 0))
    bias = tl.sum(weight * _line(bias_ptr, columns, channels), axis=1)
    tl.store(out_ptr + bias_at + i, bias.to(kind), mask=i < channels)
    total = tl.sum(_line(log_scale_ptr, i, channels), axis=0) + tl.sum(_line(log_s_ptr, i, channels), axis=0)
    tl.store(logdet_ptr + s, pixels.to(tl.float64) * total)
    if INVERSE:
        inverse_at = tl.load(sizes_ptr + 5 * s + 4)
        inverse = _inverse(lower_ptr, upper_ptr, log_s_ptr, permutation_ptr, sign_ptr, channels, M)
        inverse = inverse / tl.exp(_line(log_scale_ptr, rows, channels))
        tl.store(out_ptr + inverse_at + rows * channels + columns, inverse.to(kind), mask=inside)


@kernel
def _lu_bwd_kernel(
    pointers_ptr, sizes_ptr, grad_ptr, grad_logdet_ptr, d_ptr, TENSORS: tl.constexpr, M: tl.constexpr
):
    s = tl.program_id(0)
    channels, pixels = tl.load(sizes_ptr + 4 * s).to(tl.int32), tl.load(sizes_ptr + 4 * s + 1)
    grad_weight_ptr = grad_ptr + tl.load(sizes_ptr + 4 * s + 2)
    grad_bias_ptr = grad_weight_ptr + channels * channels
    first = s * TENSORS
    lower_ptr, upper_ptr = _float_ptr(pointers_ptr, first, d_ptr), _float_ptr(pointers_ptr, first + 1, d_ptr)
    log_s_ptr = _float_ptr(pointers_ptr, first + 2, d_ptr)
    log_scale_ptr = _float_ptr(pointers_ptr, first + 3, d_ptr)
    bias_ptr = _float_ptr(pointers_ptr, first + 4, d_ptr)
    permutation_ptr = tl.load(pointers_ptr + first + 5).to(tl.pointer_type(tl.int64))
    sign_ptr = tl.load(pointers_ptr + first + 6).to(tl.pointer_type(tl.int8))
    # Gradients lie in the order lower, upper, log_s, log_scale, bias, each from a multiple of four on.
    square, line = (channels * channels + 3) // 4 * 4, (channels + 3) // 4 * 4
    d_lower_ptr = d_ptr + tl.load(sizes_ptr + 4 * s + 3)
    d_upper_ptr = d_lower_ptr + square
    d_log_s_ptr = d_upper_ptr + square
    d_log_scale_ptr = d_log_s_ptr + line
    d_bias_ptr = d_log_scale_ptr + line
    kind = d_ptr.dtype.element_ty

    i = tl.arange(0, M)
    rows, columns = i[:, None], i[None, :]
    inside = (rows < channels) & (columns < channels)
    diagonal = _diagonal(log_s_ptr, sign_ptr, columns, channels)
    # With the rows of L permuted, W = L U: both L^T dA and L^T dc are sums over rows of the gradients.
    through = tl.zeros((M, M), dtype=tl.float64)
    constant = tl.zeros((M, 1), dtype=tl.float64)
    for r in range(channels):
        place = tl.load(permutation_ptr + r).to(tl.int32)
        lower = _lower_at(lower_ptr, place, rows, channels)
        through += lower * _line(grad_weight_ptr + r * channels, columns, channels)
        constant += lower * tl.load(grad_bias_ptr + r).to(tl.float64)
    upper = _upper_at(upper_ptr, rows, columns, diagonal, channels)
    d_upper = through * tl.exp(_line(log_scale_ptr, columns, channels))
    d_upper += constant * _line(bias_ptr, columns, channels)
    kept = tl.where(rows < columns, d_upper, 0.0)
    tl.store(d_upper_ptr + rows * channels + columns, kept.to(kind), mask=inside)
    share = pixels.to(tl.float64) * tl.load(grad_logdet_ptr + s)
    on_diagonal = tl.sum(tl.where(rows == columns, d_upper, 0.0), axis=1)
    d_log_s = on_diagonal * _diagonal(log_s_ptr, sign_ptr, i, channels) + share
    tl.store(d_log_s_ptr + i, d_log_s.to(kind), mask=i < channels)
    d_log_scale = tl.sum(upper * through, axis=0) * tl.exp(_line(log_scale_ptr, i, channels)) + share
    tl.store(d_log_scale_ptr + i, d_log_scale.to(kind), mask=i < channels)
    tl.store(d_bias_ptr + i, tl.sum(upper * constant, axis=0).to(kind), mask=i < channels)
    d_lower = tl.zeros((M, M), dtype=tl.float64)
    grad_bias = _line(grad_bias_ptr, rows, channels)
    for k in range(channels):
        grad = tl.load(grad_weight_ptr + rows * channels + k, mask=rows < channels, other=0.0).to(tl.float64)
        grad *= tl.exp(tl.load(log_scale_ptr + k).to(tl.float64))
        grad += grad_bias * tl.load(bias_ptr + k).to(tl.float64)
        d_lower += grad * _upper_at(upper_ptr, columns, k, diagonal, channels)
    permuted = tl.load(permutation_ptr + rows, mask=rows < channels, other=0).to(tl.int32)
    d_lower = tl.where(columns < permuted, d_lower, 0.0)
    tl.store(d_lower_ptr + permuted * channels + columns, d_lower.to(kind), mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------


def _tile(channels: Sequence[int]) -> tuple[int, int]:
    """(side of the tiles, warps)."""
    side = max(2, power_of_two(max(channels)))
    return side, next(warps for largest, warps in WARPS if side <= largest)


def channels_of(params: Sequence[Tensor]) -> tuple[int, ...]:
    """The channels of each layer, from its diagonal."""
    return tuple(log_s.shape[0] for log_s in params[2::TENSORS])


def launch_lu_mixing(
    params: Sequence[Tensor], pixels: Sequence[int], affine: Sequence[bool], inverse: bool
) -> tuple[Tensor, Tensor]:
    """The maps of all layers in a flat buffer, see `map_places`, and log-determinants (S,) in float64."""
    channels = channels_of(params)
    places, size = map_places(channels, tuple(affine), inverse)
    sizes = [n for c, count, place in zip(channels, pixels, places, strict=True) for n in (c, count, *place)]
    out = torch.empty(size, dtype=params[0].dtype, device=params[0].device)
    logdets = torch.empty(len(channels), dtype=torch.float64, device=out.device)
    side, warps = _tile(channels)
    launch(
        _lu_fwd_kernel, len(channels), out, warps,
        pointer_table(params), integer_table(sizes, out), out, logdets, TENSORS=TENSORS, M=side,
        INVERSE=inverse,
    )  # fmt: skip
    return out, logdets


def launch_lu_mixing_backward(
    grad: Tensor, grad_logdets: Tensor, params: Sequence[Tensor], pixels: Sequence[int]
) -> Tensor:
    """Gradients of the parameters of all layers in a flat buffer, see `param_places`."""
    channels = channels_of(params)
    places, size = param_places(channels)
    starts, start = [], 0
    for c in channels:
        starts.append(start)
        start += c * c + c
    sizes = [
        n
        for c, count, begin, place in zip(channels, pixels, starts, places, strict=True)
        for n in (c, count, begin, place.lower)
    ]
    d = torch.empty(size, dtype=params[0].dtype, device=grad.device)
    side, warps = _tile(channels)
    launch(
        _lu_bwd_kernel, len(channels), d, warps,
        pointer_table(params), integer_table(sizes, d), grad.contiguous(), grad_logdets.contiguous(), d,
        TENSORS=TENSORS, M=side,
    )  # fmt: skip
    return d
