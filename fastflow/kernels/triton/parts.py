"""Parts that kernels share: where a program's tile lies, functions of numbers, second stages of sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow.kernels.triton.launch import kernel, launch, power_of_two

if TYPE_CHECKING:
    import triton.language as tl

MAX_SUM_BLOCK = 1024


@kernel
def locate(pid, n_chunks, INT64_OFFSETS: tl.constexpr):
    """(sample, chunk) of a program.

    The sample is int64, since its product with a stride passes 2^31; the chunk is int64 only where
    INT64_OFFSETS.
    """
    pid = tl.cast(pid, tl.int64)
    chunk = pid % n_chunks
    return pid // n_chunks, chunk if INT64_OFFSETS else tl.cast(chunk, tl.int32)


@kernel
def tile_of(pid, n_chunks, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, INT64_OFFSETS: tl.constexpr):
    """(sample, first channel, chunk of pixels) of a program that takes BLOCK_C channels."""
    b, rest = locate(pid, n_chunks * ((CHANNELS + BLOCK_C - 1) // BLOCK_C), INT64_OFFSETS)
    return b, rest // n_chunks * BLOCK_C, rest % n_chunks


@kernel
def place_of(c, p, pixels, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Where channel c of pixel p lies within its sample."""
    if CHANNELS_LAST:
        return p * CHANNELS + c
    else:
        return c * pixels + p


@kernel
def elements(n_v, V: tl.constexpr, INT64_OFFSETS: tl.constexpr):
    """n_v * V, in the type that offsets within a sample need."""
    return tl.cast(n_v, tl.int64) * V if INT64_OFFSETS else n_v * V


@kernel
def image_tile(
    n_chunks, pixels_v, V: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The tile of BLOCK_C channels and BLOCK pixels that a program takes.

    Returns (sample, chunk of pixels, pixels of a plane, channels, pixels, which channels exist, which
    elements exist, where the elements lie within their sample).
    """
    b, first, chunk = tile_of(tl.program_id(0), n_chunks, CHANNELS, BLOCK_C, INT64_OFFSETS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    c = first + tl.arange(0, BLOCK_C)
    p = chunk * BLOCK + tl.arange(0, BLOCK)
    real = c < CHANNELS
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    return b, chunk, pixels, c, p, real, inside, place


@kernel
def tanh(x):
    """Hyperbolic tangent from exp, which every target has.

    Near 0 the quotient would lose digits to cancellation; the Taylor series is exact to 1e-8 relative there.
    """
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    if x.dtype == tl.float64:
        return far
    u = x * x
    near = x * (1.0 + u * (-1.0 / 3.0 + u * (2.0 / 15.0 + u * (-17.0 / 315.0 + u * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, near, far)


@kernel
def _sum_chunks_kernel(partial_ptr, out_ptr, n_chunks, BLOCK: tl.constexpr):
    sample = tl.cast(tl.program_id(0), tl.int64)
    chunk = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    for start in range(0, n_chunks, BLOCK):
        acc += tl.load(
            partial_ptr + sample * n_chunks + start + chunk, mask=start + chunk < n_chunks, other=0.0
        )
    tl.store(out_ptr + sample, tl.sum(acc, axis=0))


def sum_chunks(partial: Tensor) -> Tensor:
    """Second stage of a per-sample sum, (B, n) -> (B,).

    ATen chooses the order of such a sum by the number of samples too; here a sample's bits depend on that
    sample alone.
    """
    batch, n = partial.shape
    if n == 1:
        return partial[:, 0]
    out = torch.empty(batch, dtype=partial.dtype, device=partial.device)
    launch(_sum_chunks_kernel, batch, partial, 1, partial, out, n, BLOCK=min(MAX_SUM_BLOCK, power_of_two(n)))
    return out
