"""Triton kernels of the coupling head: the forward pass, and the parts that the backward pass shares.

A program takes one block of active pixels, for which it computes log-scales and shifts, and one block of
passive pixels, which it copies; `order` names the active pixels first. Samples come in groups of a fixed
size, which makes a sample's sums independent of its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.layouts import laid_out, mask_bytes
from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton.launch import cdiv, kernel, launch, power_of_two, triton_dtype
from fastflow.kernels.triton.parts import locate, sum_chunks, tanh
from fastflow.numerics import acc_dtype

if TYPE_CHECKING:
    import triton.language as tl

# A sample's sums must not depend on its batch, so the samples per program are the same for any batch.
SAMPLES = 16


class PixelOrder(NamedTuple):
    """The pixels of a mask, active ones first: the form in which kernels read a mask.

    `pixels` (N,) is int32; the first `active` entries name the active pixels.
    """

    pixels: Tensor
    active: int


def pixel_order(mask: Tensor, shape: tuple[int, ...] | None = None) -> PixelOrder:
    """The order of the pixels of a mask. The call waits for the device.

    Args:
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        shape: (C, H, W) of the samples; that of the mask when None.
    """
    passive = mask.expand(shape or mask.shape).reshape(-1)
    # A stable sort of bytes exists where a stable sort of booleans does not.
    index = torch.sort(passive.to(torch.uint8), stable=True).indices.to(torch.int32)
    return PixelOrder(index, int((~passive).sum()))


# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def matmul(a, b):
    """a @ b. Matrix units take float64 operands in some layouts only, so those are multiplied out."""
    if a.dtype == tl.float64:
        return tl.sum(a[:, :, None] * b[None, :, :], axis=1)
    return tl.dot(a, b, input_precision="ieee")


@kernel
def load_features(
    features_ptr, b, exists, k, FEATURES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr
):  # fmt: skip
    """(samples, features k)."""
    ptrs = features_ptr + b[:, None] * FEATURES + k[None, :]
    f = tl.load(ptrs, mask=exists[:, None] & (k < FEATURES)[None, :], other=0.0)
    return f if NARROW else f.to(ACC)


@kernel
def load_weights(
    weight_ptr, features_ptr, pixel, inside, k,
    FEATURES: tl.constexpr, ACC: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """(pixels, features k) of a weight, rounded to the dtype of the features."""
    ptrs = weight_ptr + tl.cast(pixel, tl.int64)[:, None] * FEATURES + k[None, :]
    w = tl.load(ptrs, mask=inside[:, None] & (k < FEATURES)[None, :], other=0.0)
    w = w.to(features_ptr.dtype.element_ty)
    return w if NARROW else w.to(ACC)


@kernel
def head_output(
    features_ptr, weight_ptr, table_ptr, b, exists, label, pixel, inside, pixels,
    FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """(samples, pixels) of one head."""
    acc = tl.zeros((SAMPLES, BLOCK), ACC)
    for start in tl.range(0, FEATURES, BLOCK_K, num_stages=1):
        k = start + tl.arange(0, BLOCK_K)
        f = load_features(features_ptr, b, exists, k, FEATURES, ACC, NARROW)
        w = load_weights(weight_ptr, features_ptr, pixel, inside, k, FEATURES, ACC, NARROW)
        acc += matmul(f, tl.trans(w))
    ptrs = table_ptr + label[:, None] * pixels + pixel[None, :]
    return acc + tl.load(ptrs, mask=exists[:, None] & inside[None, :], other=0.0).to(ACC)


@kernel
def _head_fwd_kernel(
    x_ptr, scale_features_ptr, shift_features_ptr, scale_weight_ptr, shift_weight_ptr, scale_table_ptr,
    shift_table_ptr, label_index_ptr, order_ptr, next_mask_ptr, affine_ptr, y_ptr, masked_ptr, partial_ptr,
    x_stride, batch, active, pixels, n_chunks,
    FEATURES: tl.constexpr, BLOCK_K: tl.constexpr, SAMPLES: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, NARROW: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr, NEXT: tl.constexpr,
    AFFINE: tl.constexpr,
):  # fmt: skip
    group, chunk = locate(tl.program_id(0), n_chunks, False)
    b = group * SAMPLES + tl.arange(0, SAMPLES)
    exists = b < batch
    index = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = index < active
    pixel = tl.load(order_ptr + index, mask=inside, other=0)
    label = tl.load(label_index_ptr + b, mask=exists, other=0)
    raw = head_output(
        scale_features_ptr, scale_weight_ptr, scale_table_ptr, b, exists, label, pixel, inside, pixels,
        FEATURES, BLOCK_K, SAMPLES, BLOCK, ACC, NARROW,
    )  # fmt: skip
    t = head_output(
        shift_features_ptr, shift_weight_ptr, shift_table_ptr, b, exists, label, pixel, inside, pixels,
        FEATURES, BLOCK_K, SAMPLES, BLOCK, ACC, NARROW,
    )  # fmt: skip
    s = tl.where(inside[None, :], tanh(raw) * BOUND, 0.0)
    total = tl.sum(s, axis=1)
    valid = exists[:, None] & inside[None, :]
    x = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=valid, other=0.0).to(ACC)
    if INVERSE:
        y = (x - t) * tl.exp(-s)
        total = -total
    else:
        y = x * tl.exp(s) + t
    _finish(
        y, b, pixel, valid, pixels, inside, next_mask_ptr, affine_ptr, y_ptr, masked_ptr,
        ACC, INVERSE, NEXT, AFFINE,
    )  # fmt: skip
    tl.store(partial_ptr + b * n_chunks + chunk, total, mask=exists)
    inside = (index + active) < pixels
    pixel = tl.load(order_ptr + active + index, mask=inside, other=0)
    valid = exists[:, None] & inside[None, :]
    x = tl.load(x_ptr + b[:, None] * x_stride + pixel[None, :], mask=valid, other=0.0).to(ACC)
    _finish(
        x, b, pixel, valid, pixels, inside, next_mask_ptr, affine_ptr, y_ptr, masked_ptr,
        ACC, INVERSE, NEXT, AFFINE,
    )  # fmt: skip


@kernel
def _finish(
    y, b, pixel, valid, pixels, inside, next_mask_ptr, affine_ptr, y_ptr, masked_ptr,
    ACC: tl.constexpr, INVERSE: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
):  # fmt: skip
    """Store the result, after the multiply-add that may follow, and its masked copy."""
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
        if INVERSE:
            y = (y - c) * a
        else:
            y = y * a + c
    offset = b[:, None] * pixels + pixel[None, :]
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=valid)
    if NEXT:
        keep = tl.load(next_mask_ptr + pixel, mask=inside, other=0) != 0
        masked = tl.where(keep[None, :], y, 0.0).to(masked_ptr.dtype.element_ty)
        tl.store(masked_ptr + offset, masked, mask=valid)


# -- launcher ------------------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """The share of a program.

    Attributes:
        pixels: active pixels; as many passive ones follow.
        block_k: features per turn of a product over them.
        block_f: features whose gradients a program computes; 0 in the forward pass.
        warps: of a program.
    """

    pixels: int
    block_k: int
    block_f: int
    warps: int


_FORWARD = {
    "narrow": Blocks(64, 64, 0, 4),
    "float32": Blocks(64, 16, 0, 4),
    "float64": Blocks(32, 16, 0, 4),
}


def is_narrow(scale_features: Tensor, shift_features: Tensor, acc: torch.dtype) -> bool:
    """Whether products run in the features' 16-bit dtype on tensor cores.

    They do not in the interpreter, whose bfloat16 products are wrong.
    """
    dtype = scale_features.dtype
    fits = dtype == shift_features.dtype and dtype in (torch.bfloat16, torch.float16) and acc == torch.float32
    # A launch recorded in the interpreter stands for a launch on a GPU.
    return fits and (bool(launching._records) or not launching.interpreted())


def choose_blocks(table: dict[str, Blocks], narrow: bool, acc: torch.dtype, features: int) -> Blocks:
    """The entry of a table, with no more features than there are."""
    blocks = table["narrow" if narrow else "float64" if acc == torch.float64 else "float32"]
    most = max(16, power_of_two(features))
    return blocks._replace(block_k=min(blocks.block_k, most), block_f=min(blocks.block_f, most))


def count_chunks(blocks: Blocks, active: int, pixels: int) -> int:
    """Programs that cover the active and the passive pixels of a group of samples."""
    return cdiv(max(active, pixels - active), blocks.pixels)


def launch_coupling_head(
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
    dtype: torch.dtype | None,
    keep_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, log-determinant, masked copy of y, empty tensor); the copy is empty without `next_mask`."""
    acc = acc_dtype(x.dtype)
    x, tanh_raw = laid_out(x, False), x.new_empty(0, dtype=acc)
    batch, pixels = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    y, masked = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(0)
    if next_mask is not None:
        masked = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=acc), masked, tanh_raw
    if order is None:
        order, active = pixel_order(mask, x.shape[1:])
    narrow, features = is_narrow(scale_features, shift_features, acc), scale_features.shape[1]
    blocks = choose_blocks(_FORWARD, narrow, acc, features)
    chunks = count_chunks(blocks, active, pixels)
    partial = torch.empty(batch, chunks, dtype=acc, device=x.device)
    launch(
        _head_fwd_kernel, cdiv(batch, SAMPLES) * chunks, x, blocks.warps,
        x, scale_features.contiguous(), shift_features.contiguous(), scale_weight.contiguous(),
        shift_weight.contiguous(), scale_table.contiguous(), shift_table.contiguous(),
        label_index.contiguous(), order, mask_bytes(next_mask, x.shape), affine,
        y, None if next_mask is None else masked, partial, x.stride(0), batch, active, pixels, chunks,
        FEATURES=features, BLOCK_K=blocks.block_k, SAMPLES=SAMPLES, BLOCK=blocks.pixels,
        ACC=triton_dtype(acc), NARROW=narrow, BOUND=bound, INVERSE=inverse, NEXT=next_mask is not None,
        AFFINE=affine is not None,
    )  # fmt: skip
    return y, sum_chunks(partial), masked, tanh_raw
