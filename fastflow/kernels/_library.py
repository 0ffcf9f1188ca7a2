"""What all ops share: the accumulation dtype, fixed-order sums and argument checks."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 4096


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_per_sample(x: Tensor) -> Tensor:
    """Sum of each sample, (B, ...) -> (B,), in a two-stage order that depends on the sample's shape only.

    ATen splits the sum of a single long row over threads, but never that of several rows; without the chunks a sample
    alone in its batch would get other bits than among others.
    """
    flat = x.flatten(1)
    whole = flat.shape[1] // CHUNK * CHUNK
    rest = flat[:, whole:].sum(dim=1)
    if whole == 0:
        return rest
    return flat[:, :whole].unflatten(1, (-1, CHUNK)).sum(dim=2).sum(dim=1) + rest


def check_image(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is a floating-point (B, C, H, W) tensor."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point (B, C, H, W) tensor, got {tuple(x.shape)} {x.dtype}")


def check_mask(mask: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `mask` is boolean and (C, H, W) or (1, H, W) for `x` (B, C, H, W)."""
    _, c, h, w = x.shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((c, h, w), (1, h, w)):
        raise ValueError(f"mask must be bool ({c}, {h}, {w}) or (1, {h}, {w}), got {tuple(mask.shape)} {mask.dtype}")


def check_same_shape(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `value` has the shape of `x`."""
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
