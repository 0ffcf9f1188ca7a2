r"""Heads of the classification conditioner together with the coupling that they drive.

.. math:: r = F_s W_s^\top + S_k, \quad t = F_t W_t^\top + T_k, \quad (y, \log|\det|) = \text{affine\_coupling}(x, r, t)

`x` (B, C, H, W), N = C*H*W; features F (B, F); weights W (N, F); per-label tables S, T (K, N), bias included; `rows` (B,) names
each sample's row k. Everything may have a float dtype of its own. Weights are rounded to the dtype of the features; products
and sums are float32 (float64 for float64 x), and r and t are never rounded. y has the dtype of x, the log-determinant is float32
or wider.

Backward: r, and t where it is needed, are formed again from the features; a CPU without kernels keeps tanh r. With g = dy,
q = dlogdet, s = b tanh(r), dt and dr as in `affine_coupling`:

.. math:: dF = dr\,W, \quad dW = dr^\top F, \quad dS_k = \sum_{\text{rows}_i = k} dr_i

and the same for the shift. On a GPU with bfloat16 or float16 features, dr and dt are rounded to that dtype for these products,
as autocast would round them. The kernels read the weight rows of active pixels only and never write r and t, nor dr and dt; the
gradient of the features is the sum, in a fixed order, of what each block of pixels contributes, so it costs B*F numbers a block.

The end of a flow step is that of `affine_coupling.coupling_step`. x of any layout is laid out contiguous, as the features come
from a flatten in C, H, W order; so are the results. Source: MAGIC-Flow, classification conditioner.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels import _launch
from fastflow.kernels._launch import cdiv, kernel, launch, locate, power_of_two, sum_rows, tanh, triton_dtype
from fastflow.kernels._library import (
    accumulator,
    check_device,
    check_dtype,
    check_image,
    check_mask,
    check_rows,
    full_precision,
    laid_out,
    mask_bytes,
    refuse_second_derivative,
    register,
    runs_triton,
    sum_per_sample,
    takes_reference,
)
from fastflow.kernels.affine_coupling import affine_coupling_reference, check_affine, finish_step_reference

if TYPE_CHECKING:
    import triton.language as tl

Pair = tuple[Tensor, Tensor]


class PixelOrder(NamedTuple):
    """The pixels of a mask, active ones first: what kernels read a mask by.

    `pixels` (N,) is int32; the first `active` entries name the active pixels.
    """

    pixels: Tensor
    active: int


def pixel_order(mask: Tensor, shape: tuple[int, ...] | None = None) -> PixelOrder:
    """The order of a mask (True = passive) for samples of `shape` (C, H, W), that of the mask when None. Waits for the device."""
    passive = mask.expand(shape or mask.shape).reshape(-1)
    # Sorting bytes is stable where sorting booleans is not offered.
    index = torch.sort(passive.to(torch.uint8), stable=True).indices.to(torch.int32)
    return PixelOrder(index, int((~passive).sum()))


# -- definition -----------------------------------------------------------------------------------------------------------


def head_reference(x: Tensor, features: Tensor, weight: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """One head's output in the shape of `x`, in the accumulation dtype of x."""
    wide = accumulator(x.dtype)
    with full_precision(x):
        product = F.linear(features.to(wide), weight.to(features.dtype).to(wide))
    return (product + table[rows].to(wide)).view(x.shape)


