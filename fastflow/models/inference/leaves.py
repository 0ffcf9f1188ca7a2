"""Constants of a folded model: leaves that the networks of `fastflow.models.conditioners.network` run over.

They are plain ATen over NamedTuples of tensors, the same code for every step, so that one compiled graph
serves all steps of one shape. Convolutions of few channels are fastest on CPUs with channels last, and norms
sum whole vectors there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.cpu.compiled import conv2d, gelu
from fastflow.models.conditioners.generation import DILATIONS
from fastflow.models.conditioners.leaves import num_groups
from fastflow.models.conditioners.network import residual_block

GATE_TILE = 4
EPS = 1e-5


class FoldedFilm(NamedTuple):
    """Label information for one norm of a pass over samples.

    Attributes:
        scale_shift: (R, 2C), a scale and a shift for each channel, the norm's affine part folded in.
        image: (R,) names the image that each sample starts from, where these still come once for several
            labels.
    """

    scale_shift: Tensor
    image: Tensor | None = None


class Conv(NamedTuple):
    """A convolution's weight (O, I, k, k), its channels last, and bias (O,).

    It computes in the dtype of the weight; the result has that of its input: rounding what is only kept would
    cost as much as all of the rest.
    """

    weight: Tensor
    bias: Tensor | None
    stride: int = 1

    def __call__(self, v: Tensor) -> Tensor:
        """The convolution, padded so that a stride of 1 keeps the size of the image."""
        return conv2d(v.to(self.weight.dtype), self.weight, self.bias, self.stride).to(v.dtype)


class Norm(NamedTuple):
    """A norm, FiLM and GELU.

    Attributes:
        average: (C, C) takes a sample's sums over pixels to its groups' means, for every channel. It is None
            for a BatchNorm, whose statistics are folded into its film.
        identity: (C, C) is there for the compiler: a product with it changes no bit, but makes the compiler
            store the (R, C) numbers before it instead of computing them for every pixel.
    """

    average: Tensor | None
    identity: Tensor

    def __call__(self, v: Tensor, film: FoldedFilm, residual: Tensor | None = None) -> Tensor:
        """GELU(FiLM(norm(v)) [+ residual]) of v (R, C, H, W)."""
        image = film.image
        scale, shift = film.scale_shift.chunk(2, dim=1)
        if self.average is None:
            v = v if image is None else v.index_select(0, image)
        elif torch.compiler.is_exporting():
            v = _grouped_instance_norm(v)
            v = v if image is None else v.index_select(0, image)
        else:
            mean = v.sum(dim=(2, 3)) @ self.average
            centred = v - _pixels(mean)
            inverse = torch.rsqrt((centred * centred).sum(dim=(2, 3)) @ self.average + EPS)
            if image is not None:
                mean, inverse, v = (part.index_select(0, image) for part in (mean, inverse, v))
            scale = (inverse * scale) @ self.identity
            shift = torch.addmm(shift, -mean * scale, self.identity)
        v = v * _pixels(scale) + _pixels(shift)
        return gelu(v if residual is None else v + residual)


def _grouped_instance_norm(v: Tensor) -> Tensor:
    """The GroupNorm of v (R, C, H, W) as an InstanceNorm of groups: runtimes take a GroupNorm apart."""
    _, channels, height, width = v.shape
    groups = num_groups(channels)
    v = v.reshape(-1, groups, channels // groups * height * width)
    # The functional form refuses groups of one element.
    v = torch.instance_norm(v, None, None, None, None, True, 0.0, EPS, False)
    return v.reshape(-1, channels, height, width)


def _pixels(v: Tensor) -> Tensor:
    """(R, C) -> (R, C, 1, 1)."""
    return v.reshape(-1, v.shape[1], 1, 1)


class Gates(NamedTuple):
    """CBAM: the shared MLP's maps (h, C) and (C, h), and the convolution of `spatial_tile`."""

    down: Tensor
    up: Tensor
    spatial: Tensor
    identity: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """v (R, C, H, W), gated."""
        mean, peak = v.mean(dim=(2, 3)), v.amax(dim=(2, 3))
        # The shared MLP's last layer is linear, so the sum over both poolings comes before it.
        hidden = F.relu(mean @ self.down.t()) + F.relu(peak @ self.down.t())
        v = v * _pixels(torch.sigmoid(hidden @ self.up.t()) @ self.identity)
        pooled = torch.cat((v.mean(dim=1, keepdim=True), v.amax(dim=1, keepdim=True)), dim=1)
        return v * torch.sigmoid(spatial_logits(pooled, self.spatial))


