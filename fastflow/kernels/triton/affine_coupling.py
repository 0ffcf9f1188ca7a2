"""Triton kernels of the masked affine coupling and of the end of a flow step.

A program takes one chunk of one sample in the memory order of x. Masks are contiguous; raw scale and shift
may lie in the other layout (SWAPPED). A name with the suffix `_v` counts in units of V elements, which tells
the compiler what divides it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last, laid_out, mask_bytes
from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, locate, sum_chunks, tanh
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _swap(offs, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """The offset in the other layout of the element that lies at `offs` in this one."""
    if CHANNELS_LAST:
        return (offs % channels) * pixels + offs // channels
    else:
        return (offs % pixels) * channels + offs // pixels


@kernel
def _read_scale_shift(
    raw_ptr, shift_ptr, mask_ptr, offs, inside, channels, pixels,
    BOUND: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """(s, t, passive): s and t are 0 where the mask is passive, and outside of the sample."""
    mask_offs = offs
    if CHANNELS_LAST:
        mask_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
    net_offs = offs
    if SWAPPED:
        net_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
    passive = tl.load(mask_ptr + mask_offs, mask=inside, other=1) != 0
    raw = tl.load(raw_ptr + net_offs, mask=inside, other=0.0).to(ACC)
    shift = tl.load(shift_ptr + net_offs, mask=inside, other=0.0).to(ACC)
    zero = tl.zeros_like(raw)
    return tl.where(passive, zero, tanh(raw) * BOUND), tl.where(passive, zero, shift), passive


@kernel
def _coupling_fwd_kernel(
    x_ptr, raw_ptr, shift_ptr, mask_ptr, next_mask_ptr, affine_ptr, y_ptr, masked_ptr, partial_ptr,
    x_stride_v, raw_stride_v, shift_stride_v, n_v, n_chunks, channels, pixels,
    V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SWAPPED: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    n = elements(n_v, V, INT64_OFFSETS)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    s, t, passive = _read_scale_shift(
        raw_ptr + b * raw_stride_v * V, shift_ptr + b * shift_stride_v * V, mask_ptr, offs, inside,
        channels, pixels, BOUND, ACC, CHANNELS_LAST, SWAPPED,
    )  # fmt: skip
    x = tl.load(x_ptr + b * x_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
    total = tl.sum(s, axis=0)
    if INVERSE:
        y = tl.where(passive, x, (x - t) * tl.exp(-s))
        total = -total
    else:
        y = tl.where(passive, x, x * tl.exp(s) + t)
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
        if INVERSE:
            y = (y - c) * a
        else:
            y = y * a + c
    tl.store(y_ptr + b * n + offs, y.to(y_ptr.dtype.element_ty), mask=inside)
    if NEXT:
        mask_offs = offs
        if CHANNELS_LAST:
            mask_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
        keep = tl.load(next_mask_ptr + mask_offs, mask=inside, other=0) != 0
        masked = tl.where(keep, y, 0.0).to(masked_ptr.dtype.element_ty)
        tl.store(masked_ptr + b * n + offs, masked, mask=inside)
    tl.store(partial_ptr + b * n_chunks + chunk, total)


@kernel
def _coupling_bwd_kernel(
    x_ptr, raw_ptr, shift_ptr, mask_ptr, next_mask_ptr, affine_ptr, grad_y_ptr, grad_logdet_ptr,
    grad_masked_ptr, dx_ptr, draw_ptr, dshift_ptr, partial_ptr,
    x_stride_v, raw_stride_v, shift_stride_v, grad_y_stride_v, grad_masked_stride_v,
    n_v, n_chunks, channels, pixels,
    V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SWAPPED: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    n = elements(n_v, V, INT64_OFFSETS)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    s, t, passive = _read_scale_shift(
        raw_ptr + b * raw_stride_v * V, shift_ptr + b * shift_stride_v * V, mask_ptr, offs, inside,
        channels, pixels, BOUND, ACC, CHANNELS_LAST, SWAPPED,
    )  # fmt: skip
    q = tl.load(grad_logdet_ptr + b).to(ACC)
    g = tl.load(grad_y_ptr + b * grad_y_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
    if NEXT:
        mask_offs = offs
        if CHANNELS_LAST:
            mask_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
        keep = tl.load(next_mask_ptr + mask_offs, mask=inside, other=0) != 0
        extra = tl.load(grad_masked_ptr + b * grad_masked_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
        g += tl.where(keep, extra, 0.0)
    x = tl.load(x_ptr + b * x_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
    # y is the coupling's result before the multiply-add.
    if INVERSE:
        y = tl.where(passive, x, (x - t) * tl.exp(-s))
    else:
        y = tl.where(passive, x, x * tl.exp(s) + t)
    if AFFINE:
        if INVERSE:
            d_factor = tl.sum(tl.where(inside, g * (y - c), 0.0), axis=0)
            d_constant = -a * tl.sum(g, axis=0)
        else:
            d_factor = tl.sum(tl.where(inside, g * y, 0.0), axis=0)
            d_constant = tl.sum(g, axis=0)
        sums_ptr = partial_ptr + (b * n_chunks + chunk) * 2
        tl.store(sums_ptr, d_factor)
        tl.store(sums_ptr + 1, d_constant)
        g = g * a
    slope = BOUND - s * s * (1.0 / BOUND)
    if INVERSE:
        dx = g * tl.exp(-s)
        dshift = -dx
        draw = -(g * y + q) * slope
    else:
        dx = g * tl.exp(s)
        dshift = g
        draw = (dx * x + q) * slope
    net_offs = offs
    if SWAPPED:
        net_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
    tl.store(dx_ptr + b * n + offs, tl.where(passive, g, dx).to(dx_ptr.dtype.element_ty), mask=inside)
    draw = tl.where(passive, 0.0, draw).to(draw_ptr.dtype.element_ty)
    tl.store(draw_ptr + b * n + net_offs, draw, mask=inside)
    dshift = tl.where(passive, 0.0, dshift).to(dshift_ptr.dtype.element_ty)
    tl.store(dshift_ptr + b * n + net_offs, dshift, mask=inside)


# -- launchers -----------------------------------------------------------------------------------------------


def conditioner_layout(raw_scale: Tensor, shift: Tensor, channels_last: bool) -> bool:
    """Whether raw scale and shift are read as channels_last: their own layout if they share one, else x's."""
    own = is_channels_last(raw_scale)
    return own if own == is_channels_last(shift) else channels_last


