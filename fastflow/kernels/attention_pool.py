r"""The poolings and gates of CBAM (convolutional block attention), and means over pixels.

With gates :math:`g = \sigma(\text{channel logits})` (B, C) and :math:`s = \sigma(\text{spatial logits})` (B, 1, H, W):

.. math:: \text{pool\_pixels}: \Big(\frac1{HW}\sum_p x_{cp}, \max_p x_{cp}\Big), \quad
          \text{pool\_channels}: \Big(\frac1C\sum_c g_c x_{cp}, \max_c g_c x_{cp}\Big), \quad
          \text{apply\_gates}: y_{cp} = x_{cp} g_c s_p

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last, with any batch stride; logits may have float dtypes of their
own. Gates, products and sums are float32 (float64 for float64 x), results have the dtype of x. The gated x of `pool_channels` is
never in memory.

The poolings also hand x itself on. Whoever reads x after them reads that one, and so the gradients of mean and max are added to
the gradient of x by the pass that makes it, instead of by passes of their own.

Backward, with q the gradient of the handed-on x, m and t those of mean and max, and a the place of the first maximum (in the
order h*W + w, or of the channels, as ATen does; a NaN counts as the maximum):

.. math:: dx_{cp} = q_{cp} + m_c / HW + t_c [p = a_c]

.. math:: r_{cp} = g_c (m_p / C + t_p [c = a_p]), \quad dx_{cp} = q_{cp} + r_{cp}, \quad
          d\text{logit}_c = (1 - g_c) \sum_p x_{cp} r_{cp}

and for `apply_gates` dx = dy g s, dlogit_c = (1 - g_c) sum_p x dx, dlogit_p = (1 - s_p) sum_c x dx. Source: Woo et al., 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

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
    empty_image,
    is_channels_last,
    laid_out,
    refuse_second_derivative,
    register,
    sum_per_sample,
    takes_reference,
)

if TYPE_CHECKING:
    import triton.language as tl


# -- definition -----------------------------------------------------------------------------------------------------------


def pool_pixels_reference(x: Tensor) -> Tensor:
    """The definition, in plain ATen: (2, B, C)."""
    flat = x.flatten(2)
    return torch.stack((average_pixels_reference(x), flat.max(dim=2).values))


def average_pixels_reference(x: Tensor) -> Tensor:
    """The definition, in plain ATen: (B, C)."""
    return x.flatten(2).mean(dim=2, dtype=accumulator(x.dtype)).to(x.dtype)


def pool_channels_reference(x: Tensor, channel_logits: Tensor) -> Tensor:
    """The definition, in plain ATen: (B, 2, H, W)."""
    gated = x.to(accumulator(x.dtype)) * _gates(x, channel_logits)
    return torch.stack((gated.mean(dim=1), gated.max(dim=1).values), dim=1).to(x.dtype)


def apply_gates_reference(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    wide = accumulator(x.dtype)
    return (x.to(wide) * _gates(x, channel_logits) * torch.sigmoid(spatial_logits.to(wide))).to(x.dtype)


def _gates(x: Tensor, channel_logits: Tensor) -> Tensor:
    return torch.sigmoid(channel_logits.to(accumulator(x.dtype)))[:, :, None, None]


# -- on a CPU -------------------------------------------------------------------------------------------------------------
# By hand, in passes that ATen vectorises: `amax` is, a `max` with indices is not, nor is a comparison into booleans or a
# selection by them. A first maximum is found from its value, by a comparison into floats, which count to EXACT. Few samples at
# a time, so that passes after the first find them in cache, and so that nothing as large as x is allocated but results.

EXACT = 2**24
PART = 2**17


def _in_parts(function: Callable[..., tuple[Tensor, ...]], out: Tensor | None, *values: Tensor | None) -> tuple[Tensor, ...]:
    """`function(out, *values)` on as many samples at a time as have about PART elements. A sample's results are its own."""
    x = values[0]
    assert x is not None
    batch, channels, h, w = x.shape
    size = max(1, PART // (channels * h * w))
    if batch <= size:
        return function(out, *values)
    parts = [slice(start, start + size) for start in range(0, batch, size)]
    results = [function(*(None if v is None else v[part] for v in (out, *values))) for part in parts]
    return tuple(torch.cat(pieces) for pieces in zip(*results, strict=True))


def _sigmoid_on_cpu(logits: Tensor, wide: torch.dtype) -> Tensor:
    """The gates. ATen's sigmoid rounds the elements of an incomplete vector otherwise: bits would hang on a sample's place."""
    return logits.to(wide).neg().exp_().add_(1.0).reciprocal_()


def _max_pixels(x: Tensor) -> Tensor:
    if not is_channels_last(x):
        return x.amax(dim=(2, 3))
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(b, h, w * c).amax(dim=1)
    return rows.view(b, w, c).amax(dim=1)


def _sum_pixels(x: Tensor) -> Tensor:
    # The sum of one long row is split over threads, that of several is not.
    return sum_per_sample(x)[:, None] if x.shape[1] == 1 else x.sum(dim=(2, 3))


def _has_nan(x: Tensor) -> bool:
    """Whether there is a NaN, or perhaps only infinities of both signs."""
    return math.isnan(float(x.sum()))


def _first_pixels(x: Tensor, top: Tensor) -> Tensor:
    """Where each channel of x first is `top`, its maximum; (B, C) int32."""
    h, w = x.shape[2:]
    if h * w >= EXACT or _has_nan(top):
        return x.flatten(2).max(dim=2).indices.to(torch.int32)
    (first,) = _in_parts(_first_pixels_of_part, None, x, top)
    return first


def _first_pixels_of_part(_: None, x: Tensor, top: Tensor) -> tuple[Tensor]:
    h, w = x.shape[2:]
    order = torch.arange(h * w, 0, -1, dtype=x.dtype).view(h, w)
    hit = torch.eq(x, top[:, :, None, None], out=torch.empty_like(x))
    return ((h * w - _max_pixels(hit.mul_(order))).to(torch.int32),)


def _first_channels(x: Tensor, top: Tensor) -> Tensor:
    """Where each pixel of x first is `top`, its maximum over channels; (B, H, W) int32. Overwrites x."""
    if _has_nan(top):
        return x.max(dim=1).indices.to(torch.int32)
    channels = x.shape[1]
    order = torch.arange(channels, 0, -1, dtype=x.dtype)[:, None, None]
    return (channels - x.eq_(top[:, None]).mul_(order).amax(dim=1)).to(torch.int32)


def _pixels_on_cpu(x: Tensor, maximum: bool, index: bool) -> tuple[Tensor, Tensor]:
    inner = laid_out(x, is_channels_last(x)).to(accumulator(x.dtype))
    mean = _sum_pixels(inner) / (x.shape[2] * x.shape[3])
    if not maximum:
        return mean[None].to(x.dtype), x.new_empty(0, dtype=torch.int32)
    top = _max_pixels(inner)
    first = _first_pixels(inner, top) if index else x.new_empty(0, dtype=torch.int32)
    return torch.stack((mean, top)).to(x.dtype), first


def _pixels_backward_on_cpu(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    wide = accumulator(grad.dtype)
    mean = (grad[0].to(wide) / (height * width))[:, :, None, None]
    d_x = empty_image((*grad.shape[1:], height, width), grad, channels_last, wide)
    if passed is None:
        d_x.copy_(mean)
    else:
        torch.add(laid_out(passed, channels_last), mean, out=d_x)
    if index is not None:
        top, at = grad[1].to(wide), index.to(torch.int64)
        if channels_last:
            d_x.permute(0, 2, 3, 1).flatten(1, 2).scatter_add_(1, at[:, None], top[:, None])
        else:
            d_x.flatten(2).scatter_add_(2, at[:, :, None], top[:, :, None])
    return d_x.to(grad.dtype)


def _channels_on_cpu(x: Tensor, channel_logits: Tensor, index: bool) -> tuple[Tensor, Tensor]:
    inner, gates = laid_out(x, is_channels_last(x)), _sigmoid_on_cpu(channel_logits, accumulator(x.dtype))[:, :, None, None]
    pooled, *first = _in_parts(_channels_of_part_with_index if index else _channels_of_part, None, inner, gates)
    return pooled.to(x.dtype).contiguous(), first[0].contiguous() if index else x.new_empty(0, dtype=torch.int32)


def _channels_of_part(_: None, x: Tensor, gates: Tensor) -> tuple[Tensor]:
    gated = x * gates
    return (torch.stack((gated.sum(dim=1).div_(x.shape[1]), gated.amax(dim=1)), dim=1),)


def _channels_of_part_with_index(_: None, x: Tensor, gates: Tensor) -> tuple[Tensor, Tensor]:
    gated = x * gates
    mean, top = gated.sum(dim=1).div_(x.shape[1]), gated.amax(dim=1)
    return torch.stack((mean, top), dim=1), _first_channels(gated, top)


def _channels_backward_on_cpu(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    last, wide = is_channels_last(x), accumulator(x.dtype)
    d_x = empty_image(x.shape, x, last, wide)
    passed = None if passed is None else laid_out(passed, last)
    gates = _sigmoid_on_cpu(channel_logits, wide)[:, :, None, None]
    (products,) = _in_parts(_channels_backward_of_part, d_x, laid_out(x, last), gates, grad.to(wide), index, passed)
    d_logits = torch.ops.aten.sigmoid_backward(products, gates.flatten(1))
    return d_x.to(x.dtype), d_logits.to(channel_logits.dtype).contiguous()


def _channels_backward_of_part(
    d_x: Tensor, x: Tensor, gates: Tensor, grad: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor]:
    number = torch.arange(x.shape[1], dtype=d_x.dtype)[:, None, None]
    hit = torch.eq(number, index[:, None].to(d_x.dtype), out=torch.empty_like(d_x))
    share = torch.addcmul(grad[:, :1] / x.shape[1], hit, grad[:, 1:], out=hit)
    if passed is None:
        torch.mul(share, gates, out=d_x)
    else:
        torch.addcmul(passed.to(d_x.dtype), share, gates, out=d_x)
    return (_sum_pixels(share.mul_(x)),)


def _gates_on_cpu(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    last, wide = is_channels_last(x), accumulator(x.dtype)
    y = empty_image(x.shape, x, last, wide)
    _in_parts(
        _gates_of_part,
        y,
        laid_out(x, last),
        _sigmoid_on_cpu(channel_logits, wide)[:, :, None, None],
        _sigmoid_on_cpu(spatial_logits, wide),
    )
    return y.to(x.dtype)


def _gates_of_part(y: Tensor, x: Tensor, gates: Tensor, spatial: Tensor) -> tuple[()]:
    torch.mul(x, gates, out=y).mul_(spatial)
    return ()


def _gates_backward_on_cpu(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    last, wide = is_channels_last(x), accumulator(x.dtype)
    gates, spatial = _sigmoid_on_cpu(channel_logits, wide)[:, :, None, None], _sigmoid_on_cpu(spatial_logits, wide)
    d_x = empty_image(x.shape, x, last, wide)
    d_channel, d_spatial = _in_parts(_gates_backward_of_part, d_x, laid_out(x, last), laid_out(grad, last), gates, spatial)
    return d_x.to(x.dtype), d_channel.to(channel_logits.dtype).contiguous(), d_spatial.to(spatial_logits.dtype).contiguous()


def _gates_backward_of_part(d_x: Tensor, x: Tensor, grad: Tensor, gates: Tensor, spatial: Tensor) -> tuple[Tensor, Tensor]:
    torch.mul(grad, gates, out=d_x).mul_(spatial)
    products = d_x * x
    per_channel, per_pixel = _sum_pixels(products), products.sum(dim=1, keepdim=True)
    return (
        torch.addcmul(per_channel, per_channel, gates.flatten(1), value=-1),
        torch.addcmul(per_pixel, per_pixel, spatial, value=-1),
    )


# -- kernels --------------------------------------------------------------------------------------------------------------
# A program takes a tile of channels by pixels of one sample. Suffix `_v`: in units of V elements, so that the compiler knows the
# divisibility.


@kernel
def _rank(x):
    """Integers in the order of x: both zeros are one, a NaN is above all."""
    # Adding 0 makes a zero positive.
    if x.dtype == tl.float64:
        bits = (x + 0.0).to(tl.int64, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFFFFFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFFFFFFFFFF, bits))
    else:
        bits = (x + 0.0).to(tl.int32, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@kernel
def _ranked(rank, ACC: tl.constexpr):
    """The value of a rank."""
    if rank.dtype == tl.int64:
        return tl.where(rank < 0, rank ^ 0x7FFFFFFFFFFFFFFF, rank).to(ACC, bitcast=True)
    else:
        return tl.where(rank < 0, rank ^ 0x7FFFFFFF, rank).to(ACC, bitcast=True)


@kernel
def _first(rank, at, top):
    """The places where the highest rank is, others last."""
    return tl.where(rank == top, at, 0x7FFFFFFF)


@kernel
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@kernel
def _pool_pixels_kernel(
    x_ptr, mean_ptr, top_ptr, index_ptr, sums_ptr, ranks_ptr, firsts_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, MAXIMUM: tl.constexpr, INDEX: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    real = c < CHANNELS
    x_ptr += b * x_stride_v * V
    total = tl.zeros((ROWS, BLOCK), ACC)
    rank = _rank(tl.full((ROWS, BLOCK), float("-inf"), ACC))
    at = tl.zeros((ROWS, BLOCK), tl.int32) + (chunk * (STEPS * BLOCK) + tl.arange(0, BLOCK)).to(tl.int32)[None, :]
    for step in range(STEPS):
        p = (chunk * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = real[:, None] & (p < pixels)[None, :]
        x = tl.load(x_ptr + place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST), mask=inside, other=0.0).to(ACC)
        total += x
        if MAXIMUM:
            here = _rank(tl.where(inside, x, float("-inf")))
            if INDEX:
                at = tl.where(here > rank, p.to(tl.int32)[None, :], at)
            rank = tl.maximum(rank, here)
    place = b * CHANNELS + c
    if SPLIT:
        place = (b * n_chunks + chunk) * CHANNELS + c
        tl.store(sums_ptr + place, tl.sum(total, axis=1), mask=real)
    else:
        mean = tl.sum(total, axis=1) / tl.cast(pixels, ACC)
        tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=real)
    if MAXIMUM:
        top = tl.max(rank, axis=1)
        if SPLIT:
            tl.store(ranks_ptr + place, top, mask=real)
        else:
            tl.store(top_ptr + place, _ranked(top, ACC).to(top_ptr.dtype.element_ty), mask=real)
        if INDEX:
            where = tl.min(_first(rank, at, top[:, None]), axis=1)
            if SPLIT:
                tl.store(firsts_ptr + place, where, mask=real)
            else:
                tl.store(index_ptr + place, where, mask=real)


@kernel
def _join_pixels_kernel(
    sums_ptr, ranks_ptr, firsts_ptr, mean_ptr, top_ptr, index_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    MAXIMUM: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The poolings of a channel from those of its chunks, in their order."""
    b, block = locate(tl.program_id(0), (CHANNELS + ROWS - 1) // ROWS, False)
    c = block * ROWS + tl.arange(0, ROWS)
    real = c < CHANNELS
    total = tl.zeros((ROWS, BLOCK), ACC)
    lowest = _rank(tl.full((ROWS, BLOCK), float("-inf"), ACC))
    rank = lowest
    at = tl.full((ROWS, BLOCK), 0x7FFFFFFF, tl.int32)
    for start in range(0, n_chunks, BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = real[:, None] & (k < n_chunks)[None, :]
        place = (b * n_chunks + k)[None, :] * CHANNELS + c[:, None]
        total += tl.load(sums_ptr + place, mask=inside, other=0.0)
        if MAXIMUM:
            here = tl.where(inside, tl.load(ranks_ptr + place, mask=inside, other=0), lowest)
            if INDEX:
                first = tl.load(firsts_ptr + place, mask=inside, other=0x7FFFFFFF)
                # Among equals the earlier chunk stays; a lane that has seen nothing holds the largest place.
                at = tl.where((here > rank) | ((here == rank) & (first < at)), first, at)
            rank = tl.maximum(rank, here)
    place = b * CHANNELS + c
    mean = tl.sum(total, axis=1) / tl.cast(elements(pixels_v, V, WIDE), ACC)
    tl.store(mean_ptr + place, mean.to(mean_ptr.dtype.element_ty), mask=real)
    if MAXIMUM:
        top = tl.max(rank, axis=1)
        tl.store(top_ptr + place, _ranked(top, ACC).to(top_ptr.dtype.element_ty), mask=real)
        if INDEX:
            tl.store(index_ptr + place, tl.min(_first(rank, at, top[:, None]), axis=1), mask=real)


@kernel
def _pool_pixels_bwd_kernel(
    mean_ptr, top_ptr, index_ptr, passed_ptr, dx_ptr, passed_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, MAXIMUM: tl.constexpr, PASSED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = c < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    mean = tl.load(mean_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC) / tl.cast(pixels, ACC)
    dx = tl.zeros((ROWS, BLOCK), ACC) + mean[:, None]
    if MAXIMUM:
        top = tl.load(top_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
        at = tl.load(index_ptr + b * CHANNELS + c, mask=real, other=0)
        dx += tl.where(at[:, None] == p[None, :], top[:, None], 0.0)
    if PASSED:
        dx += tl.load(passed_ptr + b * passed_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    tl.store(dx_ptr + b * (CHANNELS * pixels) + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def _pool_channels_kernel(
    x_ptr, logits_ptr, pooled_ptr, index_ptr, x_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    x_ptr += b * x_stride_v * V
    total = tl.zeros((ROWS, BLOCK), ACC)
    rank = _rank(tl.full((ROWS, BLOCK), float("-inf"), ACC))
    at = tl.zeros((ROWS, BLOCK), tl.int32) + tl.arange(0, ROWS)[:, None]
    for start in range(0, CHANNELS, ROWS):
        c = start + tl.arange(0, ROWS)
        inside = (c < CHANNELS)[:, None] & (p < pixels)[None, :]
        gate = _sigmoid(tl.load(logits_ptr + b * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(ACC))
        x = (
            tl.load(x_ptr + place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST), mask=inside, other=0.0).to(ACC)
            * gate[:, None]
        )
        total += x
        here = _rank(tl.where(inside, x, float("-inf")))
        if INDEX:
            at = tl.where(here > rank, c[:, None], at)
        rank = tl.maximum(rank, here)
    pooled_ptr += b * (2 * pixels) + p
    top = tl.max(rank, axis=0)
    mean = tl.sum(total, axis=0) * (1.0 / CHANNELS)
    tl.store(pooled_ptr, mean.to(pooled_ptr.dtype.element_ty), mask=p < pixels)
    tl.store(pooled_ptr + pixels, _ranked(top, ACC).to(pooled_ptr.dtype.element_ty), mask=p < pixels)
    if INDEX:
        tl.store(index_ptr + b * pixels + p, tl.min(_first(rank, at, top[None, :]), axis=0), mask=p < pixels)


@kernel
def _pool_channels_bwd_kernel(
    grad_ptr, x_ptr, logits_ptr, index_ptr, passed_ptr, dx_ptr, partial_ptr, d_logits_ptr,
    grad_stride_v, x_stride_v, passed_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, PASSED: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = c < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    grad_ptr += b * grad_stride_v * V + p
    mean = tl.load(grad_ptr, mask=p < pixels, other=0.0).to(ACC) * (1.0 / CHANNELS)
    top = tl.load(grad_ptr + pixels, mask=p < pixels, other=0.0).to(ACC)
    at = tl.load(index_ptr + b * pixels + p, mask=p < pixels, other=0)
    logit = tl.load(logits_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    dx = (mean[None, :] + tl.where(at[None, :] == c[:, None], top[None, :], 0.0)) * _sigmoid(logit)[:, None]
    product = tl.sum(x * dx, axis=1)
    if SPLIT:
        tl.store(partial_ptr + (b * n_chunks + chunk) * CHANNELS + c, product, mask=real)
    else:
        d_logits = product * _sigmoid(-logit)
        tl.store(d_logits_ptr + b * CHANNELS + c, d_logits.to(d_logits_ptr.dtype.element_ty), mask=real)
    if PASSED:
        dx += tl.load(passed_ptr + b * passed_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    tl.store(dx_ptr + b * (CHANNELS * pixels) + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@kernel
def _join_logits_kernel(
    partial_ptr, logits_ptr, d_logits_ptr, n_chunks,
    CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the logit of a channel from the sums of its chunks, in their order."""
    b, block = locate(tl.program_id(0), (CHANNELS + ROWS - 1) // ROWS, False)
    c = block * ROWS + tl.arange(0, ROWS)
    real = c < CHANNELS
    total = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, n_chunks, BLOCK):
        k = start + tl.arange(0, BLOCK)
        place = (b * n_chunks + k)[None, :] * CHANNELS + c[:, None]
        total += tl.load(partial_ptr + place, mask=real[:, None] & (k < n_chunks)[None, :], other=0.0)
    logit = tl.load(logits_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
    d_logits = tl.sum(total, axis=1) * _sigmoid(-logit)
    tl.store(d_logits_ptr + b * CHANNELS + c, d_logits.to(d_logits_ptr.dtype.element_ty), mask=real)


@kernel
def _apply_gates_kernel(
    x_ptr, channel_ptr, spatial_ptr, y_ptr, x_stride_v, spatial_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, ROWS, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    c = first + tl.arange(0, ROWS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = (c < CHANNELS)[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    gate = _sigmoid(tl.load(channel_ptr + b * CHANNELS + c, mask=c < CHANNELS, other=0.0).to(ACC))
    spatial = _sigmoid(tl.load(spatial_ptr + b * spatial_stride_v * V + p, mask=p < pixels, other=0.0).to(ACC))
    x = tl.load(x_ptr + b * x_stride_v * V + place, mask=inside, other=0.0).to(ACC)
    y = x * gate[:, None] * spatial[None, :]
    tl.store(y_ptr + b * (CHANNELS * pixels) + place, y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def _apply_gates_bwd_kernel(
    grad_ptr, x_ptr, channel_ptr, spatial_ptr, dx_ptr, partial_ptr, d_channel_ptr, d_spatial_ptr,
    grad_stride_v, x_stride_v, spatial_stride_v, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All channels of a run of pixels, so that the sum over channels is whole."""
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    pixels = elements(pixels_v, V, WIDE)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    spatial_logit = tl.load(spatial_ptr + b * spatial_stride_v * V + p, mask=p < pixels, other=0.0).to(ACC)
    spatial = _sigmoid(spatial_logit)
    grad_ptr += b * grad_stride_v * V
    x_ptr += b * x_stride_v * V
    dx_ptr += b * (CHANNELS * pixels)
    total = tl.zeros((ROWS, BLOCK), ACC)
    for start in range(0, CHANNELS, ROWS):
        c = start + tl.arange(0, ROWS)
        real = c < CHANNELS
        inside = real[:, None] & (p < pixels)[None, :]
        place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
        logit = tl.load(channel_ptr + b * CHANNELS + c, mask=real, other=0.0).to(ACC)
        dx = tl.load(grad_ptr + place, mask=inside, other=0.0).to(ACC) * _sigmoid(logit)[:, None] * spatial[None, :]
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        product = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC) * dx
        total += product
        if SPLIT:
            tl.store(partial_ptr + (b * n_chunks + chunk) * CHANNELS + c, tl.sum(product, axis=1), mask=real)
        else:
            d_channel = tl.sum(product, axis=1) * _sigmoid(-logit)
            tl.store(d_channel_ptr + b * CHANNELS + c, d_channel.to(d_channel_ptr.dtype.element_ty), mask=real)
    d_spatial = tl.sum(total, axis=0) * _sigmoid(-spatial_logit)
    tl.store(d_spatial_ptr + b * pixels + p, d_spatial.to(d_spatial_ptr.dtype.element_ty), mask=p < pixels)


# -- launchers ------------------------------------------------------------------------------------------------------------

ELEMENTS = 4096
SPAN = 1024


class _Tile(NamedTuple):
    rows: int
    block: int
    warps: int

    def chunks(self, pixels: int) -> int:
        return cdiv(pixels, self.block)

    def blocks(self, channels: int) -> int:
        return cdiv(channels, self.rows)


def _elements(acc: torch.dtype) -> int:
    return ELEMENTS // 2 if acc == torch.float64 else ELEMENTS


def _warps(rows: int, block: int) -> int:
    return min(8, max(1, rows * block // 512))


def _plane_tile(channels: int, pixels: int, channels_last: bool, acc: torch.dtype, longest: int) -> _Tile:
    """Some channels by a long run of pixels, at most `longest`; channels_last: enough channels for whole memory sectors."""
    size = _elements(acc)
    if channels_last:
        rows = min(32, power_of_two(channels))
        block = min(power_of_two(pixels), size // rows)
    else:
        block = min(power_of_two(pixels), longest, size)
        rows = min(power_of_two(channels), size // block)
    return _Tile(rows, block, _warps(rows, block))


def _column_tile(channels: int, pixels: int, acc: torch.dtype) -> _Tile:
    """All channels, or 128 at a time, by a run of pixels."""
    size = _elements(acc)
    rows = min(size // 32, power_of_two(channels))
    block = min(power_of_two(pixels), size // rows, 256)
    return _Tile(rows, block, _warps(rows, block))


def _join_tile(channels: int, chunks: int) -> _Tile:
    block = min(64, power_of_two(chunks))
    rows = min(power_of_two(channels), 1024 // block)
    return _Tile(rows, block, _warps(rows, block))


def _pixels_launch(x: Tensor, maximum: bool, index: bool) -> tuple[Tensor, Tensor]:
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    pooled = torch.empty(2 if maximum else 1, batch, channels, dtype=x.dtype, device=x.device)
    first = torch.empty((batch, channels) if index else 0, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return pooled, first
    x = laid_out(x, channels_last)
    tile = _plane_tile(channels, pixels, channels_last, acc, ELEMENTS)
    # Where a block is short, a program goes on over several.
    steps = cdiv(min(pixels, SPAN), tile.block) if channels_last else 1
    chunks = cdiv(pixels, tile.block * steps)
    v = vector_width(pixels, x.stride(0))
    top, where = pooled[1] if maximum else None, first if index else None
    parts = (chunks if chunks > 1 else 0, batch * channels)
    sums = torch.empty(parts, dtype=acc, device=x.device)
    ranks = torch.empty(parts, dtype=torch.int64 if acc == torch.float64 else torch.int32, device=x.device) if maximum else None
    firsts = torch.empty(parts, dtype=torch.int32, device=x.device) if index else None
    partial = (sums, ranks, firsts) if chunks > 1 else (None, None, None)
    shared = {"V": v, "CHANNELS": channels, "ACC": triton_dtype(acc), "MAXIMUM": maximum, "INDEX": index,
              "WIDE": is_wide(channels * pixels, _elements(acc) * steps)}  # fmt: skip
    launch(
        _pool_pixels_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        x, pooled[0], top, where, *partial, x.stride(0) // v, pixels // v, chunks,
        ROWS=tile.rows, BLOCK=tile.block, STEPS=steps, CHANNELS_LAST=channels_last, SPLIT=chunks > 1, **shared,
    )  # fmt: skip
    if chunks > 1:
        join = _join_tile(channels, chunks)
        launch(
            _join_pixels_kernel, batch * join.blocks(channels), x, join.warps,
            *partial, pooled[0], top, where, pixels // v, chunks, ROWS=join.rows, BLOCK=join.block, **shared,
        )  # fmt: skip
    return pooled, first


def _pixels_backward_launch(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    acc = accumulator(grad.dtype)
    _, batch, channels = grad.shape
    pixels = height * width
    dx = empty_image((batch, channels, height, width), grad, channels_last)
    if dx.numel() == 0:
        return dx
    grad = grad.contiguous()
    passed = None if passed is None else laid_out(passed, channels_last)
    stride = channels * pixels if passed is None else passed.stride(0)
    tile, v = _plane_tile(channels, pixels, channels_last, acc, SPAN), vector_width(pixels, stride)
    chunks = tile.chunks(pixels)
    launch(
        _pool_pixels_bwd_kernel, batch * tile.blocks(channels) * chunks, grad, tile.warps,
        grad[0], None if index is None else grad[1], index, passed, dx, stride // v, pixels // v, chunks,
        V=v, CHANNELS=channels, ROWS=tile.rows, BLOCK=tile.block, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last,
        MAXIMUM=index is not None, PASSED=passed is not None, WIDE=is_wide(channels * pixels, ELEMENTS),
    )  # fmt: skip
    return dx


def _channels_launch(x: Tensor, channel_logits: Tensor, index: bool) -> tuple[Tensor, Tensor]:
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    pooled = torch.empty(batch, 2, h, w, dtype=x.dtype, device=x.device)
    first = torch.empty((batch, h, w) if index else 0, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return pooled, first
    x = laid_out(x, channels_last)
    tile, v = _column_tile(channels, pixels, acc), vector_width(pixels, x.stride(0))
    chunks = tile.chunks(pixels)
    launch(
        _pool_channels_kernel, batch * chunks, x, tile.warps,
        x, channel_logits.contiguous(), pooled, first if index else None, x.stride(0) // v, pixels // v, chunks,
        V=v, CHANNELS=channels, ROWS=tile.rows, BLOCK=tile.block, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last,
        INDEX=index, WIDE=is_wide(channels * pixels, ELEMENTS),
    )  # fmt: skip
    return pooled, first


def _channels_backward_launch(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    dx = empty_image(x.shape, x, channels_last)
    d_logits = torch.empty(batch, channels, dtype=channel_logits.dtype, device=x.device)
    if x.numel() == 0:
        return dx, d_logits
    grad, x, channel_logits = laid_out(grad, False), laid_out(x, channels_last), channel_logits.contiguous()
    passed = None if passed is None else laid_out(passed, channels_last)
    strides = (grad.stride(0), x.stride(0), x.stride(0) if passed is None else passed.stride(0))
    tile, v = _plane_tile(channels, pixels, channels_last, acc, SPAN), vector_width(pixels, *strides)
    chunks = tile.chunks(pixels)
    partial = torch.empty(batch, chunks, channels, dtype=acc, device=x.device) if chunks > 1 else None
    launch(
        _pool_channels_bwd_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        grad, x, channel_logits, index, passed, dx, partial, d_logits, *(stride // v for stride in strides), pixels // v, chunks,
        V=v, CHANNELS=channels, ROWS=tile.rows, BLOCK=tile.block, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last,
        PASSED=passed is not None, SPLIT=chunks > 1, WIDE=is_wide(channels * pixels, ELEMENTS),
    )  # fmt: skip
    _join_logits(partial, channel_logits, d_logits)
    return dx, d_logits


def _join_logits(partial: Tensor | None, channel_logits: Tensor, d_logits: Tensor) -> None:
    if partial is None:
        return
    batch, chunks, channels = partial.shape
    join = _join_tile(channels, chunks)
    launch(
        _join_logits_kernel, batch * join.blocks(channels), partial, join.warps, partial, channel_logits, d_logits, chunks,
        CHANNELS=channels, ROWS=join.rows, BLOCK=join.block, ACC=triton_dtype(partial.dtype),
    )  # fmt: skip


def _gates_launch(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    batch, channels, h, w = x.shape
    pixels = h * w
    y = empty_image(x.shape, x, channels_last)
    if x.numel() == 0:
        return y
    x, spatial_logits = laid_out(x, channels_last), laid_out(spatial_logits, False)
    strides = (x.stride(0), spatial_logits.stride(0))
    tile, v = _plane_tile(channels, pixels, channels_last, acc, SPAN), vector_width(pixels, *strides)
    chunks = tile.chunks(pixels)
    launch(
        _apply_gates_kernel, batch * tile.blocks(channels) * chunks, x, tile.warps,
        x, channel_logits.contiguous(), spatial_logits, y, *(stride // v for stride in strides), pixels // v, chunks,
        V=v, CHANNELS=channels, ROWS=tile.rows, BLOCK=tile.block, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last,
        WIDE=is_wide(channels * pixels, ELEMENTS),
    )  # fmt: skip
    return y


def _gates_backward_launch(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
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
    tile, v = _column_tile(channels, pixels, acc), vector_width(pixels, *strides)
    chunks = tile.chunks(pixels)
    partial = torch.empty(batch, chunks, channels, dtype=acc, device=x.device) if chunks > 1 else None
    launch(
        _apply_gates_bwd_kernel, batch * chunks, x, tile.warps,
        grad, x, channel_logits, spatial_logits, dx, partial, d_channel, d_spatial,
        *(stride // v for stride in strides), pixels // v, chunks,
        V=v, CHANNELS=channels, ROWS=tile.rows, BLOCK=tile.block, ACC=triton_dtype(acc), CHANNELS_LAST=channels_last,
        SPLIT=chunks > 1, WIDE=is_wide(channels * pixels, ELEMENTS),
    )  # fmt: skip
    _join_logits(partial, channel_logits, d_channel)
    return dx, d_channel, d_spatial


# -- ops and autograd -----------------------------------------------------------------------------------------------------


def _pixels_fake(x: Tensor, maximum: bool, index: bool) -> tuple[Tensor, Tensor]:
    batch, channels = x.shape[:2]
    first = x.new_empty((batch, channels) if index else (0,), dtype=torch.int32)
    return x.new_empty(2 if maximum else 1, batch, channels), first


def _pixels_backward_fake(
    grad: Tensor, index: Tensor | None, passed: Tensor | None, height: int, width: int, channels_last: bool
) -> Tensor:
    return empty_image((*grad.shape[1:], height, width), grad, channels_last)


def _channels_fake(x: Tensor, channel_logits: Tensor, index: bool) -> tuple[Tensor, Tensor]:
    batch, _, h, w = x.shape
    return x.new_empty(batch, 2, h, w), x.new_empty((batch, h, w) if index else (0,), dtype=torch.int32)


def _channels_backward_fake(
    grad: Tensor, x: Tensor, channel_logits: Tensor, index: Tensor, passed: Tensor | None
) -> tuple[Tensor, Tensor]:
    return empty_image(x.shape, x, is_channels_last(x)), channel_logits.new_empty(channel_logits.shape)


def _gates_backward_fake(
    grad: Tensor, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        empty_image(x.shape, x, is_channels_last(x)), channel_logits.new_empty(channel_logits.shape),
        spatial_logits.new_empty(spatial_logits.shape),
    )  # fmt: skip


_pixels = register(
    "pool_pixels(Tensor x, bool maximum, bool index) -> (Tensor, Tensor)",
    reference=_pixels_on_cpu,
    triton=_pixels_launch,
    fake=_pixels_fake,
)
_pixels_backward = register(
    "pool_pixels_backward(Tensor grad, Tensor? index, Tensor? passed, SymInt height, SymInt width, bool channels_last) -> Tensor",
    reference=_pixels_backward_on_cpu,
    triton=_pixels_backward_launch,
    fake=_pixels_backward_fake,
)
_channels = register(
    "pool_channels(Tensor x, Tensor channel_logits, bool index) -> (Tensor, Tensor)",
    reference=_channels_on_cpu,
    triton=_channels_launch,
    fake=_channels_fake,
)
_channels_backward = register(
    "pool_channels_backward(Tensor grad, Tensor x, Tensor channel_logits, Tensor index, Tensor? passed) -> (Tensor, Tensor)",
    reference=_channels_backward_on_cpu,
    triton=_channels_backward_launch,
    fake=_channels_backward_fake,
)
_gate = register(
    "apply_gates(Tensor x, Tensor channel_logits, Tensor spatial_logits) -> Tensor",
    reference=_gates_on_cpu,
    triton=_gates_launch,
    fake=lambda x, channel_logits, spatial_logits: empty_image(x.shape, x, is_channels_last(x)),
)
_gate_backward = register(
    "apply_gates_backward(Tensor grad, Tensor x, Tensor channel_logits, Tensor spatial_logits) -> (Tensor, Tensor, Tensor)",
    reference=_gates_backward_on_cpu,
    triton=_gates_backward_launch,
    fake=_gates_backward_fake,
)


class PoolPixels(torch.autograd.Function):
    """The op under autograd. Saves the place of each maximum; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maximum: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        pooled, index = _pixels(x, maximum, maximum)
        ctx.save_for_backward(index if maximum else None)
        ctx.size, ctx.channels_last = x.shape[2:], is_channels_last(x)
        return pooled, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, None]:
        refuse_second_derivative("pool_pixels")
        if grad is None:
            return passed, None
        (index,) = ctx.saved_tensors
        return _pixels_backward(grad, index, passed, *ctx.size, ctx.channels_last), None


class PoolChannels(torch.autograd.Function):
    """The op under autograd. Saves its inputs and the place of each maximum; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_logits: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        pooled, index = _channels(x, channel_logits, True)
        ctx.save_for_backward(x, channel_logits, index)
        return pooled, x

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, passed: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        refuse_second_derivative("pool_channels")
        if grad is None:
            return passed, None
        d_x, d_logits = _channels_backward(grad, *ctx.saved_tensors, passed)
        return d_x, d_logits


class ApplyGates(torch.autograd.Function):
    """The op under autograd. Saves its inputs; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
        ctx.save_for_backward(x, channel_logits, spatial_logits)
        y: Tensor = _gate(x, channel_logits, spatial_logits)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refuse_second_derivative("apply_gates")
        d_x, d_channel, d_spatial = _gate_backward(grad, *ctx.saved_tensors)
        return d_x, d_channel, d_spatial


def _check(x: Tensor) -> None:
    check_image("x", x)
    channels, h, w = x.shape[1:]
    if channels == 0 or not 0 < h * w < 2**31:
        raise ValueError(f"x must have a channel and from 1 to 2**31 - 1 pixels, got {tuple(x.shape)}")


def _check_logits(name: str, logits: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    if tuple(logits.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(logits.shape)}")
    check_dtype(name, logits)
    check_device(name, logits, x)


def _recorded(*values: Tensor) -> bool:
    """Whether autograd will ask for gradients of any of them."""
    return torch.is_grad_enabled() and any(value.requires_grad for value in values)


def pool_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and max over the pixels of each channel, in one read of `x`.

    Args:
        x: (B, C, H, W), at least one channel and pixel.

    Returns:
        `(pooled, x)`: pooled (2, B, C), mean and max; x as it came, to be used instead of the argument from here on, so that its
        gradient and that of `pooled` are added in one pass.

    Raises:
        ValueError: `x` is not a floating-point image batch, or has no pixels or channels.

    Example:
        >>> pooled, x = pool_pixels(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))
        >>> pooled.flatten().tolist()
        [2.0, 3.0]
    """
    _check(x)
    if takes_reference():
        return pool_pixels_reference(x), x
    if not _recorded(x):
        return _pixels(x, True, False)[0], x
    pooled, x = PoolPixels.apply(x, True)
    return pooled, x


def average_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the pixels of each channel.

    Args:
        x: (B, C, H, W), at least one channel and pixel.

    Returns:
        `(mean, x)`: mean (B, C); x as `pool_pixels` returns it.

    Raises:
        ValueError: `x` is not a floating-point image batch, or has no pixels or channels.

    Example:
        >>> average_pixels(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))[0]
        tensor([[2.]])
    """
    _check(x)
    if takes_reference():
        return average_pixels_reference(x), x
    if not _recorded(x):
        return _pixels(x, False, False)[0].squeeze(0), x
    pooled, x = PoolPixels.apply(x, False)
    return pooled.squeeze(0), x


def pool_channels(x: Tensor, channel_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and max over the gated channels of each pixel, in one read of `x`.

    Args:
        x: (B, C, H, W), at least one channel and pixel.
        channel_logits: (B, C); the gate is their sigmoid.

    Returns:
        `(pooled, x)`: pooled (B, 2, H, W), contiguous, mean and max; x as `pool_pixels` returns it, not gated.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> x = torch.tensor([2.0, 6.0]).view(1, 2, 1, 1)
        >>> pool_channels(x, torch.zeros(1, 2))[0].flatten().tolist()
        [2.0, 3.0]
    """
    _check(x)
    _check_logits("channel_logits", channel_logits, tuple(x.shape[:2]), x)
    if takes_reference():
        return pool_channels_reference(x, channel_logits), x
    if not _recorded(x, channel_logits):
        return _channels(x, channel_logits, False)[0], x
    pooled, x = PoolChannels.apply(x, channel_logits)
    return pooled, x


def apply_gates(x: Tensor, channel_logits: Tensor, spatial_logits: Tensor) -> Tensor:
    """Multiply `x` by a gate per channel and a gate per pixel, sigmoids of their logits.

    Args:
        x: (B, C, H, W), at least one channel and pixel.
        channel_logits: (B, C).
        spatial_logits: (B, 1, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> apply_gates(torch.ones(1, 1, 1, 1), torch.zeros(1, 1), torch.zeros(1, 1, 1, 1)).item()
        0.25
    """
    _check(x)
    _check_logits("channel_logits", channel_logits, tuple(x.shape[:2]), x)
    _check_logits("spatial_logits", spatial_logits, (x.shape[0], 1, *x.shape[2:]), x)
    if takes_reference():
        return apply_gates_reference(x, channel_logits, spatial_logits)
    if not _recorded(x, channel_logits, spatial_logits):
        gated: Tensor = _gate(x, channel_logits, spatial_logits)
        return gated
    y: Tensor = ApplyGates.apply(x, channel_logits, spatial_logits)
    return y
