"""Triton kernels of `head_tables`: one grid over all heads, whose weights a table of addresses names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.triton.coupling_head import matmul
from fastflow.kernels.triton.launch import cdiv, kernel, launch, power_of_two, triton_dtype
from fastflow.kernels.triton.pointers import integer_table, pointer_table

if TYPE_CHECKING:
    import triton.language as tl

# Labels that a product takes at a time, the least that matrix units take.
LABELS = 16
# (rows, features) of a weight that a product takes: the largest that need no more registers than there are.
_BLOCKS = {torch.float32: (32, 32), torch.float64: (16, 16)}
# Parts in which the gradient of a head's features is summed.
PIECES = 32

# -- kernels -------------------------------------------------------------------------------------------------


@kernel
def _weights_of(addresses_ptr, group, ACC: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of the weights of a group."""
    pointer = tl.load(addresses_ptr + group).to(tl.pointer_type(ACC))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@kernel
def _find_group(layout_ptr, program, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """The group of a program, its block of rows, the group's rows and the rows before it."""
    g = tl.arange(0, BLOCK_G)
    starts = tl.load(layout_ptr + g, mask=g < GROUPS, other=2**62)
    group = tl.sum((starts <= program).to(tl.int32), axis=0) - 1
    block = program - tl.load(layout_ptr + group)
    return group, block, tl.load(layout_ptr + GROUPS + group), tl.load(layout_ptr + 2 * GROUPS + group)


@kernel
def _load_features(features_ptr, group, k, r, labels, FEATURES: tl.constexpr, ACC: tl.constexpr):
    """(features k, labels r) of a group."""
    ptrs = features_ptr + (group * FEATURES + k)[:, None] * labels + r[None, :]
    return tl.load(ptrs, mask=(k < FEATURES)[:, None] & (r < labels)[None, :], other=0.0).to(ACC)


@kernel
def _tables_fwd_kernel(
    features_ptr, weights_ptr, biases_ptr, layout_ptr, out_ptr, labels,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, FEATURES: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr, LABELS: tl.constexpr, ACC: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    program = tl.cast(tl.program_id(0), tl.int64)
    group, block, rows, before = _find_group(layout_ptr, program, GROUPS, BLOCK_G)
    n = block * BLOCK + tl.arange(0, BLOCK)
    inside = n < rows
    weight_ptr = _weights_of(weights_ptr, group, ACC, ALIGNED)
    bias_ptr = _weights_of(biases_ptr, group, ACC, False)
    bias = tl.load(bias_ptr + n, mask=inside, other=0.0)
    for start in range(0, labels, LABELS):
        r = start + tl.arange(0, LABELS)
        table = tl.zeros((BLOCK, LABELS), ACC) + bias[:, None]
        for first in tl.range(0, FEATURES, BLOCK_F, num_stages=1):
            k = first + tl.arange(0, BLOCK_F)
            there = inside[:, None] & (k < FEATURES)[None, :]
            w = tl.load(weight_ptr + n[:, None] * FEATURES + k[None, :], mask=there, other=0.0)
            table += matmul(w, _load_features(features_ptr, group, k, r, labels, FEATURES, ACC))
        ptrs = out_ptr + before * labels + r[None, :] * rows + n[:, None]
        tl.store(ptrs, table, mask=inside[:, None] & (r < labels)[None, :])


@kernel
def _tables_weight_kernel(
    grad_ptr, features_ptr, layout_ptr, d_weights_ptr, d_biases_ptr, labels,
    GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, FEATURES: tl.constexpr, BLOCK_F: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, LABELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of rows and features of a weight, and of its bias."""
    program = tl.cast(tl.program_id(0), tl.int64)
    part = program % PARTS
    group, block, rows, before = _find_group(layout_ptr, program // PARTS, GROUPS, BLOCK_G)
    n = block * BLOCK + tl.arange(0, BLOCK)
    k = part * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = n < rows
    d_weight = tl.zeros((BLOCK, BLOCK_F), ACC)
    d_bias = tl.zeros((BLOCK,), ACC)
    for start in range(0, labels, LABELS):
        r = start + tl.arange(0, LABELS)
        ptrs = grad_ptr + before * labels + r[None, :] * rows + n[:, None]
        grad = tl.load(ptrs, mask=inside[:, None] & (r < labels)[None, :], other=0.0)
        f = _load_features(features_ptr, group, k, r, labels, FEATURES, ACC)
        d_weight += matmul(grad, tl.trans(f))
        d_bias += tl.sum(grad, axis=1)
    ptrs = d_weights_ptr + (before + n)[:, None] * FEATURES + k[None, :]
    tl.store(ptrs, d_weight, mask=inside[:, None] & (k < FEATURES)[None, :])
    tl.store(d_biases_ptr + before + n, d_bias, mask=inside & (part == 0))


@kernel
def _tables_features_kernel(
    grad_ptr, weights_ptr, layout_ptr, partial_ptr, labels,
    GROUPS: tl.constexpr, FEATURES: tl.constexpr, BLOCK_F: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, LABELS: tl.constexpr, PIECES: tl.constexpr, ACC: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """A piece of the gradient of a block of features, over a PIECES-th of the rows, for LABELS labels."""
    program = tl.cast(tl.program_id(0), tl.int64)
    part = program % PARTS
    piece = program // PARTS % PIECES
    group = program // (PARTS * PIECES) % GROUPS
    r = program // (PARTS * PIECES * GROUPS) * LABELS + tl.arange(0, LABELS)
    rows = tl.load(layout_ptr + GROUPS + group)
    before = tl.load(layout_ptr + 2 * GROUPS + group)
    k = part * BLOCK_F + tl.arange(0, BLOCK_F)
    weight_ptr = _weights_of(weights_ptr, group, ACC, ALIGNED)
    blocks = (rows + PIECES * BLOCK - 1) // (PIECES * BLOCK)
    total = tl.zeros((BLOCK_F, LABELS), ACC)
    for i in range(blocks):
        n = (piece * blocks + i) * BLOCK + tl.arange(0, BLOCK)
        inside = n < rows
        there = inside[:, None] & (k < FEATURES)[None, :]
        w = tl.load(weight_ptr + n[:, None] * FEATURES + k[None, :], mask=there, other=0.0)
        ptrs = grad_ptr + before * labels + r[None, :] * rows + n[:, None]
        grad = tl.load(ptrs, mask=inside[:, None] & (r < labels)[None, :], other=0.0)
        total += matmul(tl.trans(w), grad)
    ptrs = partial_ptr + ((group * PIECES + piece) * FEATURES + k)[:, None] * labels + r[None, :]
    tl.store(ptrs, total, mask=(k < FEATURES)[:, None] & (r < labels)[None, :])


# -- launchers -----------------------------------------------------------------------------------------------


def _layout(weights: list[Tensor], block: int) -> tuple[Tensor, int]:
    """(first program, rows and rows before it of each group (3, G), number of programs)."""
    rows = [len(weight) for weight in weights]
    starts, before = [0], [0]
    for count in rows:
        starts.append(starts[-1] + cdiv(count, block))
        before.append(before[-1] + count)
    return integer_table((*starts[:-1], *rows, *before[:-1]), weights[0]), starts[-1]


def _is_aligned(weights: list[Tensor]) -> bool:
    return all(weight.storage_offset() * weight.element_size() % 16 == 0 for weight in weights)


def _sizes(features: Tensor) -> dict[str, object]:
    (groups, width, _), (rows, block_f) = features.shape, _BLOCKS[features.dtype]
    return {
        "GROUPS": groups, "FEATURES": width, "BLOCK_F": block_f, "BLOCK": rows, "LABELS": LABELS,
        "ACC": triton_dtype(features.dtype),
    }  # fmt: skip


def launch_head_tables(features: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The tables, flat; see `fastflow.kernels.head_tables`."""
    features, labels = features.contiguous(), features.shape[2]
    out = features.new_empty(labels * sum(len(weight) for weight in weights))
    if out.numel() == 0:
        return out
    weights, biases = [w.contiguous() for w in weights], [b.contiguous() for b in biases]
    sizes = _sizes(features)
    layout, programs = _layout(weights, _BLOCKS[features.dtype][0])
    launch(
        _tables_fwd_kernel, programs, features, 4,
        features, pointer_table(weights), pointer_table(biases), layout, out, labels,
        BLOCK_G=power_of_two(len(weights)), ALIGNED=_is_aligned(weights), **sizes,
    )  # fmt: skip
    return out


def launch_head_tables_backward(
    grad: Tensor, features: Tensor, weights: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the features (G, F, R), of all weights and of all biases."""
    features, grad, labels = features.contiguous(), grad.contiguous(), features.shape[2]
    groups, width, _ = features.shape
    size = sum(len(weight) for weight in weights)
    d_weights, d_biases = features.new_empty(size * width), features.new_empty(size)
    if size == 0 or labels == 0:
        return torch.zeros_like(features), d_weights.zero_(), d_biases.zero_()
    weights = [weight.contiguous() for weight in weights]
    sizes, parts = _sizes(features), cdiv(width, _BLOCKS[features.dtype][1])
    layout, programs = _layout(weights, _BLOCKS[features.dtype][0])
    launch(
        _tables_weight_kernel, programs * parts, features, 4,
        grad, features, layout, d_weights, d_biases, labels,
        BLOCK_G=power_of_two(groups), PARTS=parts, **sizes,
    )  # fmt: skip
    partial = features.new_empty(groups, PIECES, width, labels)
    launch(
        _tables_features_kernel, parts * PIECES * groups * cdiv(labels, LABELS), features, 4,
        grad, pointer_table(weights), layout, partial, labels,
        PARTS=parts, PIECES=PIECES, ALIGNED=_is_aligned(weights), **sizes,
    )  # fmt: skip
    return partial.sum(dim=1), d_weights, d_biases
