"""Squeeze: space to depth in 2x2 blocks, and back.

(B, C, H, W) <-> (B, 4C, H/2, W/2); new channel = 4*c + 2*(row % 2) + (col % 2). The map is a permutation, so
its log-determinant is 0 and each direction is the backward of the other. The input may have any layout, the
output is contiguous. Source: RealNVP (Dinh et al., 2017), section 3.6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import check_image
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import register, takes_reference
from fastflow.kernels.triton.squeeze import launch_squeeze2x2, launch_unsqueeze2x2
from fastflow.kernels.watching import differentiate

# -- definition ----------------------------------------------------------------------------------------------


def squeeze2x2_reference(x: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    # pixel_unshuffle is not used because it leaves the shape of an empty batch as it is.
    batch, c, h, w = x.shape
    return (
        x.reshape(batch, c, h // 2, 2, w // 2, 2)
        .permute(0, 1, 3, 5, 2, 4)
        .reshape(batch, 4 * c, h // 2, w // 2)
    )


def unsqueeze2x2_reference(y: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    batch, c, h, w = y.shape
    return y.reshape(batch, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(batch, c // 4, 2 * h, 2 * w)


# -- op and autograd -----------------------------------------------------------------------------------------


def _squeeze_cpu(x: Tensor) -> Tensor:
    # An op must not return its input, even where the permutation is the identity.
    return squeeze2x2_reference(x).clone(memory_format=torch.contiguous_format)


def _squeeze_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 4 * x.shape[1], x.shape[2] // 2, x.shape[3] // 2)


def _unsqueeze_cpu(y: Tensor) -> Tensor:
    return unsqueeze2x2_reference(y).clone(memory_format=torch.contiguous_format)


def _unsqueeze_fake(y: Tensor) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[1] // 4, 2 * y.shape[2], 2 * y.shape[3])


_squeeze = register(
    "squeeze2x2",
    definition=squeeze2x2_reference,
    cpu=_squeeze_cpu,
    triton=launch_squeeze2x2,
    fake=_squeeze_fake,
    functions=("squeeze2x2",),
)
_unsqueeze = register(
    "unsqueeze2x2",
    definition=unsqueeze2x2_reference,
    cpu=_unsqueeze_cpu,
    triton=launch_unsqueeze2x2,
    fake=_unsqueeze_fake,
    functions=("unsqueeze2x2",),
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


@planned
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
    out: Tensor = differentiate(Squeeze, x)
    return out


@planned
def unsqueeze2x2(y: Tensor) -> Tensor:
    """Move groups of four channels back into 2x2 blocks of pixels, the inverse of `squeeze2x2`.

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
    out: Tensor = differentiate(Unsqueeze, y)
    return out
