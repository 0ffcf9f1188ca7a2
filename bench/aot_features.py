"""The launches on features that `bench.aot` builds kernels for: norms, poolings, gates, attention blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bench.aot_parts import BF16, F16, F32, F64, FLOAT32_STREAM, Case, image, launcher
from fastflow.numerics import acc_dtype

# -- norms ---------------------------------------------------------------------------------------------------


def norm_cases() -> Iterator[Case]:
    # One shape for each size of tile, three of them larger than any that a backward pass keeps whole.
    shapes = [
        (16, 46, 46), (32, 23, 23), (64, 12, 12), (128, 6, 6), (256, 3, 3),
        (16, 184, 184), (64, 92, 92), (128, 23, 23),
    ]  # fmt: skip
    whole, split = (16, 46, 46), (16, 184, 184)
    for dtype, shape in itertools.product((F32, BF16, F16, F64), shapes):
        few = shape in (whole, (32, 23, 23), split)
        if dtype in (F16, F64) and not few:
            continue
        yield from _norm(shape, dtype, False, 0.0, False)
        # Whatever else changes the program is built for some of the shapes alone.
        if shape in (whole, split, (128, 23, 23)):
            yield from _norm(shape, dtype, True, 0.3, False)
        if few and dtype in (F32, BF16):
            yield from _norm(shape, dtype, False, 0.3, False)
            yield from _norm(shape, dtype, True, 0.0, False)
            yield from _norm(shape, dtype, True, 0.3, True)


def _norm(
    shape: tuple[int, int, int], dtype: torch.dtype, residual: bool, dropout: float, last: bool
) -> Iterator[Case]:
    x, acc = image((2, *shape), dtype, last), acc_dtype(dtype)
    gamma, beta = torch.empty(7, shape[0], dtype=acc), torch.empty(7, shape[0], dtype=acc)
    label_index = torch.zeros(2, dtype=torch.int64)
    seeds = torch.zeros(2, dtype=torch.int32) if dropout else None
    stats = torch.empty(2, 8, 2, dtype=acc)
    arguments = (gamma, beta, label_index, x if residual else None, seeds, 8)
    yield lambda: launcher("norm_film_act")(x, *arguments, 1e-5, dropout, dtype)
    yield lambda: launcher("norm_film_act_backward")(x, x, stats, *arguments, dropout)


def sampled_norm_cases() -> Iterator[Case]:
    # The tiles are those of `norm_cases`: the smallest and the largest of them, and a split group.
    for dtype, net in (*FLOAT32_STREAM, (BF16, F32), (BF16, BF16), (F16, F16), (F64, F64)):
        for shape in ((16, 46, 46), (128, 23, 23), (128, 6, 6)):
            if shape == (16, 46, 46) or (dtype, net) in ((F32, F32), (BF16, F32)):
                yield from _sampled_norm(shape, dtype, net, False, 0.0)
        if dtype in (F32, BF16):
            yield from _sampled_norm((16, 46, 46), dtype, net, True, 0.3)


def _sampled_norm(
    shape: tuple[int, int, int], dtype: torch.dtype, net: torch.dtype, residual: bool, dropout: float
) -> Iterator[Case]:
    x, stats = image((2, *shape), dtype), torch.empty(2, 8, 2, dtype=acc_dtype(dtype))
    modulation = torch.empty(2, 1000, dtype=net)[:, : 2 * shape[0]].unflatten(1, (shape[0], 2))
    seeds = torch.zeros(2, dtype=torch.int32) if dropout else None
    arguments = (modulation, x if residual else None, seeds, 8)
    yield lambda: launcher("norm_modulate_act")(x, *arguments, 1e-5, dropout, dtype)
    yield lambda: launcher("norm_modulate_act_backward")(x, x, stats, *arguments, dropout)


# -- poolings and gates --------------------------------------------------------------------------------------


def pool_cases() -> Iterator[Case]:
    # A plane within one chunk, and a larger one. Inference, and other layouts, are built for two dtypes
    # alone.
    for dtype, net in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F16), (F64, F64)):
        yield from _pool((2, 16, 92, 92), dtype, net, False)
        if (dtype, net) in ((F32, F32), (BF16, BF16)):
            yield from _pool((2, 16, 92, 92), dtype, net, True)
            yield from _pool((2, 32, 32, 32), dtype, net, False)
            yield from _pool_without((2, 32, 32, 32), dtype, net)
    # Planes that are no multiple of a vector, the largest plane, and more channels than a tile holds.
    for shape in ((2, 32, 23, 23), (2, 32, 184, 184), (2, 256, 6, 6)):
        yield from _pool(shape, F32, F32, False)
    yield from _pool((2, 256, 6, 6), F32, F32, True)


def _pool(shape: tuple[int, ...], dtype: torch.dtype, net: torch.dtype, last: bool) -> Iterator[Case]:
    batch, channels, h, w = shape
    x, logits, spatial = (
        image(shape, dtype, last),
        torch.empty(batch, channels, dtype=net),
        image((batch, 1, h, w), net),
    )
    pixel, channel = (torch.empty(size, dtype=torch.int32) for size in ((batch, channels), (batch, h, w)))
    grad = torch.empty(2, batch, channels, dtype=dtype)
    yield lambda: launcher("pool_pixels")(x, True, True)
    yield lambda: launcher("pool_pixels_backward")(grad, pixel, x, h, w, last)
    yield lambda: launcher("pool_channels")(x, logits, True)
    yield lambda: launcher("pool_channels_backward")(image((batch, 2, h, w), dtype), x, logits, channel, x)
    yield lambda: launcher("apply_gates")(x, logits, spatial)
    yield lambda: launcher("apply_gates_backward")(x, x, logits, spatial)


def _pool_without(shape: tuple[int, ...], dtype: torch.dtype, net: torch.dtype) -> Iterator[Case]:
    """Poolings without a maximum, without its index, and of an x that nothing else reads."""
    batch, channels, h, w = shape
    x, logits = image(shape, dtype), torch.empty(batch, channels, dtype=net)
    grad, pixel = (
        torch.empty(2, batch, channels, dtype=dtype),
        torch.empty(batch, channels, dtype=torch.int32),
    )
    channel, grad_pooled = torch.empty(batch, h, w, dtype=torch.int32), image((batch, 2, h, w), dtype)
    yield lambda: launcher("pool_pixels")(x, True, False)
    yield lambda: launcher("pool_pixels")(x, False, False)
    yield lambda: launcher("pool_pixels_backward")(grad[:1], None, x, h, w, False)
    yield lambda: launcher("pool_pixels_backward")(grad, pixel, None, h, w, False)
    yield lambda: launcher("pool_channels")(x, logits, False)
    yield lambda: launcher("pool_channels_backward")(grad_pooled, x, logits, channel, None)


# -- attention blocks ----------------------------------------------------------------------------------------


def cbam_cases() -> Iterator[Case]:
    for dtype, net in ((F32, F32), (BF16, F32), (F16, F16), (F64, F64)):
        for keep in (True, False) if dtype in (F32, BF16) else (True,):
            yield from _cbam((2, 32, 32, 32), dtype, net, False, keep)
        if dtype in (F32, BF16):
            yield from _cbam((2, 32, 32, 32), dtype, net, True, True)
    # Few channels, planes of several chunks and of an odd size, and the most channels of the paper.
    for shape in ((2, 16, 92, 92), (2, 64, 23, 23), (2, 128, 12, 12), (2, 256, 6, 6)):
        yield from _cbam(shape, F32, F32, False, True)


def _cbam(
    shape: tuple[int, ...], dtype: torch.dtype, net: torch.dtype, last: bool, keep: bool
) -> Iterator[Case]:
    batch, channels, h, w = shape
    x, acc, hidden = image(shape, dtype, last), acc_dtype(dtype), max(1, channels // 16)
    down, up = torch.empty(hidden, channels, dtype=net), torch.empty(channels, hidden, dtype=net)
    weights = down, up, image((1, 2, 7, 7), net)
    yield lambda: launcher("cbam")(x, *weights, keep)
    if keep:
        kept = (
            torch.empty(2, batch, channels, dtype=acc), torch.empty(batch, channels, dtype=torch.int32),
            torch.empty(2, batch, hidden, dtype=acc), torch.empty(batch, channels, dtype=acc),
            image((batch, 2, h, w), acc), torch.empty(batch, h, w, dtype=torch.int32),
            image((batch, 1, h, w), acc),
        )  # fmt: skip
        yield lambda: launcher("cbam_backward")(x, x, *weights, *kept)
