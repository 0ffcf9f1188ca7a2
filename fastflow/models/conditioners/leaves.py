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
from fastflow.models.conditioners.label_params import Film, Modulation, repeat_labels
from fastflow.models.conditioners.network import norms, residual_block
from fastflow.models.conditioners.uses import Slot

EMBEDDING = 128
MAX_GROUPS = 8


class Conv(nn.Conv2d):
    """A convolution that a CPU computes by its fastest code.

    Attributes:
        given_weight: stands in for the weight of a normed convolution while a pass has computed it ahead.
    """

    given_weight: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.given_weight is None else self.given_weight
        # Annotated as pairs, which is what two-dimensional convolutions hold.
        stride, padding, dilation = (self.stride, self.padding, self.dilation)
        return convolve(x, weight, self.bias, stride, padding, dilation)  # type: ignore[arg-type]


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
        if isinstance(film.modulation, Tensor):
            return kernels.norm_modulate_act(
                x, self.groups, film.modulation, residual, dropout=p, seeds=seeds
            )
        gamma, beta = film.modulation
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
        gamma, beta = film.modulation
        return kernels.film_act(x, gamma, beta, film.label_index, residual)


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
        return kernels.cbam(x, self.down.weight, self.up.weight, self.spatial.weight)


class ConditionerBase(nn.Module):
    """The common part of both conditioners: which of its parameters work on images, and which on labels."""

    conv1: nn.Conv2d
    conv2: nn.Conv2d
    conv3: nn.Conv2d

    def label_modules(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters work on labels."""
        return (self.get_submodule("embedding"), *norms(self))

    def normed_convs(self) -> tuple[Conv, ...]:
        """The convolutions whose weights are normed."""
        found = (self.conv1, self.conv2, self.conv3)
        return tuple(conv for conv in found if isinstance(conv, Conv) and hasattr(conv, "parametrizations"))

    def image_slots(self) -> tuple[Slot, ...]:
        """The places of the parameters that work on images, the weights of normed convolutions apart."""
        slots: tuple[Slot, ...] | None = self.__dict__.get("_image_slots")
        if slots is None:
            norms_of_convs = [conv.get_submodule("parametrizations") for conv in self.normed_convs()]
            skipped = {
                id(part) for module in (*self.label_modules(), *norms_of_convs) for part in module.modules()
            }
            slots = tuple(
                (module, name)
                for module in self.modules()
                if id(module) not in skipped
                for name, _ in module.named_parameters(recurse=False)
            )
            self.__dict__["_image_slots"] = slots
        return slots


def one_hot_linear(layer: nn.Linear, labels: Tensor) -> Tensor:
    """`layer` applied to the one-hot code of `labels` (R,), as a gather of its columns."""
    return layer.weight.t()[labels] + layer.bias
