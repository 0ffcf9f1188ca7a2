"""Folding the modules of a conditioner: weight norm and the statistics of pixels become constants."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow.models.conditioners.generation import ASPP, GlobalContext, GlobalFusion
from fastflow.models.conditioners.leaves import CBAM, BatchNormFiLM, NormFiLM, ResidualBlock, num_groups
from fastflow.models.inference.leaves import (
    Context,
    Conv,
    Fusion,
    Gates,
    Mlp,
    Norm,
    Pyramid,
    Residual,
    spatial_tile,
)


def fold_conv(conv: nn.Conv2d, dtype: torch.dtype, weight: Tensor | None = None) -> Conv:
    """A convolution in `dtype`, or another `weight` with its bias."""
    stride = conv.stride[0] if weight is None else 1
    weight = conv.weight if weight is None else weight
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return Conv(weight.to(dtype).contiguous(memory_format=torch.channels_last), bias, stride)


@functools.singledispatch
def fold_leaf(module: nn.Module, pixels: int, dtype: torch.dtype) -> Any:
    """A module of a conditioner as constants.

    Args:
        module: a leaf of a network.
        pixels: of the image that it sees.
        dtype: of convolutions.
    """
    raise TypeError(f"a {type(module).__name__} cannot be folded")


@fold_leaf.register
def _(module: nn.Conv2d, pixels: int, dtype: torch.dtype) -> Conv:
    return fold_conv(module, dtype)


@fold_leaf.register
def _(module: NormFiLM, pixels: int, dtype: torch.dtype) -> Norm:
    weight = module.weight
    channels = len(weight)
    size = channels // num_groups(channels)
    block = torch.full((size, size), 1.0 / (size * pixels), dtype=weight.dtype, device=weight.device)
    identity = torch.eye(channels, dtype=weight.dtype, device=weight.device)
    return Norm(torch.block_diag(*[block] * num_groups(channels)), identity)


@fold_leaf.register
def _(module: BatchNormFiLM, pixels: int, dtype: torch.dtype) -> Norm:
    weight = module.norm.weight
    return Norm(None, torch.eye(len(weight), dtype=weight.dtype, device=weight.device))


@fold_leaf.register
def _(module: CBAM, pixels: int, dtype: torch.dtype) -> Gates:
    down, up = module.down.weight, module.up.weight
    if len(down) == 1:
        # The compiler treats products over a single number apart, by the number of samples.
        down, up = F.pad(down, (0, 0, 0, 1)), F.pad(up, (0, 1))
    identity = torch.eye(up.shape[0], dtype=up.dtype, device=up.device)
    return Gates(down, up, spatial_tile(module.spatial.weight), identity)


@fold_leaf.register
def _(module: ResidualBlock, pixels: int, dtype: torch.dtype) -> Residual:
    parts = (module.conv1, module.norm1, module.conv2, module.norm2)
    return Residual(*(fold_leaf(part, pixels, dtype) for part in parts))


def _mlp(module: GlobalFusion | GlobalContext | ASPP) -> Mlp:
    return Mlp(module.down.weight, module.down.bias, module.up.weight, module.up.bias)


@fold_leaf.register
def _(module: GlobalFusion, pixels: int, dtype: torch.dtype) -> Fusion:
    return Fusion(_mlp(module))


@fold_leaf.register
def _(module: GlobalContext, pixels: int, dtype: torch.dtype) -> Context:
    return Context(_mlp(module))


@fold_leaf.register
def _(module: ASPP, pixels: int, dtype: torch.dtype) -> Pyramid:
    assert module.output.bias is not None
    branches = tuple(fold_conv(branch, dtype) for branch in module.branches)
    return Pyramid(branches, _mlp(module), module.output.weight.flatten(1), module.output.bias)
