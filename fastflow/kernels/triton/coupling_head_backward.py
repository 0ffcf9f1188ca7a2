"""Triton kernels of the coupling head's backward pass.

One launch computes the gradients of both heads: the programs of its first half those of the scale head, of x
and of the multiply-add, the others those of the shift head. Where both heads would need more registers than
there are, each has a launch. A program takes one block of active pixels with all samples, and adds up what
belongs to its share of the features and of the table's rows. It also takes one block of passive pixels, whose
weights and table entries get zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import laid_out, mask_bytes
from fastflow.kernels.triton.coupling_head import (
    SAMPLES,
    Blocks,
    choose_blocks,
    count_chunks,
    head_output,
    is_narrow,
    load_features,
    load_weights,
    matmul,
    pixel_order,
)
from fastflow.kernels.triton.launch import cdiv, kernel, launch, power_of_two, triton_dtype
from fastflow.kernels.triton.parts import locate, sum_chunks, tanh
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# Table rows per program; more of them take more programs.
BLOCK_CLASSES = 16
# A product of float32 operands without matrix units holds all of them in the registers of its threads: these
# are the largest blocks that fit.
_BACKWARD = {
    "narrow": Blocks(32, 16, 64, 8),
    "float32": Blocks(32, 32, 64, 8),
    "float64": Blocks(16, 16, 16, 8),
}
_BACKWARD_OF_AFFINE = {**_BACKWARD, "narrow": Blocks(32, 32, 64, 8), "float32": Blocks(32, 32, 16, 8)}
_BACKWARD_OF_INVERSE = {**_BACKWARD_OF_AFFINE, "narrow": Blocks(32, 16, 64, 8)}

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _result_gradient(
    grad_y_ptr, grad_masked_ptr, next_mask_ptr, b, pixel, inside, valid, grad_y_stride, grad_masked_stride,
    ACC: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """The gradient of the result: its own, and that of its masked copy."""
    g = tl.load(grad_y_ptr + b[:, None] * grad_y_stride + pixel[None, :], mask=valid, other=0.0).to(ACC)
    if NEXT:
        keep = tl.load(next_mask_ptr + pixel, mask=inside, other=0) != 0
        ptrs = grad_masked_ptr + b[:, None] * grad_masked_stride + pixel[None, :]
        extra = tl.load(ptrs, mask=valid, other=0.0).to(ACC)
        g += tl.where(keep[None, :], extra, 0.0)
    return g


@kernel
def _head_bwd_kernel(
    grad_y_ptr, grad_logdet_ptr, grad_masked_ptr, x_ptr, scale_features_ptr, shift_features_ptr,
    scale_weight_ptr, shift_weight_ptr, scale_table_ptr, shift_table_ptr, label_index_ptr, order_ptr,
    next_mask_ptr, affine_ptr, dx_ptr, shares_ptr, d_scale_weight_ptr, d_shift_weight_ptr,
    d_scale_table_ptr, d_shift_table_ptr, daffine_ptr,
    grad_y_stride, grad_masked_stride, x_stride, batch, active, pixels, classes, n_chunks,
    FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CLASSES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
    BOUND: tl.constexpr, INVERSE: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
    PARTS: tl.constexpr, FIRST: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The gradients of HEADS heads from FIRST on (0: scale, 1: shift), PARTS programs for a chunk of each."""
    program = tl.program_id(0)
    if HEADS == 1:
        _one_head(
            program, grad_y_ptr, grad_logdet_ptr, grad_masked_ptr, x_ptr, scale_features_ptr,
            shift_features_ptr, scale_weight_ptr, shift_weight_ptr, scale_table_ptr, shift_table_ptr,
            label_index_ptr, order_ptr, next_mask_ptr, affine_ptr, dx_ptr, shares_ptr,
            d_shift_weight_ptr if FIRST else d_scale_weight_ptr,
            d_shift_table_ptr if FIRST else d_scale_table_ptr, daffine_ptr, grad_y_stride,
            grad_masked_stride, x_stride, batch, active, pixels, classes, n_chunks, FEATURES, BLOCK_K,
            BLOCK_F, SAMPLES, BLOCK, BLOCK_CLASSES, ACC, NARROW, BOUND, INVERSE, NEXT, AFFINE, FIRST == 1,
        )  # fmt: skip
    elif program < PARTS * n_chunks:
        _one_head(
            program, grad_y_ptr, grad_logdet_ptr, grad_masked_ptr, x_ptr, scale_features_ptr,
            shift_features_ptr, scale_weight_ptr, shift_weight_ptr, scale_table_ptr, shift_table_ptr,
            label_index_ptr, order_ptr, next_mask_ptr, affine_ptr, dx_ptr, shares_ptr, d_scale_weight_ptr,
            d_scale_table_ptr, daffine_ptr, grad_y_stride, grad_masked_stride, x_stride, batch, active,
            pixels, classes, n_chunks, FEATURES, BLOCK_K, BLOCK_F, SAMPLES, BLOCK, BLOCK_CLASSES, ACC,
            NARROW, BOUND, INVERSE, NEXT, AFFINE, False,
        )  # fmt: skip
    else:
        shares_ptr += tl.cast(batch, tl.int64) * n_chunks * FEATURES
        _one_head(
            program - PARTS * n_chunks, grad_y_ptr, grad_logdet_ptr, grad_masked_ptr, x_ptr,
            scale_features_ptr, shift_features_ptr, scale_weight_ptr, shift_weight_ptr, scale_table_ptr,
            shift_table_ptr, label_index_ptr, order_ptr, next_mask_ptr, affine_ptr, dx_ptr, shares_ptr,
            d_shift_weight_ptr, d_shift_table_ptr, daffine_ptr, grad_y_stride, grad_masked_stride, x_stride,
            batch, active, pixels, classes, n_chunks, FEATURES, BLOCK_K, BLOCK_F, SAMPLES, BLOCK,
            BLOCK_CLASSES, ACC, NARROW, BOUND, INVERSE, NEXT, AFFINE, True,
        )  # fmt: skip


