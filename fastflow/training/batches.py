"""The batches of an epoch: which slices, in which order, from one seeded generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastflow.data.slices import SliceSet
from fastflow.training.config import TrainConfig
from fastflow.training.rows import BatchRows


def iterate_batches(
    data: SliceSet,
    steps: int,
    config: TrainConfig,
    generator: torch.Generator,
    first: int = 0,
    rows: Callable[[int], BatchRows] = BatchRows.all,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch, on the host.

    Args:
        data: labelled 8-bit slices.
        steps: how many batches an epoch has.
        config: size and sampler.
        generator: of the order, which is drawn before the first batch and is the same whatever `first` and
            `rows` are.
        first: index of the batch to begin with; those before it are passed over.
        rows: which rows of a batch of a size this process computes, see `fastflow.training.devices.Ranks`.

    Yields:
        Images (n, C, H, W) uint8 of the process's rows, and labels (B,) int64 of the whole batch.
    """
    labels = torch.from_numpy(data.labels)
    order = _order(labels, config, generator)
    for step in range(first, steps):
        index = order[step * config.batch_size : (step + 1) * config.batch_size]
        own = index[rows(len(index)).index]
        yield torch.from_numpy(data.images[own.numpy()]), labels[index]


def _order(labels: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    if config.sampler == "balanced":
        weights = 1.0 / torch.bincount(labels).clamp_min(1)[labels].double()
        count = max(len(labels), config.batch_size)
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    return torch.randperm(len(labels), generator=generator)
