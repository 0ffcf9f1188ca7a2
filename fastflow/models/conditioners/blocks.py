"""Parts that both conditioners are made of.

Everything a conditioner knows of the label is a table with one row per label: FiLM's scale and shift, folded with the norm's own
affine part, and (in the classification conditioner) the label's share of the heads. Tables are computed once per pass and
gathered by row, so K labels of one image cost K table rows, not K embeddings per image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from fastflow import kernels

EMBEDDING = 128
GROUPS = 8


class Modulation(NamedTuple):
    """FiLM folded with a norm's affine part: two (R, C) tables."""

    gamma: Tensor
    beta: Tensor


class Tables(NamedTuple):
    """What a conditioner needs to know of R labels: its modulations in order of use, and its heads' (scale, shift) tables."""

    films: tuple[Modulation, ...]
    heads: tuple[Tensor, ...] = ()


def first_rows(tables: Tables, count: int) -> Tables:
    """The first `count` rows of tables."""
    films = tuple(Modulation(film.gamma[:count], film.beta[:count]) for film in tables.films)
    return Tables(films, tuple(head[:count] for head in tables.heads))


class Drop(NamedTuple):
    """A dropout: its probability, and the key (B,) that says which elements of each sample it drops."""

    dropout: float
    keys: Tensor


class Passive(NamedTuple):
    """What a half of a step keeps: the mask (C, H, W), True = passive, and the order of its pixels for kernels that read it."""

    mask: Tensor
    order: kernels.PixelOrder | None = None


class Then(NamedTuple):
    """What follows a coupling, and is done while its result is at hand.

    The next conditioner sees the result where `mask` is True; a step of one channel that lies between is the factor and the
    constant of `affine` (2,).
    """

    mask: Tensor
    affine: Tensor | None = None


def conditioner_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a conditioner reads a stream x: that of autocast where it is on."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def normed_conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """A weight-normalised convolution, padded to keep the size at stride 1. Source: Salimans & Kingma, 2016."""
    conv: nn.Conv2d = weight_norm(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2))
    return conv


ROW_GROUP = 4
# Up to so many channels, ATen's native code computes the gradient of a convolution's input several times faster than oneDNN.
FEW_CHANNELS = 4
# With one thread ATen computes fewer float32 images than these, of up to so many elements together, with code that rounds
# otherwise than oneDNN, which it takes for more; a single image it computes with other code than several.
FEW_IMAGES, FEW_ELEMENTS = 16, 20480


def on_cpu(x: Tensor) -> bool:
    """Whether x takes the forms that are chosen for CPUs."""
    return x.device.type == "cpu"


def eager_on_cpu(x: Tensor) -> bool:
    """Whether ATen's code for CPUs runs on x at once, and not in a graph that is compiled or exported."""
    return on_cpu(x) and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()


class _FewChannels(torch.autograd.Function):
    """A 2-d convolution of few input channels on a CPU, each gradient by the faster code."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.biased = stride, padding, bias is not None
        return F.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        place = ctx.stride, ctx.padding
        d_x, _, _ = torch.ops.aten._slow_conv2d_backward.output_mask(
            grad, x, weight, weight.shape[2:], *place, [True, False, False]
        )
        bias = [weight.shape[0]] if ctx.biased else None
        _, d_weight, d_bias = torch.ops.aten.convolution_backward(
            grad, x, weight, bias, *place, (1, 1), False, (0, 0), 1, [False, True, ctx.biased]
        )
        return d_x, d_weight, d_bias, None, None


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """``conv(x)``; in eager float32 on a CPU by the code that is fastest there, and alike for one image and for many."""
    if not eager_on_cpu(x) or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return conv(x)
    if len(x) < FEW_IMAGES and x.numel() <= FEW_ELEMENTS and conv.kernel_size[0] <= 3:
        if not torch.is_grad_enabled() and torch.backends.mkldnn.is_available():
            place = conv.padding, conv.stride, conv.dilation
            return torch.ops.aten.mkldnn_convolution(x, conv.weight, conv.bias, *place, conv.groups)
        if len(x) == 1:
            return conv(x.expand(2, -1, -1, -1))[:1]
    if conv.in_channels > FEW_CHANNELS or conv.dilation != (1, 1):
        return conv(x)
    stride, padding = conv.stride, conv.padding
    if conv.out_channels == 1:
        # A weight in channels_last asks for oneDNN's code of that layout, whose backward is four times faster here.
        return F.conv2d(x, conv.weight.contiguous(memory_format=torch.channels_last), conv.bias, stride, padding)
    if kernels.get_backend() == "reference":
        return conv(x)
    if conv.in_channels == 1 and not torch.is_grad_enabled():
        # oneDNN's code for one channel is several times faster with channels last, the copy back included.
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        return F.conv2d(x, weight, conv.bias, stride, padding).contiguous()
    if not (torch.is_grad_enabled() and x.requires_grad):
        return conv(x)
    out: Tensor = _FewChannels.apply(x, conv.weight, conv.bias, stride, padding)
    return out


def spread(v: Tensor, rows: Tensor) -> Tensor:
    """v with one sample for each of `rows`: samples that came once for several labels are repeated for each."""
    return v if v.shape[0] == rows.shape[0] else v.repeat_interleave(rows.shape[0] // v.shape[0], dim=0)


def whole_groups(rows: Tensor) -> Tensor:
    """`rows`; in eager mode on a CPU with copies of the first after them, up to a multiple of `ROW_GROUP`.

    ATen's products and activations on CPUs round the rows of whole groups alike, however many there are, others not.
    """
    if not eager_on_cpu(rows):
        return rows
    extra = -len(rows) % ROW_GROUP
    return torch.cat((rows, rows[:1].expand(extra, *rows.shape[1:]))) if extra and len(rows) else rows


def linear(v: Tensor, layer: nn.Linear) -> Tensor:
    """``layer(v)`` for v (R, inputs), whose rows come out alike on a CPU whatever other rows there are."""
    out: Tensor = layer(whole_groups(v))
    return out if out.shape[0] == v.shape[0] else out[: v.shape[0]]


def num_groups(channels: int) -> int:
    """The largest number of groups, at most 8, that divides `channels`."""
    return max(g for g in range(1, GROUPS + 1) if channels % g == 0)


class FiLM(nn.Module):
    """Two linear maps of the label embedding, a scale and a shift per channel (no "1 +"). Source: Perez et al., 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Linear(EMBEDDING, channels)
        self.beta = nn.Linear(EMBEDDING, channels)

    def fold(self, embedding: Tensor, weight: Tensor, bias: Tensor) -> Modulation:
        """Tables (R, C) of ``film(weight * v + bias)`` for embeddings (R, 128)."""
        gamma = self.gamma(embedding)
        return Modulation(gamma * weight, torch.addcmul(self.beta(embedding), gamma, bias))