@kernel
def _one_head(
    program, grad_y_ptr, grad_logdet_ptr, grad_masked_ptr, x_ptr, scale_features_ptr, shift_features_ptr,
    scale_weight_ptr, shift_weight_ptr, scale_table_ptr, shift_table_ptr, label_index_ptr, order_ptr,
    next_mask_ptr, affine_ptr, dx_ptr, shares_ptr, dweight_ptr, dtable_ptr, daffine_ptr,
    grad_y_stride, grad_masked_stride, x_stride, batch, active, pixels, classes, n_chunks,
    FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_F: tl.constexpr, SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_CLASSES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
    BOUND: tl.constexpr, INVERSE: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The gradients of one head (SHIFT: the shift head); with the scale head's also those of x and affine."""
    part, chunk = locate(program, n_chunks, False)
    k = part * BLOCK_F + tl.arange(0, BLOCK_F)
    table_row = part * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = index < active
    pixel = tl.load(order_ptr + index, mask=inside, other=0)
    dweight = tl.zeros((BLOCK, BLOCK_F), ACC)
    dtable = tl.zeros((BLOCK_CLASSES, BLOCK), ACC)
    d_factor = tl.zeros((BLOCK,), ACC)
    d_constant = tl.zeros((BLOCK,), ACC)
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
    # The loop takes one group at a time (num_stages=1): there are no registers for a prefetched one.
    for start in tl.range(0, batch, SAMPLES, num_stages=1):
        b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
        exists = b < batch
        label = tl.load(label_index_ptr + b, mask=exists, other=0)
        valid = exists[:, None] & inside[None, :]
        g = _result_gradient(
            grad_y_ptr, grad_masked_ptr, next_mask_ptr, b, pixel, inside, valid, grad_y_stride,
            grad_masked_stride, ACC, NEXT,
        )  # fmt: skip
        if INVERSE or not SHIFT:
            s = tanh(head_output(
                scale_features_ptr, scale_weight_ptr, scale_table_ptr, b, exists, label, pixel, inside,
                pixels, FEATURES, BLOCK_K, SAMPLES, BLOCK, ACC, NARROW,
            )) * BOUND  # fmt: skip
            growth = tl.exp(-s) if INVERSE else tl.exp(s)
        if SHIFT:
            grad = g * a if AFFINE else g
            if INVERSE:
                grad = -grad * growth
        else:
            x = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=valid, other=0.0).to(ACC)
            if INVERSE or AFFINE:
                t = head_output(
                    shift_features_ptr, shift_weight_ptr, shift_table_ptr, b, exists, label, pixel, inside,
                    pixels, FEATURES, BLOCK_K, SAMPLES, BLOCK, ACC, NARROW,
                )  # fmt: skip
                y = (x - t) * growth if INVERSE else x * growth + t
            if AFFINE:
                d_factor += tl.sum(tl.where(valid, g * (y - c) if INVERSE else g * y, 0.0), axis=0)
                d_constant += tl.sum(g, axis=0)
                g = g * a
            q = tl.load(grad_logdet_ptr + b, mask=exists, other=0.0).to(ACC)
            slope = BOUND - s * s * (1.0 / BOUND)
            dx = g * growth
            grad = -(g * y + q[:, None]) * slope if INVERSE else (dx * x + q[:, None]) * slope
            grad = tl.where(valid, grad, 0.0)
            if part == 0:
                dx_ptrs = dx_ptr + b[:, None] * pixels + pixel[None, :]
                tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        chosen = tl.where((table_row[:, None] == label[None, :]) & exists[None, :], 1.0, 0.0)
        dweight, dtable = _add_gradients(
            grad, shift_features_ptr if SHIFT else scale_features_ptr,
            shift_weight_ptr if SHIFT else scale_weight_ptr, shares_ptr, chosen, b, exists, pixel, inside,
            k, chunk, n_chunks, dweight, dtable, FEATURES, ACC, NARROW,
        )  # fmt: skip
    _store_head(
        dweight, dtable, dweight_ptr, dtable_ptr, pixel, inside, k, table_row, pixels, classes, FEATURES
    )  # fmt: skip
    inside = (index + active) < pixels
    pixel = tl.load(order_ptr + active + index, mask=inside, other=0)
    dweight = tl.zeros((BLOCK, BLOCK_F), ACC)
    dtable = tl.zeros((BLOCK_CLASSES, BLOCK), ACC)
    _store_head(
        dweight, dtable, dweight_ptr, dtable_ptr, pixel, inside, k, table_row, pixels, classes, FEATURES
    )  # fmt: skip
    if not SHIFT:  # noqa: SIM102 - the first condition is known when the kernel is built
        if part == 0:
            for start in tl.range(0, batch, SAMPLES, num_stages=1):
                b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
                valid = (b < batch)[:, None] & inside[None, :]
                g = _result_gradient(
                    grad_y_ptr, grad_masked_ptr, next_mask_ptr, b, pixel, inside, valid, grad_y_stride,
                    grad_masked_stride, ACC, NEXT,
                )  # fmt: skip
                if AFFINE:
                    y = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=valid, other=0.0).to(ACC)
                    d_factor += tl.sum(g * (y - c) if INVERSE else g * y, axis=0)
                    d_constant += tl.sum(g, axis=0)
                    g = g * a
                dx_ptrs = dx_ptr + b[:, None] * pixels + pixel[None, :]
                tl.store(dx_ptrs, g.to(dx_ptr.dtype.element_ty), mask=valid)
            if AFFINE:
                tl.store(daffine_ptr + chunk, tl.sum(d_factor, axis=0))
                total = tl.sum(d_constant, axis=0)
                tl.store(daffine_ptr + n_chunks + chunk, -a * total if INVERSE else total)