def spatial_tile(weight: Tensor) -> Tensor:
    """A convolution (1, I, 7, 7) as one over tiles of 4x4 pixels, (16, 16 I, 3, 3).

    One output channel leaves most of a vector idle, sixteen fill it.
    """
    tile, inputs, size = GATE_TILE, weight.shape[1], weight.shape[2]
    out = weight.new_zeros(tile, tile, inputs, tile, tile, 3, 3)
    # (output pixel, input pixel, input tile, tap of the kernel) along one axis.
    candidates = [
        (p, q, b, tile * (b - 1) + q - p + size // 2)
        for p in range(tile)
        for q in range(tile)
        for b in range(3)
    ]
    taps = [tap for tap in candidates if 0 <= tap[3] < size]
    for py, qy, by, ty in taps:
        for px, qx, bx, tx in taps:
            out[py, px, :, qy, qx, by, bx] = weight[0, :, ty, tx]
    tiled = out.view(tile * tile, inputs * tile * tile, 3, 3)
    return tiled.contiguous(memory_format=torch.channels_last)


def spatial_logits(pooled: Tensor, weight: Tensor) -> Tensor:
    """The 7x7 convolution of `spatial_tile`'s weight: (R, I, H, W) -> (R, 1, H, W)."""
    _, inputs, height, width = pooled.shape
    padded = F.pad(pooled, (0, -width % GATE_TILE, 0, -height % GATE_TILE))
    rows, columns = padded.shape[2] // GATE_TILE, padded.shape[3] // GATE_TILE
    tiles = padded.view(-1, inputs, rows, GATE_TILE, columns, GATE_TILE).permute(0, 1, 3, 5, 2, 4)
    tiles = tiles.reshape(-1, inputs * GATE_TILE**2, rows, columns)
    out = F.pixel_shuffle(conv2d(tiles.contiguous(memory_format=torch.channels_last), weight), GATE_TILE)
    return out[:, :, :height, :width]


class Residual(NamedTuple):
    """A residual block."""

    conv1: Conv
    norm1: Norm
    conv2: Conv
    norm2: Norm

    def __call__(self, v: Tensor, films: Sequence[FoldedFilm]) -> Tensor:
        """The block on v (R, C, H, W)."""
        return residual_block(self, v, films)


class DenseHeads(NamedTuple):
    """Dense heads of a classification conditioner.

    Attributes:
        weight: (F, 128) and `bias` (128,), for the features of both.
        bias: see `weight`.
        scale: (64, A) of the log-scale of the elements that move.
        shift: (64, A) of their shift.
        table: (K, 2A), the label half of log-scales, then of shifts.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    table: Tensor

    def __call__(self, v: Tensor, label_index: Tensor) -> tuple[Tensor, Tensor]:
        """(raw log-scale, shift), each (R, A), of the encoder's output v (R, C, H, W)."""
        features = gelu(F.linear(v.permute(0, 2, 3, 1).flatten(1), self.weight, self.bias))
        first, second = features.chunk(2, dim=1)
        scale, shift = self.table.index_select(0, label_index).chunk(2, dim=1)
        return first @ self.scale + scale, second @ self.shift + shift


class ClassificationNet(NamedTuple):
    """The leaves of a classification conditioner, by the names of its modules."""

    conv1: Conv
    norm1: Norm
    conv2: Conv
    norm2: Norm
    cbam2: Gates
    residual2: Residual
    conv3: Conv
    norm3: Norm
    cbam3: Gates
    residual3: Residual
    heads: DenseHeads


class Mlp(NamedTuple):
    """Two linear maps, (h, C) and (C, h), with biases or without."""

    down: Tensor
    down_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None


class Fusion(NamedTuple):
    """``v + mlp(mean over pixels)``."""

    mlp: Mlp

    def __call__(self, v: Tensor) -> Tensor:
        """v (R, C, H, W), with its context added."""
        hidden = F.gelu(F.linear(v.mean(dim=(2, 3)), self.mlp.down, self.mlp.down_bias))
        return v + _pixels(F.linear(hidden, self.mlp.up, self.mlp.up_bias))


class Context(NamedTuple):
    """``v * (1 + sigmoid(mlp(mean over pixels)))``."""

    mlp: Mlp

    def __call__(self, v: Tensor) -> Tensor:
        """v (R, C, H, W), scaled by its context."""
        hidden = F.relu(F.linear(v.mean(dim=(2, 3)), self.mlp.down, self.mlp.down_bias))
        return v * _pixels(1.0 + torch.sigmoid(F.linear(hidden, self.mlp.up, self.mlp.up_bias)))


class Pyramid(NamedTuple):
    """ASPP: the four convolutions, the squeeze-excite MLP, and the last map (C, 4C) with its bias."""

    branches: tuple[Conv, ...]
    gate: Mlp
    output: Tensor
    bias: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """The pyramid of v (R, C, H, W): the last map, gated per sample, as one product for each branch."""
        narrow, dtype = v.to(self.branches[0].weight.dtype), v.dtype
        branches = [
            conv2d(narrow, conv.weight, conv.bias, dilation=dilation)
            for conv, dilation in zip(self.branches, (1, *DILATIONS), strict=True)
        ]
        means = torch.cat([branch.to(dtype).mean(dim=(2, 3)) for branch in branches], dim=1)
        hidden = F.relu(F.linear(means, self.gate.down, self.gate.down_bias))
        gates = torch.sigmoid(F.linear(hidden, self.gate.up, self.gate.up_bias))
        maps = (self.output * gates[:, None, :]).chunk(len(branches), dim=2)
        out = self.bias
        for branch, one_map in zip(branches, maps, strict=True):
            pixels = branch.permute(0, 2, 3, 1).flatten(1, 2)
            product = one_map.to(branch.dtype).mT
            if branch.dtype == dtype:
                out = torch.baddbmm(out, pixels, product)
            else:
                out = out + torch.bmm(pixels, product).to(dtype)
        return out.mT.unflatten(2, v.shape[2:])


class GenerationNet(NamedTuple):
    """The leaves of a generation conditioner, by the names of its modules."""

    conv1: Conv
    norm1: Norm
    cbam1: Gates
    global1: Fusion
    aspp1: Pyramid
    conv2: Conv
    norm2: Norm
    cbam2: Gates
    residual2: Residual
    global2: Context
    aspp2: Pyramid
    conv3: Conv
    norm3: Norm
    cbam3: Gates
    residual3: Residual
    global3: Context
    aspp3: Pyramid
    scale: Conv
    shift: Conv
