"""Triton kernels of the atrous pyramid's backward pass.

Three kernels of `pyramid_weights` give the gradients of the weights and of the means. Then one gives those of
the branches, the library's convolutions take these back to x and to their weights, and a last one adds what x
gets by all ways. The gradient of a mean is the same for all pixels of its channel, and is added where the
gradient of that channel is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.layouts import empty_image, is_channels_last
from fastflow.kernels.triton.launch import (
    cdiv,
    kernel,
    launch,
    needs_int64_offsets,
    triton_dtype,
    vector_width,
)
from fastflow.kernels.triton.parts import elements, place_of, tile_of
from fastflow.kernels.triton.pyramid import (
    Blocks,
    cast_each,
    choose_blocks,
    dense,
    image_rows,
    is_narrow,
    multiply,
    precision,
    unpack,
)
from fastflow.kernels.triton.pyramid_weights import launch_map_sums, launch_weights_backward
from fastflow.numerics import acc_dtype, full_precision

if TYPE_CHECKING:
    import triton.language as tl

# -- kernels ------------------------------------------------------------------------------------------------


@kernel
def _unmapped(
    grad_ptr, maps_ptr, d_means_ptr, b, i, p, real, pixels, k: tl.constexpr,
    CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient that channels i of branch k get through the last map and through their means."""
    total = tl.zeros((BLOCK_C, BLOCK), ACC)
    total += tl.load(d_means_ptr + b * (4 * CHANNELS) + k * CHANNELS + i, mask=real, other=0.0)[:, None]
    for offset in tl.range(0, CHANNELS, BLOCK_O, num_stages=1):
        o = offset + tl.arange(0, BLOCK_O)
        row = o < CHANNELS
        ptr = grad_ptr + b * (CHANNELS * pixels)
        g = image_rows(ptr, o, p, row, pixels, CHANNELS, CHANNELS_LAST, ACC, NARROW)
        ptr = maps_ptr + b * (CHANNELS * 4 * CHANNELS) + k * CHANNELS
        place = o[:, None] * (4 * CHANNELS) + i[None, :]
        mapped = tl.load(ptr + place, mask=row[:, None] & real[None, :], other=0.0)
        total += multiply(tl.trans(mapped if NARROW else mapped.to(ACC)), g, PRECISION)
    return total


@kernel
def _branches_bwd_kernel(
    grad_ptr, maps_ptr, d_means_ptr, first_ptr, second_ptr, third_ptr, d_x_ptr, pixels_v, n_chunks,
    V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, NARROW: tl.constexpr,
    PRECISION: tl.constexpr, INPUT: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The gradients of the branches; INPUT: the gradient of x, whose parts by the convolutions they are."""
    b, start, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, BLOCK_C, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    i = start + tl.arange(0, BLOCK_C)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = i < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = b * (CHANNELS * pixels) + place_of(i[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    if INPUT:
        total = _unmapped(
            grad_ptr, maps_ptr, d_means_ptr, b, i, p, real, pixels, 0, CHANNELS, BLOCK_O, BLOCK_C, BLOCK, ACC,
            CHANNELS_LAST, NARROW, PRECISION,
        )  # fmt: skip
        total += tl.load(first_ptr + place, mask=inside, other=0.0).to(ACC)
        total += tl.load(second_ptr + place, mask=inside, other=0.0).to(ACC)
        total += tl.load(third_ptr + place, mask=inside, other=0.0).to(ACC)
        tl.store(d_x_ptr + place, total.to(d_x_ptr.dtype.element_ty), mask=inside)
    else:
        for k in tl.static_range(1, 4):
            total = _unmapped(
                grad_ptr, maps_ptr, d_means_ptr, b, i, p, real, pixels, k, CHANNELS, BLOCK_O, BLOCK_C, BLOCK,
                ACC, CHANNELS_LAST, NARROW, PRECISION,
            )  # fmt: skip
            if k == 1:
                ptr = first_ptr
            elif k == 2:
                ptr = second_ptr
            else:
                ptr = third_ptr
            tl.store(ptr + place, total.to(ptr.dtype.element_ty), mask=inside)


# -- launcher -----------------------------------------------------------------------------------------------

_UNMAP = {
    "narrow": Blocks(32, 32, 128, 8),
    "float32": Blocks(32, 32, 64, 8),
    "float64": Blocks(16, 16, 32, 4),
}


def launch_atrous_pyramid_backward(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor], dilations: Sequence[int]
) -> list[Tensor]:
    """The gradients of x and of the weights; `kept` is what the forward pass gave beside its result."""
    named = unpack(weights, dilations)
    *branches, maps, means, hidden, gates = kept
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    batch, channels, height, width = x.shape
    pixels = height * width
    d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    d_x = empty_image((batch, channels, height, width), x, channels_last)
    if x.numel() == 0:
        return [d_x, *(d_weight.zero_() for d_weight in d_weights)]
    grad, x = dense(grad, channels_last), dense(x, channels_last)
    sums = launch_map_sums(grad, x, branches, channels_last)
    into = unpack(d_weights, dilations)
    d_means = launch_weights_backward(sums, (means, hidden, gates), named, into, pixels)
    narrow, v = is_narrow(x), vector_width(pixels)
    blocks = choose_blocks(_UNMAP, channels, narrow, acc)
    chunks = cdiv(pixels, blocks.pixels)
    programs = batch * cdiv(channels, blocks.channels) * chunks
    shared = {
        "V": v, "CHANNELS": channels, "BLOCK_O": blocks.rows, "BLOCK_C": blocks.channels,
        "BLOCK": blocks.pixels, "ACC": triton_dtype(acc), "CHANNELS_LAST": channels_last, "NARROW": narrow,
        "PRECISION": precision(x),
        "INT64_OFFSETS": needs_int64_offsets(channels * pixels, channels * blocks.pixels),
    }  # fmt: skip
    d_branches = [torch.empty_like(branch) for branch in branches]
    launch(
        _branches_bwd_kernel, programs, x, blocks.warps,
        grad, maps, d_means, *d_branches, None, pixels // v, chunks, INPUT=False, **shared,
    )  # fmt: skip
    parts, d_kernels = convolve_back(d_branches, x, [weight for weight, _ in named.dilated], dilations)
    launch(
        _branches_bwd_kernel, programs, x, blocks.warps,
        grad, maps, d_means, *(dense(part, channels_last) for part in parts), d_x, pixels // v, chunks,
        INPUT=True, **shared,
    )  # fmt: skip
    for position, d_kernel in enumerate(_contiguous_each(d_kernels, [weight for weight, _ in into.dilated])):
        # A dilated weight stands after the undilated one and its bias, before its own bias.
        d_weights[2 + 2 * position] = d_kernel
    return [d_x, *d_weights]


def _contiguous_each(values: list[Tensor], into: list[Tensor]) -> list[Tensor]:
    """`values` with the dtype and layout of `into`, copied to it by one launch where they have others."""
    if all(v.dtype == i.dtype and v.is_contiguous() for v, i in zip(values, into, strict=True)):
        return values
    torch._foreach_copy_(into, values)
    return into


def convolve_back(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of x and of the weights through each dilated convolution."""
    with full_precision(x):
        both = [
            torch.ops.aten.convolution_backward(
                grad, x, weight, None, (1, 1), (d, d), (d, d), False, (0, 0), 1, (True, True, False)
            )
            for grad, weight, d in zip(grads, cast_each(weights, x.dtype), dilations, strict=True)
        ]
    return [d_x for d_x, _, _ in both], [d_weight for _, d_weight, _ in both]
