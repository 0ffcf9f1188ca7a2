"""Squeeze: space to depth in 2x2 blocks, and back.

(B, C, H, W) <-> (B, 4C, H/2, W/2); new channel = 4*c + 2*(row % 2) + (col % 2). A permutation: its log-determinant is 0 and
each direction is the other's backward. Input of any layout, the output is contiguous. Source: RealNVP (Dinh et al., 2017),
section 3.6.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastflow.kernels._launch import cdiv, elements, is_wide, kernel, launch, locate, vector_width
from fastflow.kernels._library import check_image, laid_out, register, takes_reference

if TYPE_CHECKING:
    import triton.language as tl

BLOCK = 1024


# -- definition -----------------------------------------------------------------------------------------------------------


def squeeze2x2_reference(x: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    # Not pixel_unshuffle: it returns an empty batch as it came.
    batch, c, h, w = x.shape
    return x.reshape(batch, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * c, h // 2, w // 2)


def unsqueeze2x2_reference(y: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    batch, c, h, w = y.shape
    return y.reshape(batch, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(batch, c // 4, 2 * h, 2 * w)


# -- kernels --------------------------------------------------------------------------------------------------------------
# One program moves BLOCK pixels of the squeezed image for one of its four-channel groups and one row parity: two rows of
# channels, which lie interleaved in the large image. `pixels` and `width` are those of the squeezed image.


@kernel
def _large_offsets(j, width_v, row, V: tl.constexpr):
    """Where element j of the interleaved pair (2 * pixel + column parity) lies in its plane of the large image."""
    width = width_v * V
    pixel = j // 2
    offs = 2 * (pixel // width) * width + 2 * width * row + j
    # A run of 2 V elements starts at a multiple of 2 V and stays in its row, which is 2 V times something long.
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
    UNDO: tl.constexpr,
    WIDE: tl.constexpr,
):
    outer, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    row = (outer % 2).to(chunk.dtype)
    b = outer // 2 // groups
    group = (outer // 2 % groups).to(chunk.dtype)
    pixels = elements(pixels_v, V, WIDE)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    j = 2 * chunk * BLOCK + tl.arange(0, 2 * BLOCK)
    large = group * 4 * pixels + _large_offsets(j, width_v, row, V)
    small = (group * 4 + 2 * row) * pixels + p
    x_ptr += b * x_stride_v * V
    y_ptr += b * groups * 4 * pixels
    if UNDO:
        even = tl.load(x_ptr + small, mask=p < pixels, other=0.0)
        odd = tl.load(x_ptr + small + pixels, mask=p < pixels, other=0.0)
        tl.store(y_ptr + large, tl.reshape(tl.join(even, odd), (2 * BLOCK,)), mask=j < 2 * pixels)
    else:
        pair = tl.load(x_ptr + large, mask=j < 2 * pixels, other=0.0)
        even, odd = tl.split(tl.reshape(pair, (BLOCK, 2)))
        tl.store(y_ptr + small, even, mask=p < pixels)
        tl.store(y_ptr + small + pixels, odd, mask=p < pixels)


# -- launchers ------------------------------------------------------------------------------------------------------------


def _move(x: Tensor, y: Tensor, groups: int, height: int, width: int, undo: bool) -> Tensor:
    """Fill y from x; `groups` four-channel groups of `height` x `width` pixels in the squeezed image."""
    if x.numel():
        pixels = height * width
        chunks, v = cdiv(pixels, BLOCK), vector_width(width, x.stride(0))
        launch(
            _squeeze_kernel, x.shape[0] * groups * 2 * chunks, x, 4,
            x, y, x.stride(0) // v, groups, width // v, pixels // v, chunks,
            V=v, BLOCK=BLOCK, UNDO=undo, WIDE=is_wide(4 * groups * pixels, 2 * BLOCK),
        )  # fmt: skip
    return y


def _squeeze_launch(x: Tensor) -> Tensor:
    x = laid_out(x, channels_last=False)
    batch, c, h, w = x.shape
    return _move(x, x.new_empty(batch, 4 * c, h // 2, w // 2), c, h // 2, w // 2, undo=False)


def _unsqueeze_launch(y: Tensor) -> Tensor:
    y = laid_out(y, channels_last=False)
    batch, c, h, w = y.shape
    return _move(y, y.new_empty(batch, c // 4, 2 * h, 2 * w), c // 4, h, w, undo=True)


# -- op and autograd ------------------------------------------------------------------------------------------------------


# clone: an op never returns its input, not even where the permutation is the identity.
_squeeze = register(
    "squeeze2x2(Tensor x) -> Tensor",
    reference=lambda x: squeeze2x2_reference(x).clone(memory_format=torch.contiguous_format),
    triton=_squeeze_launch,
    fake=lambda x: x.new_empty(x.shape[0], 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2),
)
_unsqueeze = register(
    "unsqueeze2x2(Tensor y) -> Tensor",
    reference=lambda y: unsqueeze2x2_reference(y).clone(memory_format=torch.contiguous_format),
    triton=_unsqueeze_launch,
    fake=lambda y: y.new_empty(y.shape[0], y.shape[1] // 4, 2 * y.shape[2], 2 * y.shape[3]),
)


class Squeeze(torch.autograd.Function):
    """Squeeze under autograd; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out: Tensor = _squeeze(x)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return unsqueeze2x2(grad)


class Unsqueeze(torch.autograd.Function):
    """Unsqueeze under autograd; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        out: Tensor = _unsqueeze(y)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return squeeze2x2(grad)


def squeeze2x2(x: Tensor) -> Tensor:
    """Move each 2x2 block of pixels into channels.

    Args:
        x: (B, C, H, W), H and W even.

    Returns:
        (B, 4C, H/2, W/2).

    Raises:
        ValueError: `x` is not a floating-point image batch, or H or W is odd.

    Example:
        >>> squeeze2x2(torch.arange(4.0).view(1, 1, 2, 2)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    check_image("x", x)
    if x.shape[2] % 2 or x.shape[3] % 2:
        raise ValueError(f"x must have even height and width to be squeezed, got {tuple(x.shape)}")
    if takes_reference():
        return squeeze2x2_reference(x)
    out: Tensor = Squeeze.apply(x)
    return out


def unsqueeze2x2(y: Tensor) -> Tensor:
    """Undo `squeeze2x2`.

    Args:
        y: (B, 4C, H, W).

    Returns:
        (B, C, 2H, 2W).

    Raises:
        ValueError: `y` is not a floating-point image batch, or its channels are not a multiple of 4.

    Example:
        >>> unsqueeze2x2(torch.arange(4.0).view(1, 4, 1, 1)).flatten().tolist()
        [0.0, 1.0, 2.0, 3.0]
    """
    check_image("y", y)
    if y.shape[1] % 4:
        raise ValueError(f"y must have a multiple of 4 channels to be unsqueezed, got {tuple(y.shape)}")
    if takes_reference():
        return unsqueeze2x2_reference(y)
    out: Tensor = Unsqueeze.apply(y)
    return out
