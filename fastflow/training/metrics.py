"""Figures that training reports: means over samples, bits/dim and accuracy on held-out slices."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from fastflow.data.indexed_images import select_rows
from fastflow.data.slices import SliceSet
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.calibration import fit_temperature, negative_log_posterior

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
    """The middle slice of each volume: (images (V, C, H, W), labels (V,)), enough to watch a run by.

    Images on disk stay there until they are asked for.
    """
    order = np.argsort(data.volumes, kind="stable")
    _, first, count = np.unique(data.volumes[order], return_index=True, return_counts=True)
    chosen = order[first + count // 2]
    return select_rows(data.images, chosen), data.labels[chosen]


@torch.no_grad()
def evaluate_bits_per_dim(
    model: MagicFlow, images: NDArray[Any], labels: NDArray[Any], batch_size: int = 64, seed: int = 0
) -> float:
    """Mean bits/dim of 8-bit slices under their own labels.

    The dequantisation noise that the model uses is drawn from a seed.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        batch_size: images per pass.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, len(images), batch_size):
        x = from_uint8(torch.from_numpy(images[start : start + batch_size]))
        if model.config.dequantize == "uniform":
            x = objectives.dequantize(x, generator)
        y = torch.from_numpy(labels[start : start + batch_size])
        lp = model.log_prob(x.to(model.device), y.to(model.device))
        total += float(objectives.bits_per_dim(lp, model.config.num_dims).double().sum())
    return total / len(images)


@torch.no_grad()
def evaluate_accuracy(model: MagicFlow, images: NDArray[Any], labels: NDArray[Any], fabric: Fabric) -> float:
    """Share of 8-bit slices whose likeliest label is their own.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        fabric: whose ranks each evaluate a part.
    """
    return evaluate_labels(model, images, labels, fabric)["accuracy"]


@torch.no_grad()
def evaluate_labels(
    model: MagicFlow, images: NDArray[Any], labels: NDArray[Any], fabric: Fabric
) -> dict[str, float]:
    """How well the likelihoods of 8-bit slices tell their labels.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        fabric: on whose device the slices are scored.

    Returns:
        ``accuracy``: share of the slices whose likeliest label is their own. ``balanced_accuracy``: mean of
        that share over the classes that occur. ``nll``: mean negative log-posterior of the own label in nats,
        at the temperature that makes it least, as the posterior of a finished model is calibrated; so it
        compares epochs however large their log-odds are. It is NaN where a likelihood is not finite.
    """
    batches = -(-len(images) // ACCURACY_BATCH_SIZE)
    log_probs = np.concatenate(
        [
            model.log_prob_all(from_uint8(torch.from_numpy(images[rows]).to(fabric.device)))
            .cpu()
            .double()
            .numpy()
            for rows in np.array_split(np.arange(len(images)), batches)
        ]
    )
    right = log_probs.argmax(axis=1) == labels
    count = np.bincount(labels)
    recall = np.bincount(labels, weights=right)[count > 0] / count[count > 0]
    nll = float("nan")
    if np.isfinite(log_probs).all():
        nll = negative_log_posterior(log_probs, labels, fit_temperature(log_probs, labels))
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(recall.mean()), "nll": nll}