def coupling_head_reference(
    x: Tensor, features: Pair, weights: Pair, tables: Pair, rows: Tensor, mask: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The definition, in plain ATen."""
    raw, shift = (head_reference(x, *head, rows) for head in zip(features, weights, tables, strict=True))
    return affine_coupling_reference(x, raw, shift, mask, bound, inverse)


# -- on a CPU -------------------------------------------------------------------------------------------------------------
# By hand, in few passes over memory. ATen's products take rows in groups of this many and do the rest by another routine, which
# rounds differently: only whole groups leave a sample's bits independent of the batch around it.

GROUP = 4


def _whole_groups(value: Tensor, dim: int = 0) -> Tensor:
    """`value` with zeros after its last row, up to a whole number of groups."""
    extra = -len(value) % GROUP
    return F.pad(value, (0, 0) * (value.ndim - 1) + (0, extra)) if extra else value


def _head_on_cpu(features: Tensor, weight: Tensor, table: Tensor, rows: Tensor, wide: torch.dtype) -> Tensor:
    """One head for rows in whole groups, a tensor of its own."""
    out = table.to(wide).index_select(0, rows)
    return out.addmm_(features.to(wide), weight.to(features.dtype).to(wide).t())


def _moved(mask: Tensor, shape: tuple[int, ...], wide: torch.dtype) -> Tensor:
    """(N,): 1 where active, 0 where passive."""
    return (~mask).expand(shape).reshape(-1).to(wide)


def _head_fwd_on_cpu(
    x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor, scale_table: Tensor,
    shift_table: Tensor, rows: Tensor, mask: Tensor, order: Tensor | None, active: int, next_mask: Tensor | None,
    affine: Tensor | None, bound: float, inverse: bool, dtype: torch.dtype | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, wide = len(x), accumulator(x.dtype)
    moved = _moved(mask, x.shape[1:], wide)
    flat, groups = laid_out(x, False).flatten(1).to(wide), _whole_groups(rows)
    with full_precision(x):
        squashed = _head_on_cpu(_whole_groups(scale_features), scale_weight, scale_table, groups, wide).tanh_()
        t = _head_on_cpu(_whole_groups(shift_features), shift_weight, shift_table, groups, wide)[:batch].mul_(moved)
    factor = bound * moved
    s = squashed[:batch] * factor if keep else squashed[:batch].mul_(factor)
    logdet = sum_per_sample(s)
    if inverse:
        y, logdet = torch.sub(flat, t, out=t).mul_(s.neg_().exp_()), -logdet
    else:
        y = t.addcmul_(flat, s.exp_())
    if affine is not None:
        a, c = affine.to(wide)
        y = y.sub_(c).mul_(a) if inverse else torch.addcmul(c, y, a)
    y = y.to(x.dtype).view(x.shape)
    masked = x.new_empty(0) if next_mask is None else torch.where(next_mask, y, 0.0).to(dtype or x.dtype)
    return y, logdet, masked, squashed if keep else x.new_empty(0, dtype=wide)


def _head_bwd_on_cpu(
    grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor, squashed: Tensor, x: Tensor, scale_features: Tensor,
    shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor, scale_table: Tensor, shift_table: Tensor, rows: Tensor,
    mask: Tensor, order: Tensor | None, active: int, next_mask: Tensor | None, affine: Tensor | None, bound: float,
    inverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch, wide = len(x), accumulator(x.dtype)
    moved = _moved(mask, x.shape[1:], wide)
    factor = bound * moved
    grad, flat = grad_y.flatten(1).to(wide), x.flatten(1).to(wide)
    if next_mask is not None:
        grad = torch.where(next_mask, grad_masked.to(wide), 0.0).flatten(1).add_(grad)
    features = _whole_groups(scale_features), _whole_groups(shift_features)
    s = squashed * factor
    growth = s[:batch].neg().exp_() if inverse else s[:batch].exp()
    with full_precision(x):
        y = flat
        if inverse or affine is not None:
            t = _head_on_cpu(features[1], shift_weight, shift_table, _whole_groups(rows), wide)[:batch].mul_(moved)
            y = torch.sub(flat, t, out=t).mul_(growth) if inverse else t.addcmul_(flat, growth)
        d_affine = x.new_empty(0, dtype=wide)
        if affine is not None:
            a, c = affine.to(wide)
            total = grad.sum()
            d_affine = torch.stack(((grad * (y - c)).sum(), -a * total) if inverse else ((grad * y).sum(), total))
            grad = grad * a
        d_x = growth.mul_(grad)
        q = grad_logdet[:, None].to(wide)
        # dr = (g x e^s + q) b (1 - tanh^2 r). Whole groups, since the gradient of the features is a product over these rows.
        d_raw = torch.addcmul(factor, squashed, s, value=-1.0)
        d_raw[:batch].mul_(torch.addcmul(q, grad, y).neg_() if inverse else torch.addcmul(q, d_x, flat))
        d_raw[batch:] = 0.0
        d_shift = _whole_groups(d_x * -moved if inverse else grad * moved)
        pairs = (d_raw, scale_weight, scale_features), (d_shift, shift_weight, shift_features)
        d_features = [(d @ w.to(f.dtype).to(wide))[:batch] for d, w, f in pairs]
        d_weights = [d.t() @ f.to(wide) for d, f in zip((d_raw, d_shift), features, strict=True)]
    d_tables = [
        torch.zeros(table.shape, dtype=wide).index_add_(0, rows, d[:batch])
        for table, d in ((scale_table, d_raw), (shift_table, d_shift))
    ]
    likes = scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table
    rest = (d.to(like.dtype).contiguous() for d, like in zip((*d_features, *d_weights, *d_tables), likes, strict=True))
    return d_x.to(x.dtype).view(x.shape), *rest, d_affine


# -- kernels --------------------------------------------------------------------------------------------------------------
# A program takes one block of active pixels, for which it forms log-scales and shifts, and one block of passive ones, which it
# copies; `order` names the active pixels first. Samples come in groups of a fixed size, so a sample's sums are its own.


@kernel
def _product(a, b):
    """a @ b. Matrix units take float64 operands in some layouts only, so those are multiplied out."""
    if a.dtype == tl.float64:
        return tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    return tl.dot(a, b, input_precision="ieee")


@kernel
def _head(
    features_ptr, weight_ptr, table_ptr, b, exists, row, pixel, inside, pixels,
    FEATURES: tl.constexpr, WALK: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    NARROW: tl.constexpr,
):  # fmt: skip
    """(samples, pixels) of one head."""
    acc = tl.zeros((SAMPLES, BLOCK), ACC)
    for start in tl.range(0, FEATURES, WALK, num_stages=1):
        k = start + tl.arange(0, WALK)
        f = _features(features_ptr, b, exists, k, FEATURES, ACC, NARROW)
        w = _weights(weight_ptr, features_ptr, pixel, inside, k, FEATURES, ACC, NARROW)
        acc += _product(f, tl.trans(w))
    place = table_ptr + row[:, None] * pixels + pixel[None, :]
    return acc + tl.load(place, mask=exists[:, None] & inside[None, :], other=0.0).to(ACC)


@kernel
def _features(features_ptr, b, exists, k, FEATURES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr):
    place = features_ptr + b[:, None] * FEATURES + k[None, :]
    f = tl.load(place, mask=exists[:, None] & (k < FEATURES)[None, :], other=0.0)
    return f if NARROW else f.to(ACC)


@kernel
def _weights(
    weight_ptr, features_ptr, pixel, inside, k, FEATURES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr
):  # fmt: skip
    """Weight rows of pixels, rounded to the dtype of the features."""
    place = weight_ptr + tl.cast(pixel, tl.int64)[:, None] * FEATURES + k[None, :]
    w = tl.load(place, mask=inside[:, None] & (k < FEATURES)[None, :], other=0.0).to(features_ptr.dtype.element_ty)
    return w if NARROW else w.to(ACC)


@kernel
def _head_fwd_kernel(
    x_ptr, scale_features_ptr, shift_features_ptr, scale_weight_ptr, shift_weight_ptr, scale_table_ptr, shift_table_ptr,
    rows_ptr, order_ptr, next_mask_ptr, affine_ptr, y_ptr, masked_ptr, partial_ptr,
    x_stride, batch, active, pixels, n_chunks,
    FEATURES: tl.constexpr, WALK: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    NARROW: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    group, chunk = locate(tl.program_id(0), n_chunks, False)
    b = group * SAMPLES + tl.arange(0, SAMPLES)
    exists = b < batch
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < active
    pixel = tl.load(order_ptr + at, mask=inside, other=0)
    row = tl.load(rows_ptr + b, mask=exists, other=0)
    raw = _head(
        scale_features_ptr, scale_weight_ptr, scale_table_ptr, b, exists, row, pixel, inside, pixels,
        FEATURES, WALK, SAMPLES, BLOCK, ACC, NARROW,
    )  # fmt: skip
    t = _head(
        shift_features_ptr, shift_weight_ptr, shift_table_ptr, b, exists, row, pixel, inside, pixels,
        FEATURES, WALK, SAMPLES, BLOCK, ACC, NARROW,
    )  # fmt: skip
    s = tl.where(inside[None, :], tanh(raw) * BOUND, 0.0)
    total = tl.sum(s, axis=1)
    here = exists[:, None] & inside[None, :]
    x = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=here, other=0.0).to(ACC)
    if INVERSE:
        y = (x - t) * tl.exp(-s)
        total = -total
    else:
        y = x * tl.exp(s) + t
    _finish(y, b, pixel, here, pixels, inside, next_mask_ptr, affine_ptr, y_ptr, masked_ptr, ACC, INVERSE, NEXT, AFFINE)
    tl.store(partial_ptr + b * n_chunks + chunk, total, mask=exists)
    inside = (at + active) < pixels
    pixel = tl.load(order_ptr + active + at, mask=inside, other=0)
    here = exists[:, None] & inside[None, :]
    x = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=here, other=0.0).to(ACC)
    _finish(x, b, pixel, here, pixels, inside, next_mask_ptr, affine_ptr, y_ptr, masked_ptr, ACC, INVERSE, NEXT, AFFINE)


@kernel
def _finish(
    y, b, pixel, here, pixels, inside, next_mask_ptr, affine_ptr, y_ptr, masked_ptr,
    ACC: tl.constexpr, INVERSE: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """The multiply-add that may follow, the result and its masked copy."""
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
        if INVERSE:
            y = (y - c) * a
        else:
            y = y * a + c
    place = b[:, None] * pixels + pixel[None, :]
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=here)
    if NEXT:
        keep = tl.load(next_mask_ptr + pixel, mask=inside, other=0) != 0
        tl.store(masked_ptr + place, tl.where(keep[None, :], y, 0.0).to(masked_ptr.dtype.element_ty), mask=here)


@kernel
def _result_gradient(
    grad_y_ptr, grad_masked_ptr, next_mask_ptr, b, pixel, inside, here, grad_y_stride, grad_masked_stride,
    ACC: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """The gradient of the result: its own, and that of its masked copy."""
    g = tl.load(grad_y_ptr + b[:, None] * grad_y_stride + pixel[None, :], mask=here, other=0.0).to(ACC)
    if NEXT:
        keep = tl.load(next_mask_ptr + pixel, mask=inside, other=0) != 0
        extra = tl.load(grad_masked_ptr + b[:, None] * grad_masked_stride + pixel[None, :], mask=here, other=0.0).to(ACC)
        g += tl.where(keep[None, :], extra, 0.0)
    return g


@kernel
def _head_bwd_kernel(
    grad_y_ptr, grad_logdet_ptr, grad_masked_ptr, x_ptr, scale_features_ptr, shift_features_ptr, scale_weight_ptr,
    shift_weight_ptr, scale_table_ptr, shift_table_ptr, rows_ptr, order_ptr, next_mask_ptr, affine_ptr,
    dx_ptr, dfeatures_ptr, dweight_ptr, dtable_ptr, daffine_ptr,
    grad_y_stride, grad_masked_stride, x_stride, batch, active, pixels, classes, n_chunks,
    FEATURES: tl.constexpr, WALK: tl.constexpr, STEP: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    CLASSES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr,
    NEXT: tl.constexpr, AFFINE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """The gradients of one head, and with those of the scale head x's and the multiply-add's."""
    part, chunk = locate(tl.program_id(0), n_chunks, False)
    k = part * STEP + tl.arange(0, STEP)
    label = part * CLASSES + tl.arange(0, CLASSES)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = at < active
    pixel = tl.load(order_ptr + at, mask=inside, other=0)
    dweight = tl.zeros((BLOCK, STEP), ACC)
    dtable = tl.zeros((CLASSES, BLOCK), ACC)
    product = tl.zeros((BLOCK,), ACC)
    plain = tl.zeros((BLOCK,), ACC)
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
    # One group at a time: what prefetching the next one would hold is what a block of threads has no registers for.
    for start in tl.range(0, batch, SAMPLES, num_stages=1):
        b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
        exists = b < batch
        row = tl.load(rows_ptr + b, mask=exists, other=0)
        here = exists[:, None] & inside[None, :]
        g = _result_gradient(
            grad_y_ptr, grad_masked_ptr, next_mask_ptr, b, pixel, inside, here, grad_y_stride, grad_masked_stride, ACC, NEXT
        )
        if INVERSE or not SHIFT:
            s = tanh(_head(
                scale_features_ptr, scale_weight_ptr, scale_table_ptr, b, exists, row, pixel, inside, pixels,
                FEATURES, WALK, SAMPLES, BLOCK, ACC, NARROW,
            )) * BOUND  # fmt: skip
            growth = tl.exp(-s) if INVERSE else tl.exp(s)
        if SHIFT:
            grad = g * a if AFFINE else g
            if INVERSE:
                grad = -grad * growth
        else:
            x = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=here, other=0.0).to(ACC)
            if INVERSE or AFFINE:
                t = _head(
                    shift_features_ptr, shift_weight_ptr, shift_table_ptr, b, exists, row, pixel, inside, pixels,
                    FEATURES, WALK, SAMPLES, BLOCK, ACC, NARROW,
                )  # fmt: skip
                y = (x - t) * growth if INVERSE else x * growth + t
            if AFFINE:
                product += tl.sum(tl.where(here, g * (y - c) if INVERSE else g * y, 0.0), axis=0)
                plain += tl.sum(g, axis=0)
                g = g * a
            q = tl.load(grad_logdet_ptr + b, mask=exists, other=0.0).to(ACC)
            slope = BOUND - s * s * (1.0 / BOUND)
            dx = g * growth
            grad = -(g * y + q[:, None]) * slope if INVERSE else (dx * x + q[:, None]) * slope
            grad = tl.where(here, grad, 0.0)
            if part == 0:
                tl.store(dx_ptr + b[:, None] * pixels + pixel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=here)
        chosen = tl.where((label[:, None] == row[None, :]) & exists[None, :], 1.0, 0.0)
        dweight, dtable = _head_gradients(
            grad, shift_features_ptr if SHIFT else scale_features_ptr, shift_weight_ptr if SHIFT else scale_weight_ptr,
            dfeatures_ptr, chosen, b, exists, pixel, inside, k, chunk, n_chunks, dweight, dtable, FEATURES, ACC, NARROW,
        )  # fmt: skip
    _store_head(dweight, dtable, dweight_ptr, dtable_ptr, pixel, inside, k, label, pixels, classes, FEATURES)
    inside = (at + active) < pixels
    pixel = tl.load(order_ptr + active + at, mask=inside, other=0)
    dweight = tl.zeros((BLOCK, STEP), ACC)
    dtable = tl.zeros((CLASSES, BLOCK), ACC)
    _store_head(dweight, dtable, dweight_ptr, dtable_ptr, pixel, inside, k, label, pixels, classes, FEATURES)
    if not SHIFT:  # noqa: SIM102 - known when built
        if part == 0:
            for start in tl.range(0, batch, SAMPLES, num_stages=1):
                b = tl.cast(start, tl.int64) + tl.arange(0, SAMPLES)
                here = (b < batch)[:, None] & inside[None, :]
                g = _result_gradient(
                    grad_y_ptr, grad_masked_ptr, next_mask_ptr, b, pixel, inside, here, grad_y_stride, grad_masked_stride, ACC,
                    NEXT,
                )  # fmt: skip
                if AFFINE:
                    y = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=here, other=0.0).to(ACC)
                    product += tl.sum(g * (y - c) if INVERSE else g * y, axis=0)
                    plain += tl.sum(g, axis=0)
                    g = g * a
                tl.store(dx_ptr + b[:, None] * pixels + pixel[None, :], g.to(dx_ptr.dtype.element_ty), mask=here)
            if AFFINE:
                tl.store(daffine_ptr + chunk, tl.sum(product, axis=0))
                total = tl.sum(plain, axis=0)
                tl.store(daffine_ptr + n_chunks + chunk, -a * total if INVERSE else total)


@kernel
def _head_gradients(
    grad, features_ptr, weight_ptr, dfeatures_ptr, chosen, b, exists, pixel, inside, k, chunk, n_chunks, dweight, dtable,
    FEATURES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Of one group of samples: this block's share of the gradient of the features, and the sums of the others carried on."""
    kind = features_ptr.dtype.element_ty if NARROW else ACC
    grad = grad.to(kind)
    f = _features(features_ptr, b, exists, k, FEATURES, ACC, NARROW)
    w = _weights(weight_ptr, features_ptr, pixel, inside, k, FEATURES, ACC, NARROW)
    share = _product(grad, w)
    place = (b * n_chunks + chunk)[:, None] * FEATURES + k[None, :]
    tl.store(dfeatures_ptr + place, share, mask=exists[:, None] & (k < FEATURES)[None, :])
    dweight += _product(tl.trans(grad), f)
    dtable += _product(chosen.to(kind), grad)
    return dweight, dtable


@kernel
def _store_head(
    dweight, dtable, dweight_ptr, dtable_ptr, pixel, inside, k, label, pixels, classes, FEATURES: tl.constexpr
):  # fmt: skip
    place = dweight_ptr + tl.cast(pixel, tl.int64)[:, None] * FEATURES + k[None, :]
    tl.store(place, dweight.to(dweight_ptr.dtype.element_ty), mask=inside[:, None] & (k < FEATURES)[None, :])
    place = dtable_ptr + label[:, None] * pixels + pixel[None, :]
    tl.store(place, dtable.to(dtable_ptr.dtype.element_ty), mask=(label < classes)[:, None] & inside[None, :])


@kernel
def _sum_shares_kernel(
    partial_ptr, out_ptr, n_chunks, width, FEATURES: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Second stage of the features' gradient: (B, n, F) -> (B, F), `width` programs of STEP features for a sample."""
    b, part = locate(tl.program_id(0), width, True)
    k = part * STEP + tl.arange(0, STEP)
    chunk = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, STEP), partial_ptr.dtype.element_ty)
    for start in range(0, n_chunks, BLOCK):
        at = start + chunk
        place = partial_ptr + (b * n_chunks + at)[:, None] * FEATURES + k[None, :]
        acc += tl.load(place, mask=(at < n_chunks)[:, None] & (k < FEATURES)[None, :], other=0.0)
    tl.store(out_ptr + b * FEATURES + k, tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty), mask=k < FEATURES)