class NormFiLM(nn.Module):
    """GroupNorm, FiLM and GELU, with an optional residual added before the GELU and an optional dropout after it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.groups = num_groups(channels)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.film = FiLM(channels)

    def fold(self, embedding: Tensor) -> Modulation:
        """Its tables for embeddings (R, 128)."""
        return self.film.fold(embedding, self.weight, self.bias)

    def forward(
        self, x: Tensor, tables: Modulation, rows: Tensor, residual: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        dropout, keys = drop or (0.0, None)
        return kernels.norm_film_act(x, self.groups, tables.gamma, tables.beta, rows, residual, dropout=dropout, keys=keys)


class BatchNormFiLM(nn.Module):
    """As `NormFiLM` with batch statistics, for published generation weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.film = FiLM(channels)

    def fold(self, embedding: Tensor) -> Modulation:
        """Its tables for embeddings (R, 128)."""
        return self.film.fold(embedding, self.norm.weight, self.norm.bias)

    def forward(
        self, x: Tensor, tables: Modulation, rows: Tensor, residual: Tensor | None = None, drop: Drop | None = None
    ) -> Tensor:
        if drop is not None:
            raise ValueError("BatchNormFiLM has no dropout; norm='batch' belongs to the generation conditioner, which has none")
        norm = self.norm
        if self.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        # The norm's own weight and bias are in the tables.
        x = F.batch_norm(x, norm.running_mean, norm.running_var, None, None, self.training, norm.momentum or 0.1, norm.eps)
        return kernels.film_act(x, tables.gamma, tables.beta, rows, residual)


class ResidualBlock(nn.Module):
    """conv3x3, norm, FiLM, GELU, conv3x3, norm, FiLM, add the input, GELU.

    Args:
        channels: C.
        norm: the class of its norms, `NormFiLM` or `BatchNormFiLM`.
    """

    def __init__(self, channels: int, norm: type[NormFiLM | BatchNormFiLM]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = norm(channels)

    def fold(self, embedding: Tensor) -> tuple[Modulation, Modulation]:
        """The tables of its two norms."""
        return self.norm1.fold(embedding), self.norm2.fold(embedding)

    def forward(self, x: Tensor, tables: tuple[Modulation, ...], rows: Tensor, drop: Drop | None = None) -> Tensor:
        v = self.norm1(convolve(self.conv1, x), tables[0], rows)
        out: Tensor = self.norm2(convolve(self.conv2, v), tables[1], rows, residual=x, drop=drop)
        return out


class CBAM(nn.Module):
    """Convolutional block attention: a gate per channel, then a gate per pixel. Source: Woo et al., 2018."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(1, channels // 16)
        self.down = nn.Linear(channels, hidden, bias=False)
        self.up = nn.Linear(hidden, channels, bias=False)
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled, x = kernels.pool_pixels(x)
        # The shared MLP's last layer is linear, so the sum over both poolings comes before it.
        hidden = F.relu(linear(pooled.flatten(0, 1), self.down)).unflatten(0, pooled.shape[:2])
        channel_logits = linear(hidden.sum(dim=0), self.up)
        pooled, x = kernels.pool_channels(x, channel_logits)
        return kernels.apply_gates(x, channel_logits, convolve(self.spatial, pooled))


def one_hot_linear(layer: nn.Linear, labels: Tensor) -> Tensor:
    """`layer` applied to the one-hot code of `labels` (R,), as a gather of its columns."""
    return layer.weight.t()[labels] + layer.bias
