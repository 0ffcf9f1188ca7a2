"""Likelihood attribution: the terms of log p(x|y), each put back on the pixels that it came from.

Every latent element and every log-scale lies at a channel and a pixel of its scale, and squeeze and split
only move elements: their inverses carry the terms to a map of the image's shape. What ActNorm and the 1x1
convolutions add depends on no pixel and no label; it is returned beside the map. Source: MAGIC-Flow, with the
mixing layers in the forward pass and every block once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastflow import kernels
from fastflow.models.config import FlowConfig


def place_on_image(
    config: FlowConfig,
    terms: Sequence[Tensor],
    final: Tensor,
    blocks: Sequence[Tensor],
    channel_dim: int = 1,
    unsqueeze: Callable[[Tensor], Tensor] = kernels.unsqueeze2x2,
) -> Tensor:
    """Terms of steps and of latent blocks, summed at the pixels of the image that they belong to.

    Args:
        config: the layout.
        terms: of each step, at the elements that it transforms.
        final: of the final latent block.
        blocks: of the split-off blocks, in the order of the steps.
        channel_dim: where channels are.
        unsqueeze: the inverse of the squeeze in that layout.

    Returns:
        (B, C, H, W), or the same in the other layout.
    """
    total, rest = final, list(blocks)
    for i in reversed(range(config.num_steps)):
        if i in config.split_after:
            total = torch.cat((total, rest.pop()), dim=channel_dim)
        total = total + terms[i]
        if i in config.squeeze_before:
            total = unsqueeze(total)
    return total