# -- launchers ------------------------------------------------------------------------------------------------------------


class _Blocks(NamedTuple):
    """Active pixels per program, features per step of a product over them, features whose gradients a program forms, warps."""

    pixels: int
    walk: int
    step: int
    warps: int


# A sample's sums must not depend on its batch, so the samples per program are the same for any batch.
SAMPLES = 16
# Table rows per program of the backward kernel; more of them take more programs.
CLASSES = 16
_FORWARD = {"narrow": _Blocks(64, 64, 0, 4), "float32": _Blocks(64, 16, 0, 4), "float64": _Blocks(32, 16, 0, 4)}
# What fits into the registers of a thread: a product of float32 operands without matrix units holds all of them.
_BACKWARD = {"narrow": _Blocks(32, 32, 64, 8), "float32": _Blocks(32, 32, 64, 8), "float64": _Blocks(16, 16, 16, 8)}
_BACKWARD_OF_AFFINE = {**_BACKWARD, "float32": _Blocks(32, 32, 16, 8)}
_BACKWARD_OF_INVERSE = {**_BACKWARD_OF_AFFINE, "narrow": _Blocks(32, 16, 64, 8)}


def _is_narrow(scale_features: Tensor, shift_features: Tensor, acc: torch.dtype) -> bool:
    """Whether products run in the features' 16-bit dtype on tensor cores: not in the interpreter, whose bfloat16 is garbage."""
    dtype = scale_features.dtype
    fits = dtype == shift_features.dtype and dtype in (torch.bfloat16, torch.float16) and acc == torch.float32
    # What is recorded in the interpreter stands for a launch on a GPU.
    return fits and (bool(_launch._records) or not _launch.interpreted())


