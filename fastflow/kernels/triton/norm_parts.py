"""Parts of the kernels of `norm_film_act`: tiles, dropout, the activation, modulation by label, and sizes of
tiles.

Tiles are (channels, pixels). A program takes PACK whole groups where these are small, each padded to BLOCK_C
channels and BLOCK pixels; of a large group it takes BLOCK_C channels and BLOCK pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.layouts import laid_out
from fastflow.kernels.triton.launch import kernel, power_of_two
from fastflow.kernels.triton.parts import elements, locate, place_of

if TYPE_CHECKING:
    import triton.language as tl

# -- parts of kernels ---------------------------------------------------------------------------------------


@kernel
def packed_tile(
    pixels_v, V: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr, PACK: tl.constexpr, CHANNELS_LAST: tl.constexpr, INT64_OFFSETS: tl.constexpr,
):  # fmt: skip
    """The tile of PACK whole groups that a program takes.

    Returns (sample, group, channel within the group, channel, pixels, pixels of a plane, which channels
    exist, which elements exist, where the elements lie within their sample).
    """
    b, first = locate(tl.program_id(0), (GROUPS + PACK - 1) // PACK, INT64_OFFSETS)
    lane = tl.arange(0, PACK * BLOCK_C)
    g = first * PACK + lane // BLOCK_C
    i = lane % BLOCK_C
    real = (i < CHANNELS // GROUPS) & (g < GROUPS)
    pixels = elements(pixels_v, V, INT64_OFFSETS)
    c = g * (CHANNELS // GROUPS) + i
    p = tl.arange(0, BLOCK)
    inside = real[:, None] & (p < pixels)[None, :]
    place = place_of(c[:, None], p[None, :], pixels, CHANNELS, CHANNELS_LAST)
    return b, g, i, c, p, pixels, real, inside, place


@kernel
def group_total(value, BLOCK_C: tl.constexpr, PACK: tl.constexpr):
    """The sum over the channels of each group of a packed tile, at every channel of the group."""
    total = tl.sum(tl.reshape(value, (PACK, BLOCK_C)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (PACK, BLOCK_C)), (PACK * BLOCK_C,))


@kernel
def hash_keeps(seed_ptr, e, THRESHOLD: tl.constexpr):
    """Whether dropout keeps element e; `fastflow.kernels.dropout` defines the hash and its factors."""
    seed = tl.load(seed_ptr).to(tl.uint32, bitcast=True)
    h = (tl.cast(e, tl.uint32) * 0x9E3779B9) ^ seed
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h >= THRESHOLD


@kernel
def drop(y, seed_ptr, c, p, pixels, THRESHOLD: tl.constexpr):
    """y with dropped elements 0 and the others scaled."""
    keep = hash_keeps(seed_ptr, c * pixels + p, THRESHOLD)
    return tl.where(keep, y * (4294967296.0 / (4294967296 - THRESHOLD)), 0.0)


@kernel
def gelu(z):
    """The exact GELU, z times the standard normal distribution function."""
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@kernel
def gelu_slope(z):
    """The derivative of `gelu`."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327


