"""Likelihood attribution: the terms of log p(x|y), each put back on the pixels that it came from.

Every latent element and every log-scale lives at a channel and a pixel of its scale, and squeeze and split only move elements:
undone, they carry the terms to a map of the image's shape. What ActNorm and the 1x1 convolutions add depends on no pixel and no
label; it is returned beside the map. Source: MAGIC-Flow, with the mixing layers in the forward pass and every block once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastflow import kernels
from fastflow.kernels._library import accumulator
from fastflow.kernels.latent_prior import LOG_2PI

if TYPE_CHECKING:
    from fastflow.models.magic_flow import LabelTables, MagicFlow


def attribution(model: MagicFlow, x: Tensor, tables: LabelTables, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The map (B, C, H, W) and the label-free constant (B,) of `MagicFlow.attribution`, for checked arguments."""
    wide = accumulator(x.dtype)
    h, spread = x, torch.zeros_like(x, dtype=wide)
    const = torch.zeros((), dtype=torch.float64, device=x.device)
    split_off: list[Tensor] = []
    for i, step in enumerate(model.steps):
        h = step.mix(h)
        const = const + step.mixing_logdet()
        if step.squeeze:
            spread = kernels.squeeze2x2(spread)
        h, terms = step.coupling.forward_with_map(h, tables.steps[i], tables.rows(i, rows))
        spread = spread + terms
        if step.split:
            h, block = h.chunk(2, dim=1)
            spread, rest = spread.chunk(2, dim=1)
            split_off.append(rest + _log_density(block))
    spread = spread + _log_density(h)
    for step in reversed(model.steps):
        if step.split:
            spread = torch.cat((spread, split_off.pop()), dim=1)
        if step.squeeze:
            spread = kernels.unsqueeze2x2(spread)
    return spread, const.to(wide).expand(x.shape[0])


def _log_density(z: Tensor) -> Tensor:
    z = z.to(accumulator(z.dtype))
    return -0.5 * (z * z + LOG_2PI)