@kernel
def _add_gradients(
    grad, features_ptr, weight_ptr, shares_ptr, chosen, b, exists, pixel, inside, k, chunk, n_chunks,
    dweight, dtable, FEATURES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Store this block's share of the gradient of a group's features, and add the group to the other sums."""
    operand_dtype = features_ptr.dtype.element_ty if NARROW else ACC
    grad = grad.to(operand_dtype)
    f = load_features(features_ptr, b, exists, k, FEATURES, ACC, NARROW)
    w = load_weights(weight_ptr, features_ptr, pixel, inside, k, FEATURES, ACC, NARROW)
    share = matmul(grad, w)
    ptrs = shares_ptr + (b * n_chunks + chunk)[:, None] * FEATURES + k[None, :]
    tl.store(ptrs, share, mask=exists[:, None] & (k < FEATURES)[None, :])
    dweight += matmul(tl.trans(grad), f)
    dtable += matmul(chosen.to(operand_dtype), grad)
    return dweight, dtable


@kernel
def _store_head(
    dweight, dtable, dweight_ptr, dtable_ptr, pixel, inside, k, table_row, pixels, classes,
    FEATURES: tl.constexpr,
):  # fmt: skip
    ptrs = dweight_ptr + tl.cast(pixel, tl.int64)[:, None] * FEATURES + k[None, :]
    tl.store(ptrs, dweight.to(dweight_ptr.dtype.element_ty), mask=inside[:, None] & (k < FEATURES)[None, :])
    ptrs = dtable_ptr + table_row[:, None] * pixels + pixel[None, :]
    valid = (table_row < classes)[:, None] & inside[None, :]
    tl.store(ptrs, dtable.to(dtable_ptr.dtype.element_ty), mask=valid)


@kernel
def _sum_shares_kernel(
    partial_ptr, scale_ptr, shift_ptr, batch, n_chunks, width,
    FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second stage of the features' gradients, (2, B, n, F) -> twice (B, F), in `width` programs a row."""
    b, part = locate(tl.program_id(0), width, True)
    k = part * BLOCK_F + tl.arange(0, BLOCK_F)
    chunk = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK_F), partial_ptr.dtype.element_ty)
    for start in range(0, n_chunks, BLOCK):
        index = start + chunk
        ptrs = partial_ptr + (b * n_chunks + index)[:, None] * FEATURES + k[None, :]
        acc += tl.load(ptrs, mask=(index < n_chunks)[:, None] & (k < FEATURES)[None, :], other=0.0)
    total = tl.sum(acc, axis=0)
    place = b * FEATURES + k
    tl.store(scale_ptr + place, total.to(scale_ptr.dtype.element_ty), mask=(k < FEATURES) & (b < batch))
    place = (b - batch) * FEATURES + k
    tl.store(shift_ptr + place, total.to(shift_ptr.dtype.element_ty), mask=(k < FEATURES) & (b >= batch))


