"""The atrous pyramid on CPUs: each sample's last map is put into the kernels of the branches.

A gate needs no more of a branch than its mean, which follows from the sums of x over the windows that the
kernel's taps see. With the gates known, the maps W_i diag(g_i) B_i of a sample are three convolutions of x,
and no branch is kept for the backward pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.cpu.execution import on_cpu
from fastflow.kernels.cpu.linear import linear_each, matmul_each
from fastflow.numerics import full_precision

# ATen computes a single image of up to so many elements with other code than a batch of them, which rounds
# differently in channels_last.
MAX_SMALL_ELEMENTS = 20480
# Folded kernels pay where an image has this many pixels for each channel.
MIN_PIXELS_PER_CHANNEL = 16


class PyramidWeights(NamedTuple):
    """Weights of an atrous pyramid over C channels.

    Attributes:
        point: (C, C, 1, 1) and its bias (C,), the undilated branch.
        dilated: a weight (C, C, 3, 3) and a bias (C,) for each of `dilations`.
        dilations: of the 3x3 branches.
        down: (h, 4C) and its bias, the first map of the gates.
        up: (4C, h) and its bias, the second one.
        output: (C, 4C, 1, 1) and its bias (C,), the last map.
    """

    point: tuple[Tensor, Tensor]
    dilated: tuple[tuple[Tensor, Tensor], ...]
    dilations: tuple[int, ...]
    down: tuple[Tensor, Tensor]
    up: tuple[Tensor, Tensor]
    output: tuple[Tensor, Tensor]


def gated_maps(means: list[Tensor], weights: PyramidWeights) -> tuple[list[Tensor], Tensor]:
    """Each sample's maps (B, C, C), of x and of the dilated branches, and its constant (B, C).

    Args:
        means: (B, C) of each branch over pixels, the undilated one first.
        weights: of the pyramid. The constant lacks the biases of its dilated branches.
    """
    hidden = F.relu(linear_each(torch.cat(means, dim=1), *weights.down))
    gate = torch.sigmoid(linear_each(hidden, *weights.up))
    output, constant = weights.output
    first, *rest = (output.flatten(1) * gate[:, None, :]).chunk(len(means), dim=2)
    point, point_bias = weights.point
    if on_cpu(first):
        # Products with a single column round differently for a single sample.
        offset = (first * point_bias).sum(dim=2)
    else:
        offset = torch.matmul(first, point_bias[:, None]).squeeze(2)
    return [matmul_each(first, point.flatten(1)), *rest], constant + offset


def takes_folded_kernels(x: Tensor) -> bool:
    """Whether the pyramid of `x` (B, C, H, W) is cheaper by `atrous_pyramid_cpu` than by its definition."""
    channels, pixels = x.shape[1], x.shape[2] * x.shape[3]
    small = channels * pixels <= MAX_SMALL_ELEMENTS or pixels < MIN_PIXELS_PER_CHANNEL * channels
    graph = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return on_cpu(x) and not small and not graph and x.shape[0] > 0


def atrous_pyramid_cpu(x: Tensor, weights: PyramidWeights) -> Tensor:
    """The pyramid of x (B, C, H, W), each sample by three convolutions with kernels of its own."""
    # Dilated convolutions of contiguous planes are up to three times slower on CPUs.
    channels_last = x.contiguous(memory_format=torch.channels_last)
    with full_precision(x):
        kernels, bias = _folded_kernels(_branch_means(x.to(weights.output[0].dtype), weights), weights)
    samples = []
    for b, image in enumerate(channels_last.split(1)):
        first, *rest = (
            F.conv2d(image, kernel[b], None if i else bias[b], padding=d, dilation=d)
            for i, (kernel, d) in enumerate(zip(kernels, weights.dilations, strict=True))
        )
        for part in rest:
            first = first.add_(part)
        samples.append(first)
    return samples[0] if len(samples) == 1 else torch.cat(samples)


def _tap_windows(size: int, dilations: tuple[int, ...], like: Tensor) -> Tensor:
    """(9, size) of 0 and 1: the rows of an image that each tap reads, three taps for each dilation.

    Tap i of {-1, 0, 1} reads row r + i*d for every row r of the output; beyond the image lies padding.
    """
    row = torch.arange(size, device=like.device)
    shifts = [i * d for d in dilations for i in (-1, 0, 1)]
    return torch.stack([(row >= shift) & (row < size + shift) for shift in shifts]).to(like.dtype)


def _branch_means(x: Tensor, weights: PyramidWeights) -> list[Tensor]:
    """Mean over pixels of each branch, (B, C)."""
    batch, channels, height, width = x.shape
    rows, columns = (
        _tap_windows(size, weights.dilations, x).expand(batch * channels, -1, -1) for size in (height, width)
    )
    sums = torch.bmm(torch.bmm(rows, x.flatten(0, 1)), columns.mT)
    windows = sums.unflatten(0, (batch, channels)) / (height * width)
    # A middle tap sees the whole image.
    point, point_bias = weights.point
    means = [linear_each(windows[:, :, 1, 1], point.flatten(1), point_bias)]
    for i, (weight, bias) in enumerate(weights.dilated):
        taps = windows[:, :, 3 * i : 3 * i + 3, 3 * i : 3 * i + 3].flatten(1)
        means.append(linear_each(taps, weight.flatten(1), bias))
    return means


def _folded_kernels(means: list[Tensor], weights: PyramidWeights) -> tuple[list[Tensor], Tensor]:
    """Each sample's kernels (B, C, C, 3, 3) of the dilations, and its constant (B, C)."""
    (first, *maps), constant = gated_maps(means, weights)
    folded = []
    for mapped, (weight, bias) in zip(maps, weights.dilated, strict=True):
        folded.append(matmul_each(mapped, weight.flatten(1)).unflatten(2, weight.shape[1:]))
        constant = constant + (mapped * bias).sum(dim=2)
    # A 1x1 convolution is the middle tap of any other.
    folded[0] = folded[0] + F.pad(first[..., None, None], (1, 1, 1, 1))
    return folded, constant
