"""Squeeze: space to depth in 2x2 blocks, and back.

(B, C, H, W) <-> (B, 4C, H/2, W/2); new channel = 4*c + 2*(row % 2) + (col % 2). A permutation: its log-determinant is 0 and
each direction is the other's backward. Source: RealNVP (Dinh et al., 2017), section 3.6.
"""

from __future__ import annotations

from torch import Tensor

from fastflow.kernels._library import check_image


def squeeze2x2_reference(x: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    # Not pixel_unshuffle: it returns an empty batch as it came.
    batch, c, h, w = x.shape
    return x.reshape(batch, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(batch, 4 * c, h // 2, w // 2)


def unsqueeze2x2_reference(y: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    batch, c, h, w = y.shape
    return y.reshape(batch, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(batch, c // 4, 2 * h, 2 * w)


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
    return squeeze2x2_reference(x)


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
    return unsqueeze2x2_reference(y)