def _blocks(table: dict[str, _Blocks], narrow: bool, acc: torch.dtype, features: int) -> _Blocks:
    blocks = table["narrow" if narrow else "float64" if acc == torch.float64 else "float32"]
    most = max(16, power_of_two(features))
    return blocks._replace(walk=min(blocks.walk, most), step=min(blocks.step, most))


def _chunks(blocks: _Blocks, active: int, pixels: int) -> int:
    return cdiv(max(active, pixels - active), blocks.pixels)


def _head_launch(
    x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor, scale_table: Tensor,
    shift_table: Tensor, rows: Tensor, mask: Tensor, order: Tensor | None, active: int, next_mask: Tensor | None,
    affine: Tensor | None, bound: float, inverse: bool, dtype: torch.dtype | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accumulator(x.dtype)
    x, kept = laid_out(x, False), x.new_empty(0, dtype=acc)
    batch, pixels = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    masked = x.new_empty(0) if next_mask is None else torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=acc), masked, kept
    if order is None:
        order, active = pixel_order(mask, x.shape[1:])
    narrow, features = _is_narrow(scale_features, shift_features, acc), scale_features.shape[1]
    blocks = _blocks(_FORWARD, narrow, acc, features)
    chunks = _chunks(blocks, active, pixels)
    partial = torch.empty(batch, chunks, dtype=acc, device=x.device)
    heads = (v.contiguous() for v in (scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table, rows))
    launch(
        _head_fwd_kernel, cdiv(batch, SAMPLES) * chunks, x, blocks.warps,
        x, *heads, order, mask_bytes(next_mask, x.shape), affine, y, None if next_mask is None else masked, partial,
        x.stride(0), batch, active, pixels, chunks,
        FEATURES=features, WALK=blocks.walk, SAMPLES=SAMPLES, BLOCK=blocks.pixels, ACC=triton_dtype(acc), NARROW=narrow,
        BOUND=bound, INVERSE=inverse, NEXT=next_mask is not None, AFFINE=affine is not None,
    )  # fmt: skip
    return y, sum_rows(partial), masked, kept


