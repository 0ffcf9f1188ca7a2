"""Triton kernels of the squeeze and its inverse.

One program moves BLOCK pixels of the squeezed image, for one of its four-channel groups and one row parity:
two channels, whose pixels lie interleaved in the large image. `pixels` and `width` are those of the squeezed
image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from fastflow.kernels.layouts import laid_out
from fastflow.kernels.triton.launch import cdiv, kernel, launch, needs_int64_offsets, vector_width
from fastflow.kernels.triton.parts import elements, locate

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024


@kernel
def _large_offsets(j, width_v, row, V: tl.constexpr):
    """Where element j = 2 * pixel + column parity of two interleaved channels lies in the large plane."""
    width = width_v * V
    pixel = j // 2
    offs = 2 * (pixel // width) * width + 2 * width * row + j
    # A run of 2 V elements starts at a multiple of 2 V, and a row's length is one, so a run stays in its row.
    return tl.max_contiguous(tl.multiple_of(offs, 2 * V), 2 * V)


@kernel
def _squeeze_kernel(
    x_ptr,
    y_ptr,
    x_stride_v,
    groups,
    width_v,
    pixels_v,
    n_chunks,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    INVERSE: tl.constexpr,
    INT64_OFFSETS: tl.constexpr,
):
    outer, chunk = locate(tl.program_id(0), n_chunks, INT64_OFFSETS)
    row = (outer % 2).to(chunk.dtype)
    b = outer // 2 // groups
    group = (outer // 2 % groups).to(chunk.dtype)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    j = 2 * chunk * BLOCK + tl.arange(0, 2 * BLOCK)
    large = group * 4 * pixels + _large_offsets(j, width_v, row, V)
    small = (group * 4 + 2 * row) * pixels + p
    x_ptr += b * x_stride_v * V
    y_ptr += b * groups * 4 * pixels
    if INVERSE:
        even = tl.load(x_ptr + small, mask=p < pixels, other=0.0)
        odd = tl.load(x_ptr + small + pixels, mask=p < pixels, other=0.0)
        tl.store(y_ptr + large, tl.reshape(tl.join(even, odd), (2 * BLOCK,)), mask=j < 2 * pixels)
    else:
        pair = tl.load(x_ptr + large, mask=j < 2 * pixels, other=0.0)
        even, odd = tl.split(tl.reshape(pair, (BLOCK, 2)))
        tl.store(y_ptr + small, even, mask=p < pixels)
        tl.store(y_ptr + small + pixels, odd, mask=p < pixels)


def _move(x: Tensor, y: Tensor, groups: int, height: int, width: int, inverse: bool) -> Tensor:
    """Fill y from x, whose squeezed image has `groups` four-channel groups of `height` x `width` pixels."""
    if x.numel():
        pixels = height * width
        chunks, v = cdiv(pixels, BLOCK), vector_width(width, x.stride(0))
        launch(
            _squeeze_kernel, x.shape[0] * groups * 2 * chunks, x, 4,
            x, y, x.stride(0) // v, groups, width // v, pixels // v, chunks,
            V=v, BLOCK=BLOCK, INVERSE=inverse,
            INT64_OFFSETS=needs_int64_offsets(4 * groups * pixels, 2 * BLOCK),
        )  # fmt: skip
    return y


def launch_squeeze2x2(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H/2, W/2)."""
    x = laid_out(x, channels_last=False)
    batch, c, h, w = x.shape
    return _move(x, x.new_empty(batch, 4 * c, h // 2, w // 2), c, h // 2, w // 2, inverse=False)


def launch_unsqueeze2x2(y: Tensor) -> Tensor:
    """(B, 4C, H, W) -> (B, C, 2H, 2W)."""
    y = laid_out(y, channels_last=False)
    batch, c, h, w = y.shape
    return _move(y, y.new_empty(batch, c // 4, 2 * h, 2 * w), c // 4, h, w, inverse=True)
