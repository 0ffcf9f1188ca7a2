"""The launches of atrous pyramids and global contexts for `bench.aot_cases`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fastflow.kernels.triton import global_mlp, pyramid, pyramid_backward
from fastflow.numerics import acc_dtype

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DILATIONS = (6, 12, 18)

Case = Callable[[], Any]


def _pyramid_cases() -> Iterator[Case]:
    # Products take 16 or 32 channels at a time, or more of them in turns. Other layouts and sizes change
    # addressing only.
    for dtype, weights in ((F32, F32), (BF16, F32), (F16, F32), (F64, F64)):
        yield from _pyramid((2, 16, 92, 92), dtype, weights, False)
        if dtype in (F32, BF16):
            yield from _pyramid((2, 32, 184, 184), dtype, weights, False)
            yield from _pyramid((2, 64, 92, 92), dtype, weights, False)
            yield from _pyramid((2, 256, 23, 23), dtype, weights, False)
            yield from _pyramid((2, 32, 32, 32), dtype, weights, True)


def _pyramid(
    shape: tuple[int, int, int, int], dtype: torch.dtype, weights: torch.dtype, last: bool
) -> Iterator[Case]:
    batch, channels = shape[:2]
    acc, columns, hidden = acc_dtype(dtype), 4 * channels, channels // 4
    square, vector = (channels, channels, 3, 3), (channels,)
    shapes = [(channels, channels, 1, 1), vector, *3 * [square, vector]]
    shapes += [(hidden, columns), (hidden,), (columns, hidden), (columns,), (channels, columns, 1, 1), vector]
    values = [torch.empty(size, dtype=weights) for size in shapes]
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, memory_format=layout)
    maps = torch.empty(batch, channels, columns, dtype=dtype)
    kept = [x, x, x, maps, *(torch.empty(batch, size, dtype=acc) for size in (5 * channels, hidden, columns))]

    def forward() -> None:
        with mock.patch.object(pyramid, "convolve_branches", return_value=[x, x, x]):
            pyramid.launch_atrous_pyramid(x, values, DILATIONS)

    def backward() -> None:
        d_weights = [torch.empty(square, dtype=dtype) for _ in range(3)]
        with mock.patch.object(pyramid_backward, "convolve_back", return_value=([x, x, x], d_weights)):
            pyramid_backward.launch_atrous_pyramid_backward(x, x, kept, values, DILATIONS)

    # The convolutions between the kernels are the library's, and would take minutes here.
    yield forward
    yield backward


def _mlp_cases() -> Iterator[Case]:
    # The context has a sixteenth of its channels as hidden values, the fusion 128.
    for dtype, weights in ((F32, F32), (BF16, F32), (F16, F32), (F64, F64)):
        for gated, (channels, size, hidden) in ((True, (64, 92, 4)), (False, (16, 184, 128))):
            yield from _mlp((2, channels, size, size), dtype, weights, hidden, gated, False)
            if dtype in (F32, BF16):
                yield from _mlp((2, channels, 32, 32), dtype, weights, hidden, gated, True)
    yield from _mlp((2, 256, 23, 23), F32, F32, 16, True, False)
    yield from _mlp((2, 128, 23, 23), F32, F32, 128, False, False)


def _mlp(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    weights: torch.dtype,
    hidden: int,
    gated: bool,
    last: bool,
) -> Iterator[Case]:
    batch, channels = shape[:2]
    shapes = [(hidden, channels), (hidden,), (channels, hidden), (channels,)]
    values = [torch.empty(size, dtype=weights) for size in (shapes[::2] if gated else shapes)]
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, memory_format=layout)
    kept = [torch.empty(batch, size, dtype=acc_dtype(dtype)) for size in (channels, hidden, channels)]
    yield lambda: global_mlp.launch_global_mlp(x, values, gated)
    yield lambda: global_mlp.launch_global_mlp_backward(x, x, kept, values, gated)


CASES = (_pyramid_cases, _mlp_cases)