# -- launchers -----------------------------------------------------------------------------------------------


def _sum_shares(shares: Tensor, d_scale: Tensor, d_shift: Tensor) -> None:
    """Fill both gradients (B, F) with the sums of `shares` (2, B, n, F) over n."""
    _, batch, chunks, features = shares.shape
    block_f = min(64, power_of_two(features))
    pieces = cdiv(features, block_f)
    launch(
        _sum_shares_kernel, 2 * batch * pieces, shares, 4, shares, d_scale, d_shift, batch, chunks, pieces,
        FEATURES=features, BLOCK_F=block_f, BLOCK=min(64, power_of_two(chunks)),
    )  # fmt: skip


def launch_coupling_head_backward(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    tanh_raw: Tensor,
    x: Tensor,
    scale_features: Tensor,
    shift_features: Tensor,
    scale_weight: Tensor,
    shift_weight: Tensor,
    scale_table: Tensor,
    shift_table: Tensor,
    label_index: Tensor,
    mask: Tensor,
    order: Tensor | None,
    active: int,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, features, weights, tables and affine; pairs are ordered (log-scale, shift)."""
    acc = acc_dtype(x.dtype)
    x, grad_y = laid_out(x, False), laid_out(grad_y, False)
    batch, pixels = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    new = torch.zeros_like if x.numel() == 0 else torch.empty_like
    differentiated = (x, scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table)
    dx, d_scale_features, d_shift_features, d_scale_weight, d_shift_weight, d_scale_table, d_shift_table = (
        new(value, memory_format=torch.contiguous_format) for value in differentiated
    )
    if x.numel() == 0:
        return (
            dx, d_scale_features, d_shift_features, d_scale_weight, d_shift_weight, d_scale_table,
            d_shift_table, x.new_zeros(0 if affine is None else 2, dtype=acc),
        )  # fmt: skip
    if next_mask is not None:
        grad_masked = laid_out(grad_masked, False)
    if order is None:
        order, active = pixel_order(mask, x.shape[1:])
    narrow, features = is_narrow(scale_features, shift_features, acc), scale_features.shape[1]
    classes = len(scale_table)
    table = _BACKWARD_OF_INVERSE if inverse else _BACKWARD if affine is None else _BACKWARD_OF_AFFINE
    blocks = choose_blocks(table, narrow, acc, features)
    chunks = count_chunks(blocks, active, pixels)
    parts = max(1, cdiv(features, blocks.block_f), cdiv(classes, BLOCK_CLASSES))
    scale_features, shift_features = scale_features.contiguous(), shift_features.contiguous()
    scale_weight, shift_weight = scale_weight.contiguous(), shift_weight.contiguous()
    scale_table, shift_table = scale_table.contiguous(), shift_table.contiguous()
    grad_logdet, label_index = grad_logdet.contiguous(), label_index.contiguous()
    next_bytes = mask_bytes(next_mask, x.shape)
    d_affine = torch.empty(0 if affine is None else 2, chunks, dtype=acc, device=x.device)
    shares = torch.empty(2, batch, chunks, features, dtype=acc, device=x.device)
    # With narrow features, both heads of these programs would need more registers than there are.
    heads = 1 if narrow and (inverse or affine is not None) else 2
    for first in range(0, 2, heads):
        launch(
            _head_bwd_kernel, heads * parts * chunks, x, blocks.warps,
            grad_y, grad_logdet, None if next_mask is None else grad_masked, x,
            scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table, label_index,
            order, next_bytes, affine,
            dx, shares[first:], d_scale_weight, d_shift_weight, d_scale_table, d_shift_table,
            None if affine is None else d_affine,
            grad_y.stride(0), 0 if next_mask is None else grad_masked.stride(0), x.stride(0),
            batch, active, pixels, classes, chunks,
            FEATURES=features, BLOCK_K=blocks.block_k, BLOCK_F=blocks.block_f, SAMPLES=SAMPLES,
            BLOCK=blocks.pixels, BLOCK_CLASSES=BLOCK_CLASSES, ACC=triton_dtype(acc), NARROW=narrow,
            BOUND=bound, INVERSE=inverse, NEXT=next_mask is not None, AFFINE=affine is not None, PARTS=parts,
            FIRST=first, HEADS=heads,
        )  # fmt: skip
    _sum_shares(shares, d_scale_features, d_shift_features)
    return (
        dx, d_scale_features, d_shift_features, d_scale_weight, d_shift_weight, d_scale_table, d_shift_table,
        d_affine.flatten() if affine is None else sum_chunks(d_affine),
    )  # fmt: skip
