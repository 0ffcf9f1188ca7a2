"""The batches of an epoch: which slices, in which order, from one seeded generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow.data.slices import SliceSet
from fastflow.training.config import TrainConfig


def iterate_batches(
    data: SliceSet, steps: int, config: TrainConfig, generator: torch.Generator, first: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch, on the host.

    Args:
        data: labelled 8-bit slices.
        steps: how many batches.
        config: size and sampler.
        generator: of the order, which is drawn before the first batch.
        first: so many batches at the beginning are left out; the order is that of all.

    Yields:
        Images (B, C, H, W) uint8 and labels (B,) int64.
    """
    labels = torch.from_numpy(data.labels)
    order = _order(labels, config, generator)
    for step in range(first, steps):
        index = order[step * config.batch_size : (step + 1) * config.batch_size]
        yield torch.from_numpy(data.images[index.numpy()]), labels[index]


def _order(labels: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    if config.sampler == "balanced":
        weights = 1.0 / torch.bincount(labels).clamp_min(1)[labels].double()
        count = max(len(labels), config.batch_size)
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    return torch.randperm(len(labels), generator=generator)
