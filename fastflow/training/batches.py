"""The batches of an epoch: order, augmentation and dequantisation of slices, from one seeded generator."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastflow.data.slices import SliceSet
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.augment import AUGMENTS
from fastflow.training.config import TrainConfig


def iterate_batches(
    data: SliceSet,
    steps: int,
    config: TrainConfig,
    dequantize: bool,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of one epoch.

    Args:
        data: labelled 8-bit slices.
        steps: how many batches.
        config: size, sampler and augmentation.
        dequantize: whether noise of one grey level is added.
        generator: of all draws, except for the noise on other devices than the CPU.
        device: where the batches go.

    Yields:
        Images (B, C, H, W) in [-1, 1] and labels (B,).
    """
    labels = torch.from_numpy(data.labels)
    augment = AUGMENTS[config.augment]
    order = _order(labels, config, generator)
    for step in range(steps):
        index = order[step * config.batch_size : (step + 1) * config.batch_size]
        x = from_uint8(torch.from_numpy(data.images[index.numpy()]).to(device))
        if augment is not None:
            x = augment(x, generator)
        if dequantize:
            x = objectives.dequantize(x, generator if x.device.type == "cpu" else None)
        yield x, labels[index].to(device)


def _order(labels: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    if config.sampler == "balanced":
        weights = 1.0 / torch.bincount(labels).clamp_min(1)[labels].double()
        count = max(len(labels), config.batch_size)
        return torch.multinomial(weights, count, replacement=True, generator=generator)
    return torch.randperm(len(labels), generator=generator)
