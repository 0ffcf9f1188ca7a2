"""The reductions and gates of CBAM (convolutional block attention).

`pool_pixels` takes mean and max over the pixels of each channel, `pool_channels` mean and max over the channels of each pixel
after the channel gate, `apply_gates` multiplies by both gates. Means are summed in float32 or wider; the gradient of a maximum
goes where ATen sends it. Source: Woo et al., 2018.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels._library import check_image


def pool_pixels_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in plain ATen."""
    flat = x.flatten(2)
    return flat.mean(dim=2), flat.max(dim=2).values


def pool_channels_reference(x: Tensor, channel_gate: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    gated = x * channel_gate[:, :, None, None]
    return torch.stack((gated.mean(dim=1), gated.max(dim=1).values), dim=1)


def apply_gates_reference(x: Tensor, channel_gate: Tensor, spatial_gate: Tensor) -> Tensor:
    """The definition, in plain ATen."""
    return x * channel_gate[:, :, None, None] * spatial_gate


def pool_pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and max over the pixels of each channel.

    Args:
        x: (B, C, H, W), at least one pixel.

    Returns:
        `(mean, max)`, each (B, C).

    Raises:
        ValueError: `x` is not a floating-point image batch.
    """
    check_image("x", x)
    return pool_pixels_reference(x)


def pool_channels(x: Tensor, channel_gate: Tensor) -> Tensor:
    """Mean and max over the gated channels of each pixel.

    Args:
        x: (B, C, H, W).
        channel_gate: (B, C).

    Returns:
        (B, 2, H, W): mean, max.

    Raises:
        ValueError: a shape does not fit.
    """
    _check_channel_gate(x, channel_gate)
    return pool_channels_reference(x, channel_gate)


def apply_gates(x: Tensor, channel_gate: Tensor, spatial_gate: Tensor) -> Tensor:
    """Multiply `x` by a gate per channel and a gate per pixel.

    Args:
        x: (B, C, H, W).
        channel_gate: (B, C).
        spatial_gate: (B, 1, H, W).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape does not fit.
    """
    _check_channel_gate(x, channel_gate)
    if tuple(spatial_gate.shape) != (x.shape[0], 1, *x.shape[2:]):
        raise ValueError(f"spatial_gate must be {(x.shape[0], 1, *x.shape[2:])}, got {tuple(spatial_gate.shape)}")
    return apply_gates_reference(x, channel_gate, spatial_gate)


def _check_channel_gate(x: Tensor, channel_gate: Tensor) -> None:
    check_image("x", x)
    if channel_gate.shape != x.shape[:2]:
        raise ValueError(f"channel_gate must be {tuple(x.shape[:2])}, got {tuple(channel_gate.shape)}")