def _head_backward_launch(
    grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor, kept: Tensor, x: Tensor, scale_features: Tensor,
    shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor, scale_table: Tensor, shift_table: Tensor, rows: Tensor,
    mask: Tensor, order: Tensor | None, active: int, next_mask: Tensor | None, affine: Tensor | None, bound: float,
    inverse: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    acc = accumulator(x.dtype)
    x, grad_y = laid_out(x, False), laid_out(grad_y, False)
    batch, pixels = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    inputs = scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table
    if x.numel() == 0:
        empty = (torch.zeros(v.shape, dtype=v.dtype, device=v.device) for v in (x, *inputs))
        return *empty, x.new_zeros(0 if affine is None else 2, dtype=acc)
    if next_mask is not None:
        grad_masked = laid_out(grad_masked, False)
    if order is None:
        order, active = pixel_order(mask, x.shape[1:])
    narrow, features, classes = _is_narrow(scale_features, shift_features, acc), scale_features.shape[1], len(scale_table)
    table = _BACKWARD_OF_INVERSE if inverse else _BACKWARD if affine is None else _BACKWARD_OF_AFFINE
    blocks = _blocks(table, narrow, acc, features)
    chunks = _chunks(blocks, active, pixels)
    parts = max(1, cdiv(features, blocks.step), cdiv(classes, CLASSES))
    dx, *grads = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, *inputs))
    d_affine = torch.empty(0 if affine is None else 2, chunks, dtype=acc, device=x.device)
    arguments = (
        grad_y, grad_logdet.contiguous(), None if next_mask is None else grad_masked, x,
        *(v.contiguous() for v in (*inputs, rows)), order, mask_bytes(next_mask, x.shape), affine,
    )  # fmt: skip
    numbers = (
        grad_y.stride(0), 0 if next_mask is None else grad_masked.stride(0), x.stride(0), batch, active, pixels, classes, chunks,
    )  # fmt: skip
    step = min(64, power_of_two(features))
    pieces = cdiv(features, step)
    for head in range(2):
        share = torch.empty(batch, chunks, features, dtype=acc, device=x.device)
        launch(
            _head_bwd_kernel, parts * chunks, x, blocks.warps,
            *arguments, dx, share, grads[2 + head], grads[4 + head], None if affine is None else d_affine, *numbers,
            FEATURES=features, WALK=blocks.walk, STEP=blocks.step, SAMPLES=SAMPLES, BLOCK=blocks.pixels, CLASSES=CLASSES,
            ACC=triton_dtype(acc), NARROW=narrow, BOUND=bound, INVERSE=inverse, NEXT=next_mask is not None,
            AFFINE=affine is not None, SHIFT=head == 1,
        )  # fmt: skip
        launch(
            _sum_shares_kernel, batch * pieces, x, 4, share, grads[head], chunks, pieces,
            FEATURES=features, STEP=step, BLOCK=min(64, power_of_two(chunks)),
        )  # fmt: skip
    return dx, *grads, d_affine.flatten() if affine is None else sum_rows(d_affine)


