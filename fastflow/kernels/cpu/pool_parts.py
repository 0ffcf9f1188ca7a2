"""Parts of the poolings and gates on CPUs, in passes that ATen vectorises.

ATen vectorises `amax`, but neither a `max` with indices nor a comparison into booleans nor a selection by
them. A first maximum is therefore found from its value, by a comparison into floats. Few samples are taken at
a time, so that passes after the first find them in cache, and so that nothing as large as x is allocated but
results.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastflow.kernels.layouts import is_channels_last
from fastflow.numerics import sum_per_sample

PART_ELEMENTS = 2**17


def in_parts(
    function: Callable[..., tuple[Tensor, ...]], out: Tensor | None, *values: Tensor | None
) -> tuple[Tensor, ...]:
    """`function(out, *values)` on as many samples at a time as have about PART_ELEMENTS elements.

    The first of `values` is an image (B, C, H, W); results of a sample depend on that sample alone.
    """
    x = values[0]
    assert x is not None
    batch, channels, h, w = x.shape
    size = max(1, PART_ELEMENTS // (channels * h * w))
    if batch <= size:
        return function(out, *values)
    parts = [slice(start, start + size) for start in range(0, batch, size)]
    results = [function(*(None if v is None else v[part] for v in (out, *values))) for part in parts]
    return tuple(torch.cat(pieces) for pieces in zip(*results, strict=True))


def sigmoid(logits: Tensor, acc: torch.dtype) -> Tensor:
    """The gates of logits.

    ATen's sigmoid rounds the elements of an incomplete vector in another way, so that bits would depend on
    the place of a sample in its batch.
    """
    return logits.to(acc).neg().exp_().add_(1.0).reciprocal_()


def max_pixels(x: Tensor) -> Tensor:
    """The maximum of each channel, (B, C)."""
    if not is_channels_last(x):
        return x.amax(dim=(2, 3))
    b, c, h, w = x.shape
    lines = x.permute(0, 2, 3, 1).reshape(b, h, w * c).amax(dim=1)
    return lines.view(b, w, c).amax(dim=1)


def sum_pixels(x: Tensor) -> Tensor:
    """The sum of each channel, (B, C)."""
    # The sum of one long row is split over threads, that of several is not.
    return sum_per_sample(x)[:, None] if x.shape[1] == 1 else x.sum(dim=(2, 3))


def has_nan(x: Tensor) -> bool:
    """Whether there is a NaN, or perhaps only infinities of both signs."""
    return math.isnan(float(x.sum()))
