"""The mixes of flow steps, ActNorm and 1x1 convolution, as maps of the channels: one by one, or at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow import kernels
from fastflow.kernels.lu_mixing import (
    affine_reference,
    inverse_mixing_reference,
    mixing_logdet_reference,
    mixing_reference,
)


class Mixing(NamedTuple):
    """ActNorm and the 1x1 convolution of a step as one affine map of the channels.

    Attributes:
        weight: (C, C).
        bias: (C,), added after the product.
    """

    weight: Tensor
    bias: Tensor


class StepMap(NamedTuple):
    """Whatever of a step's mix no image changes, for one direction.

    Attributes:
        mixing: the affine map of the channels; None as long as ActNorm waits for its first batch, and where
            `affine` is given.
        inverse_matrix: (C, C) of `mixing`, for the inverse direction.
        affine: (2,), where the coupling of the step before applies the map or its inverse.
        logdet: for the forward direction; None as long as ActNorm waits for its first batch.
    """

    mixing: Mixing | None = None
    inverse_matrix: Tensor | None = None
    affine: Tensor | None = None
    logdet: Tensor | None = None


def step_map(
    layer: kernels.MixingLayer, dtype: torch.dtype, affine: bool = False, inverse: bool = False
) -> StepMap:
    """The map of one step, by a launch of its own where kernels run; without its log-determinant.

    Args:
        layer: the parameters.
        dtype: of the results.
        affine: give the map of a single channel as `StepMap.affine`.
        inverse: for the inverse direction.
    """
    if _runs_kernel(layer, dtype):
        (found,), _ = kernels.lu_mixing([layer], [affine], inverse)
        return _as_step_map(found)
    if affine:
        return StepMap(affine=affine_reference(layer, inverse).to(dtype))
    weight, bias = mixing_reference(layer)
    matrix = inverse_mixing_reference(layer).to(dtype) if inverse else None
    return StepMap(Mixing(weight.to(dtype), bias.to(dtype)), matrix)


def step_maps(
    layers: Sequence[kernels.MixingLayer], affine: Sequence[bool], dtype: torch.dtype, inverse: bool
) -> list[StepMap]:
    """The maps of all steps, whose ActNorm is set, in one launch where kernels run.

    Args:
        layers: the parameters of each step.
        affine: which steps, all of one channel, give their map as `StepMap.affine`.
        dtype: of the results.
        inverse: for the inverse direction, without log-determinants.
    """
    if not _runs_kernel(layers[0], dtype):
        return [
            step_map(layer, dtype, pair, inverse)._replace(
                logdet=None if inverse else mixing_logdet_reference(layer)
            )
            for layer, pair in zip(layers, affine, strict=True)
        ]
    found, logdets = kernels.lu_mixing(layers, affine, inverse)
    return [
        _as_step_map(one)._replace(logdet=None if inverse else logdet)
        for one, logdet in zip(found, logdets.unbind(), strict=True)
    ]


def step_logdet(layer: kernels.MixingLayer) -> Tensor:
    """The log-determinant of one step's mix, a scalar in float64, by a launch of its own on a GPU."""
    if _runs_kernel(layer, layer.bias.dtype):
        return kernels.lu_mixing([layer])[1].view(())
    return mixing_logdet_reference(layer)


def _runs_kernel(layer: kernels.MixingLayer, dtype: torch.dtype) -> bool:
    return dtype == layer.bias.dtype and kernels.runs_lu_mixing([layer])


def _as_step_map(found: kernels.ChannelMap) -> StepMap:
    if found.weight is None or found.bias is None:
        return StepMap(affine=found.affine)
    return StepMap(Mixing(found.weight, found.bias), found.inverse)