# -- op and autograd ------------------------------------------------------------------------------------------------------


def _head_fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    next_mask, dtype, keep = rest[10], rest[14], rest[15]
    wide = accumulator(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    masked = x.new_empty(0) if next_mask is None else torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    kept = (0,) if not keep or runs_triton(x) else (cdiv(x.shape[0], GROUP) * GROUP, rest[2].shape[0])
    return y, x.new_empty(x.shape[0], dtype=wide), masked, x.new_empty(kept, dtype=wide)


def _head_backward_fake(grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor, kept: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    x, affine = rest[0], rest[12]
    d_affine = x.new_empty(0 if affine is None else 2, dtype=accumulator(x.dtype))
    return *(torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in rest[:7]), d_affine


_ARGUMENTS = (
    "Tensor x, Tensor scale_features, Tensor shift_features, Tensor scale_weight, Tensor shift_weight, Tensor scale_table, "
    "Tensor shift_table, Tensor rows, Tensor mask, Tensor? order, int active, Tensor? next_mask, Tensor? affine, float bound, "
    "bool inverse"
)
_forward = register(
    f"coupling_head({_ARGUMENTS}, ScalarType? dtype, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_head_fwd_on_cpu,
    triton=_head_launch,
    fake=_head_fake,
)
_backward = register(
    f"coupling_head_backward(Tensor grad_y, Tensor grad_logdet, Tensor grad_masked, Tensor kept, {_ARGUMENTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=_head_bwd_on_cpu,
    triton=_head_backward_launch,
    fake=_head_backward_fake,
)


class CouplingHead(torch.autograd.Function):
    """The op under autograd. Saves its arguments and, on a CPU without kernels, tanh r. A second derivative is an error."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
        scale_table: Tensor, shift_table: Tensor, rows: Tensor, mask: Tensor, order: Tensor | None, active: int,
        next_mask: Tensor | None, affine: Tensor | None, bound: float, inverse: bool, dtype: torch.dtype | None, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        heads = scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table
        y, logdet, masked, kept = _forward(x, *heads, rows, mask, order, active, next_mask, affine, bound, inverse, dtype, keep)
        ctx.save_for_backward(kept, x, *heads, rows, mask, order, next_mask, affine)
        ctx.active, ctx.bound, ctx.inverse = active, bound, inverse
        return y, logdet, masked

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("coupling_head")
        *inputs, order, next_mask, affine = ctx.saved_tensors
        *grads, d_affine = _backward(
            grad_y, grad_logdet, grad_masked, *inputs, order, ctx.active, next_mask, affine, ctx.bound, ctx.inverse
        )
        d_affine = None if affine is None else d_affine.to(affine.dtype)
        return *grads, None, None, None, None, None, d_affine, None, None, None, None


def _apply(
    x: Tensor, features: Pair, weights: Pair, tables: Pair, rows: Tensor, mask: Tensor, order: PixelOrder | None,
    next_mask: Tensor | None, affine: Tensor | None, bound: float, inverse: bool, dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if order is None and runs_triton(x):
        order = pixel_order(mask, x.shape[1:])
    index, active = order or (None, 0)
    inputs = x, *features, *weights, *tables
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (*inputs, affine) if v is not None)
    y, logdet, masked = CouplingHead.apply(*inputs, rows, mask, index, active, next_mask, affine, bound, inverse, dtype, keep)
    return y, logdet, masked


def _check(
    x: Tensor, features: Pair, weights: Pair, tables: Pair, rows: Tensor, mask: Tensor, bound: float, order: PixelOrder | None
) -> None:
    check_image("x", x)
    check_mask(mask, x)
    batch, size = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    for name, pair in (("features", features), ("weights", weights), ("tables", tables)):
        for value in pair:
            check_dtype(name, value)
            check_device(name, value, x)
    width = features[0].shape[-1] if features[0].ndim else 0
    expected = (
        ("features", features, (batch, width), "(B, F)"),
        ("weights", weights, (size, width), "(N, F)"),
        ("tables", tables, (tables[0].shape[0] if tables[0].ndim else 0, size), "(K, N)"),
    )
    for name, pair, shape, words in expected:
        for value in pair:
            if tuple(value.shape) != shape:
                raise ValueError(f"{name} must be {words} = {shape} for x {tuple(x.shape)}, got {tuple(value.shape)}")
    check_rows(rows, batch, len(tables[0]), x)
    if order is not None and (order.pixels.dtype != torch.int32 or tuple(order.pixels.shape) != (size,)):
        raise ValueError(f"order must hold int32 ({size},), got {order.pixels.dtype} {tuple(order.pixels.shape)}")
    if order is not None and not 0 <= order.active <= size:
        raise ValueError(f"order must count between 0 and {size} active pixels, got {order.active}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")


def coupling_head(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    rows: Tensor,
    mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    order: PixelOrder | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log-scale and shift from features and labels, and couple. Pairs are ordered (log-scale, shift).

    With `inverse` and the same other arguments, y becomes x again: its passive part bit for bit, its active part to rounding,
    since log-scale and shift are the same bits in both directions.

    Args:
        x: (B, C, H, W), N = C*H*W.
        features: two (B, F).
        weights: two (N, F).
        tables: two (K, N).
        rows: (B,) int64, the table row of each sample. A tensor's values are looked at once, those on a CUDA device at the price
            of waiting for it, and not at all in a graph that is compiled, exported or captured.
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the coupling instead.
        order: `pixel_order` of the mask, for kernels; None computes it, at the price of waiting for the device.

    Returns:
        `(y, logdet)`: y like x, contiguous; logdet (B,) in nats, float32 or wider.

    Raises:
        ValueError: a shape, dtype or device does not fit, a row is not in [0, K), or `bound` is not positive.

    Example:
        >>> x, mask = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
        >>> f, w, table = torch.ones(1, 1), torch.ones(2, 1), torch.zeros(3, 2)
        >>> y, logdet = coupling_head(x, (f, f), (0 * w, w), (table, table), torch.tensor([2]), mask)
        >>> y.flatten().tolist(), logdet.tolist()
        ([1.0, 2.0], [0.0])
    """
    _check(x, features, weights, tables, rows, mask, bound, order)
    if takes_reference():
        return coupling_head_reference(x, features, weights, tables, rows, mask, bound, inverse)
    y, logdet, _ = _apply(x, features, weights, tables, rows, mask, order, None, None, bound, inverse, None)
    return y, logdet


def coupling_head_step(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    rows: Tensor,
    mask: Tensor,
    next_mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    *,
    affine: Tensor | None = None,
    dtype: torch.dtype | None = None,
    order: PixelOrder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`coupling_head` with the end of `coupling_step`: the one-channel mix that may follow, and the next conditioner's input.

    Args:
        x: (B, C, H, W), N = C*H*W.
        features: two (B, F).
        weights: two (N, F).
        tables: two (K, N).
        rows: (B,) int64, see `coupling_head`.
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        next_mask: like `mask`; the next conditioner sees the result where it is True, and 0 elsewhere.
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the coupling instead.
        affine: (2,), see `coupling_step`.
        dtype: of the next conditioner's input; that of x when None.
        order: see `coupling_head`.

    Returns:
        `(y, logdet, next_input)`: y like x, contiguous; logdet (B,) in nats, that of the coupling alone; next_input (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, a row is not in [0, K), or `bound` is not positive.
    """
    _check(x, features, weights, tables, rows, mask, bound, order)
    check_mask(next_mask, x, "next_mask")
    check_affine(affine, x)
    if takes_reference():
        y, logdet = coupling_head_reference(x, features, weights, tables, rows, mask, bound, inverse)
        y, masked = finish_step_reference(y, next_mask, affine, inverse, dtype or x.dtype)
        return y, logdet, masked
    return _apply(x, features, weights, tables, rows, mask, order, next_mask, affine, bound, inverse, dtype or x.dtype)