def _block(n: int, acc: torch.dtype) -> int:
    """Elements per program: enough programs for small images, enough work per program for large ones."""
    return 2048 if n > 8192 and acc == torch.float32 else 1024


def launch_affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, log-determinant, masked copy of y); the copy is empty without `next_mask`."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    layout = conditioner_layout(raw_scale, shift, channels_last)
    x = laid_out(x, channels_last)
    raw_scale, shift = laid_out(raw_scale, layout), laid_out(shift, layout)
    batch, c, h, w = x.shape
    n = c * h * w
    y = empty_image(x.shape, x, channels_last)
    masked = x.new_empty(0) if next_mask is None else empty_image(x.shape, x, channels_last, dtype)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=acc), masked
    block = _block(n, acc)
    chunks, v = cdiv(n, block), vector_width(n, x.stride(0), raw_scale.stride(0), shift.stride(0))
    partial = torch.empty(batch, chunks, dtype=acc, device=x.device)
    launch(
        _coupling_fwd_kernel, batch * chunks, x, 4,
        x, raw_scale, shift, mask_bytes(mask, x.shape), mask_bytes(next_mask, x.shape), affine,
        y, None if next_mask is None else masked, partial,
        x.stride(0) // v, raw_scale.stride(0) // v, shift.stride(0) // v, n // v, chunks, c, h * w,
        V=v, BLOCK=block, ACC=triton_dtype(acc), BOUND=bound, INVERSE=inverse, CHANNELS_LAST=channels_last,
        SWAPPED=layout != channels_last, NEXT=next_mask is not None, AFFINE=affine is not None,
        INT64_OFFSETS=needs_int64_offsets(n, block),
    )  # fmt: skip
    return y, sum_chunks(partial), masked


def launch_affine_coupling_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, raw scale, shift and affine; the last one is empty without `affine`."""
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    layout = conditioner_layout(raw_scale, shift, channels_last)
    x, grad_y = laid_out(x, channels_last), laid_out(grad_y, channels_last)
    raw_scale, shift = laid_out(raw_scale, layout), laid_out(shift, layout)
    batch, c, h, w = x.shape
    n = c * h * w
    dx = empty_image(x.shape, x, channels_last)
    draw, dshift = (empty_image(x.shape, v, layout) for v in (raw_scale, shift))
    if x.numel() == 0:
        return dx, draw, dshift, x.new_zeros(0 if affine is None else 2, dtype=acc)
    # Without a masked copy, its stride is that of the result's gradient: it must not lower the vector width.
    grad_masked = grad_y if next_mask is None else laid_out(grad_masked, channels_last)
    block, streams = _block(n, acc), (x, raw_scale, shift, grad_y, grad_masked)
    chunks, v = cdiv(n, block), vector_width(n, *(value.stride(0) for value in streams))
    partial = x.new_empty(0, dtype=acc) if affine is None else x.new_empty(batch * chunks, 2, dtype=acc)
    launch(
        _coupling_bwd_kernel, batch * chunks, x, 4,
        x, raw_scale, shift, mask_bytes(mask, x.shape), mask_bytes(next_mask, x.shape), affine,
        grad_y, grad_logdet.contiguous(), None if next_mask is None else grad_masked, dx, draw, dshift,
        None if affine is None else partial,
        x.stride(0) // v, raw_scale.stride(0) // v, shift.stride(0) // v, grad_y.stride(0) // v,
        grad_masked.stride(0) // v, n // v, chunks, c, h * w,
        V=v, BLOCK=block, ACC=triton_dtype(acc), BOUND=bound, INVERSE=inverse, CHANNELS_LAST=channels_last,
        SWAPPED=layout != channels_last, NEXT=next_mask is not None, AFFINE=affine is not None,
        INT64_OFFSETS=needs_int64_offsets(n, block),
    )  # fmt: skip
    return dx, draw, dshift, partial if affine is None else partial.sum(dim=0)