@kernel
def table_row(
    table_ptr, label_index_ptr, sample_stride, b, c, real,
    CHANNELS: tl.constexpr, ACC: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """The values of sample b for channels c, of its label's row in a table or (SAMPLED) of its own."""
    if SAMPLED:
        place = b * sample_stride + 2 * c
    else:
        place = tl.load(label_index_ptr + b) * CHANNELS + c
    return tl.load(table_ptr + place, mask=real, other=0.0).to(ACC)


@kernel
def modulate(
    normed, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, b, c, real, place, inside,
    CHANNELS: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr, SAMPLED: tl.constexpr,
):  # fmt: skip
    """(z, gamma) of normalised values."""
    gamma = table_row(gamma_ptr, label_index_ptr, sample_stride, b, c, real, CHANNELS, ACC, SAMPLED)
    beta = table_row(beta_ptr, label_index_ptr, sample_stride, b, c, real, CHANNELS, ACC, SAMPLED)
    z = normed * gamma[:, None] + beta[:, None]
    if RESIDUAL:
        z += tl.load(residual_ptr + place, mask=inside, other=0.0).to(ACC)
    return z, gamma


@kernel
def normalise(
    x_ptr, stats_ptr, b, c, real, place, inside,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(normalised values, 1/deviation of each channel's group) of a tile, from saved statistics."""
    stats_ptr += (b * GROUPS + c // (CHANNELS // GROUPS)) * 2
    mean = tl.load(stats_ptr, mask=real, other=0.0)
    rstd = tl.load(stats_ptr + 1, mask=real, other=0.0)
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(ACC)
    return tl.where(inside, (x - mean[:, None]) * rstd[:, None], 0.0), rstd


@kernel
def z_gradient(
    grad_ptr, normed, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, seeds_ptr,
    b, c, p, real, place, inside, pixels,
    CHANNELS: tl.constexpr, THRESHOLD: tl.constexpr, ACC: tl.constexpr, RESIDUAL: tl.constexpr,
    SAMPLED: tl.constexpr,
):  # fmt: skip
    """(the gradient of z, gamma) of a tile."""
    z, gamma = modulate(
        normed, gamma_ptr, beta_ptr, label_index_ptr, sample_stride, residual_ptr, b, c, real, place, inside,
        CHANNELS, ACC, RESIDUAL, SAMPLED,
    )  # fmt: skip
    grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(ACC)
    if THRESHOLD > 0:
        grad = drop(grad, seeds_ptr + b, c[:, None], p[None, :], pixels, THRESHOLD)
    return grad * gelu_slope(z), gamma


# -- sizes of tiles ----------------------------------------------------------------------------------------

MAX_GROUP_ELEMENTS = 8192
# In a forward pass without dropout few enough values are alive in a program for a group twice as large.
MAX_PLAIN_GROUP_ELEMENTS = 16_384
SPLIT_ELEMENTS = 4096
# Groups are packed up to this size, since a program of a few dozen elements costs as much as one of a
# thousand.
PACKED_ELEMENTS = 2048


class Tile(NamedTuple):
    """How much a program takes: channels, pixels, warps, and whole groups where these are packed."""

    channels: int
    pixels: int
    warps: int
    pack: int = 1


def group_tile(channels: int, groups: int, pixels: int, acc: torch.dtype, plain: bool) -> Tile | None:
    """The tile of whole groups, with 16 values a thread up to 8192; None where a group is too large for a
    program.

    `plain` is the forward pass without dropout.
    """
    block_c, block = power_of_two(channels // groups), power_of_two(pixels)
    limit = MAX_PLAIN_GROUP_ELEMENTS if plain else MAX_GROUP_ELEMENTS
    limit = limit // 2 if acc == torch.float64 else limit
    if block_c * block > limit:
        return None
    pack = min(power_of_two(groups), max(1, PACKED_ELEMENTS // (block_c * block)))
    return Tile(block_c, block, min(16, max(1, pack * block_c * block // 512)), pack)


def split_tile(channels: int, pixels: int, channels_last: bool, acc: torch.dtype) -> Tile:
    """The tile of a chunk of a large group: long runs of what lies together in memory."""
    size = SPLIT_ELEMENTS // 2 if acc == torch.float64 else SPLIT_ELEMENTS
    if channels_last:
        block_c = min(64, power_of_two(channels))
        return Tile(block_c, min(power_of_two(pixels), size // block_c), 8)
    block = min(size, power_of_two(pixels))
    return Tile(min(power_of_two(channels), size // block), block, 8)


class Modulation(NamedTuple):
    """Where kernels find the scale and shift of each sample and channel.

    Attributes:
        gamma: a table (K, C), or the first of a pair for each channel.
        beta: as `gamma`, the second of the pair.
        label_index: (B,), the rows of tables; None where each sample has its own pairs.
        sample_stride: from one sample's pairs to the next's; None for tables.
    """

    gamma: Tensor
    beta: Tensor
    label_index: Tensor | None
    sample_stride: int | None


def by_label(gamma: Tensor, beta: Tensor, label_index: Tensor) -> Modulation:
    """Tables (K, C) and the row of each sample (B,)."""
    return Modulation(gamma.contiguous(), beta.contiguous(), label_index.contiguous(), None)


def by_sample(modulation: Tensor) -> Modulation:
    """Pairs (B, C, 2), copied only where those of a sample do not lie together."""
    if modulation.stride()[1:] != (2, 1):
        modulation = modulation.contiguous()
    gamma, beta = modulation.unbind(2)
    return Modulation(gamma, beta, None, modulation.stride(0))


def dense(x: Tensor, channels_last: bool) -> tuple[Tensor, int]:
    """(x in the layout, its batch stride)."""
    x = laid_out(x, channels_last)
    return x, x.stride(0)
