"""Figures that training reports: means over samples, bits/dim and accuracy on held-out slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from fastflow.data.slices import SliceSet
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.devices import Ranks
from fastflow.training.rows import BatchRows

# So many slices are scored at once; each takes the memory of K, one for each label.
ACCURACY_BATCH_SIZE = 32


class SampleMean:
    """The mean of one number per sample, over all samples of all ranks, summed in float64.

    Args:
        fabric: whose ranks each see a part of the samples.
    """

    def __init__(self, fabric: Fabric) -> None:
        self._fabric = fabric
        self._total, self._count = 0.0, 0

    def update(self, values: Tensor) -> None:
        """Take in numbers of any shape."""
        self.add(float(values.detach().cpu().double().sum()), values.numel())

    def add(self, total: float, count: int) -> None:
        """Take in numbers of which the sum and the count are known."""
        self._total += total
        self._count += count

    def compute(self) -> float:
        """The mean so far; NaN where no rank has seen a sample. All ranks must call it together."""
        total, count = self._total, float(self._count)
        if self._fabric.world_size > 1:
            # Sums over ranks stay right where ranks have seen unequal numbers of samples.
            local = torch.tensor([total, count], dtype=torch.float64, device=self._fabric.device)
            reduced = self._fabric.all_reduce(local, reduce_op="sum")
            total, count = reduced.tolist()  # type: ignore[union-attr]
        return total / count if count else float("nan")


def middle_slices(data: SliceSet) -> tuple[NDArray[Any], NDArray[Any]]:
    """The middle slice of each volume: (images (V, C, H, W), labels (V,)), enough to watch a run by."""
    order = np.argsort(data.volumes, kind="stable")
    _, first, count = np.unique(data.volumes[order], return_index=True, return_counts=True)
    chosen = order[first + count // 2]
    return data.images[chosen], data.labels[chosen]


@torch.no_grad()
def evaluate_bits_per_dim(
    model: MagicFlow,
    images: NDArray[Any],
    labels: NDArray[Any],
    batch_size: int = 64,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> float:
    """Mean bits/dim of 8-bit slices under their own labels.

    The dequantisation noise that the model uses is drawn from a seed, for each slice the same whatever the
    number of ranks.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        batch_size: images per pass.
        seed: of the noise.
        ranks: each evaluates a part of the slices, none of them twice; all must come here together. None is
            this process alone.
    """
    generator = torch.Generator().manual_seed(seed)
    world_size = 1 if ranks is None else ranks.world_size
    values = torch.zeros(len(images), dtype=torch.float64)
    for start in range(0, len(images), batch_size * world_size):
        end = min(start + batch_size * world_size, len(images))
        rows = _rows(ranks, end - start)
        x = from_uint8(torch.from_numpy(images[start:end][rows.index]))
        if model.config.dequantize == "uniform":
            x = objectives.dequantize(x, generator, rows)
        if not len(x):
            continue
        y = torch.from_numpy(labels[start:end][rows.index])
        lp = model.log_prob(x.to(model.device), y.to(model.device))
        values[start:end][rows.index] = objectives.bits_per_dim(lp, model.config.num_dims).double().cpu()
    values = _of_all(values, model, ranks)
    # The sums of passes are those of one rank.
    return sum(float(part.sum()) for part in values.split(batch_size)) / len(images)


@torch.no_grad()
def evaluate_accuracy(
    model: MagicFlow, images: NDArray[Any], labels: NDArray[Any], ranks: Ranks | None = None
) -> float:
    """Share of 8-bit slices whose likeliest label is their own.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        ranks: each evaluates a part of the slices, none of them twice; all must come here together. None is
            this process alone.
    """
    rows = _rows(ranks, len(images))
    hits = torch.zeros(len(images), dtype=torch.float64)
    own = hits[rows.index]
    batches = -(-len(own) // ACCURACY_BATCH_SIZE)
    found = []
    if batches:
        parts = np.array_split(images[rows.index], batches), np.array_split(labels[rows.index], batches)
        for part, y in zip(*parts, strict=True):
            x = from_uint8(torch.from_numpy(part).to(model.device))
            found.append(model.log_prob_all(x).argmax(dim=1).cpu() == torch.from_numpy(y))
        own.copy_(torch.cat(found))
    return float(_of_all(hits, model, ranks).mean())


def _rows(ranks: Ranks | None, whole: int) -> BatchRows:
    return BatchRows.all(whole) if ranks is None else ranks.rows(whole)


def _of_all(values: Tensor, model: MagicFlow, ranks: Ranks | None) -> Tensor:
    """Numbers of all rows, from those that each rank has put at its own, zeros elsewhere."""
    return values if ranks is None else ranks.sum(values.to(model.device)).cpu()
