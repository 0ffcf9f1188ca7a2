"""Modules that both conditioners are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from fastflow import kernels
from fastflow.kernels.cpu.convolution import convolve
from fastflow.kernels.cpu.execution import contiguous_planes
from fastflow.kernels.cpu.linear import grouped_linear
from fastflow.models.conditioners.label_params import Film, Modulation, repeat_labels
from fastflow.models.conditioners.network import residual_block

EMBEDDING = 128
MAX_GROUPS = 8


class Conv(nn.Conv2d):
    """A convolution that a CPU computes by its fastest code."""

    def forward(self, x: Tensor) -> Tensor:
        # Annotated as pairs, which is what two-dimensional convolutions hold.
        stride, padding, dilation = (self.stride, self.padding, self.dilation)
        return convolve(x, self.weight, self.bias, stride, padding, dilation)  # type: ignore[arg-type]


class PlaneConv(Conv):
    """A convolution whose result is read by norms and poolings at full resolution."""

    def forward(self, x: Tensor) -> Tensor:
        return contiguous_planes(super().forward(x))


def normed_conv(
    inputs: int, outputs: int, kernel: int, stride: int = 1, kind: type[Conv] = Conv
) -> nn.Conv2d:
    """A weight-normalised convolution, padded to keep the size at stride 1 (Salimans & Kingma, 2016)."""
    conv: nn.Conv2d = weight_norm(kind(inputs, outputs, kernel, stride, kernel // 2))
    return conv


def num_groups(channels: int) -> int:
    """The largest number of groups, at most `MAX_GROUPS`, that divides `channels`."""
    return max(g for g in range(1, MAX_GROUPS + 1) if channels % g == 0)


class FiLM(nn.Module):
    """Two linear maps of the label embedding, a scale and a shift per channel (no "1 +").

    Source: Perez et al., 2018.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(EMBEDDING, channels)
        self.beta = nn.Linear(EMBEDDING, channels)

    def fold(self, embedding: Tensor, weight: Tensor, bias: Tensor) -> Modulation:
        """Tables (R, C) of ``film(weight * v + bias)`` for embeddings (R, 128)."""
        gamma = self.gamma(embedding)
        return Modulation(gamma * weight, torch.addcmul(self.beta(embedding), gamma, bias))


class NormFiLM(nn.Module):
    """GroupNorm, FiLM and GELU, with an optional residual before the GELU and an optional dropout after it.

    An image that comes once for several labels is repeated for them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = num_groups(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.film = FiLM(channels)

    def fold(self, embedding: Tensor) -> Modulation:
        """Its tables for embeddings (R, 128)."""
        return self.film.fold(embedding, self.weight, self.bias)

    def forward(self, x: Tensor, film: Film, residual: Tensor | None = None) -> Tensor:
        x = repeat_labels(x, film.label_index.shape[0])
        p, seeds = film.dropout or (0.0, None)
        gamma, beta = film.tables
        return kernels.norm_film_act(
            x, self.groups, gamma, beta, film.label_index, residual, dropout=p, seeds=seeds
        )


class BatchNormFiLM(nn.Module):
    """As `NormFiLM` with batch statistics, for published generation weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.film = FiLM(channels)

    def fold(self, embedding: Tensor) -> Modulation:
        """Its tables for embeddings (R, 128)."""
        return self.film.fold(embedding, self.norm.weight, self.norm.bias)

    def forward(self, x: Tensor, film: Film, residual: Tensor | None = None) -> Tensor:
        if film.dropout is not None:
            raise ValueError(
                "BatchNormFiLM has no dropout; norm='batch' belongs to the generation conditioner, which "
                "has none"
            )
        norm = self.norm
        if self.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        # The norm's own weight and bias are in the tables.
        x = F.batch_norm(
            x, norm.running_mean, norm.running_var, None, None, self.training, norm.momentum or 0.1, norm.eps
        )
        return kernels.film_act(x, *film.tables, film.label_index, residual)


class ResidualBlock(nn.Module):
    """conv3x3, norm, FiLM, GELU, conv3x3, norm, FiLM, add the input, GELU.

    Args:
        channels: C.
        norm: the class of its norms, `NormFiLM` or `BatchNormFiLM`.
    """

    def __init__(self, channels: int, norm: type[NormFiLM | BatchNormFiLM]) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.conv2 = Conv(channels, channels, 3, padding=1)
        self.norm2 = norm(channels)

    def forward(self, x: Tensor, films: Sequence[Film]) -> Tensor:
        return residual_block(self, x, films)


class CBAM(nn.Module):
    """Convolutional block attention: a gate per channel, then a gate per pixel. Source: Woo et al., 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.down = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(hidden, channels, bias=False)
        self.spatial = Conv(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled, x = kernels.pool_pixels(x)
        # The shared MLP's last layer is linear, so the sum over both poolings comes before it.
        hidden = F.relu(grouped_linear(pooled.flatten(0, 1), self.down.weight)).unflatten(0, pooled.shape[:2])
        channel_logits = grouped_linear(hidden.sum(dim=0), self.up.weight)
        pooled, x = kernels.pool_channels(x, channel_logits)
        return kernels.apply_gates(x, channel_logits, self.spatial(pooled))


def one_hot_linear(layer: nn.Linear, labels: Tensor) -> Tensor:
    """`layer` applied to the one-hot code of `labels` (R,), as a gather of its columns."""
    return layer.weight.t()[labels] + layer.bias
