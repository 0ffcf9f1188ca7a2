"""Launches of `lu_mixing` for `bench.aot`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.aot_parts import F32, F64, Case, launcher

PIXELS = (64, 16)


def lu_mixing_cases() -> Iterator[Case]:
    """Maps of the channels of two steps, the smaller of one channel."""
    # The largest layer decides about a program; sizes between these are programs between theirs.
    for dtype, channels in itertools.product((F32, F64), (1, 16, 64)):
        params = [*_layer(1, dtype), *_layer(channels, dtype)]
        for inverse in (False, True):
            yield lambda params=params, inverse=inverse: launcher("lu_mixing")(
                params, PIXELS, [True, False], inverse
            )
        grad = torch.empty(2 + channels * (channels + 1), dtype=dtype)
        yield lambda grad=grad, params=params: launcher("lu_mixing_backward")(
            grad, torch.empty(2, dtype=F64), params, PIXELS
        )


def _layer(c: int, dtype: torch.dtype) -> list[Tensor]:
    square, line = torch.empty(c, c, dtype=dtype), torch.empty(c, dtype=dtype)
    order, sign = torch.empty(c, dtype=torch.int64), torch.empty(c, dtype=torch.int8)
    return [square, square, line, line, line, order, sign]
