"""Figures that training reports of held-out slices: bits/dim, and how well likelihoods tell labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflow.data.indexed_images import select_rows
from fastflow.data.slices import SliceSet
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.calibration import fit_temperature, negative_log_posterior
from fastflow.training.devices import Ranks
from fastflow.training.rows import BatchRows

# So many slices are scored at once; each takes the memory of K, one for each label.
ACCURACY_BATCH_SIZE = 32


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
        own = np.arange(start, end)[rows.index]
        x = from_uint8(torch.from_numpy(images[own]))
        if model.config.dequantize == "uniform":
            x = objectives.dequantize(x, generator, rows)
        if not len(x):
            continue
        y = torch.from_numpy(labels[own])
        lp = model.log_prob(x.to(model.device), y.to(model.device))
        values[own] = objectives.bits_per_dim(lp, model.config.num_dims).double().cpu()
    values = _of_all(values, model, ranks)
    # The sums of passes are those of one rank.
    return sum(float(part.sum()) for part in values.split(batch_size)) / len(images)


@torch.no_grad()
def evaluate_accuracy(
    model: MagicFlow, images: NDArray[Any], labels: NDArray[Any], ranks: Ranks | None = None
) -> float:
    """Share of 8-bit slices whose likeliest label is their own; arguments as those of `evaluate_labels`."""
    return evaluate_labels(model, images, labels, ranks)["accuracy"]


@torch.no_grad()
def evaluate_labels(
    model: MagicFlow, images: NDArray[Any], labels: NDArray[Any], ranks: Ranks | None = None
) -> dict[str, float]:
    """How well the likelihoods of 8-bit slices tell their labels.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        ranks: each scores a part of the slices, none of them twice, and has the figures of all; all must come
            here together. None is this process alone.

    Returns:
        ``accuracy``: share of the slices whose likeliest label is their own. ``balanced_accuracy``: mean of
        that share over the classes that occur. ``nll``: mean negative log-posterior of the own label in nats,
        at the temperature that makes it least, as the posterior of a finished model is calibrated; so it
        compares epochs however large their log-odds are. It is NaN where a likelihood is not finite.
    """
    log_probs = _log_probs(model, images, ranks)
    right = log_probs.argmax(axis=1) == labels
    count = np.bincount(labels)
    recall = np.bincount(labels, weights=right)[count > 0] / count[count > 0]
    nll = float("nan")
    if np.isfinite(log_probs).all():
        nll = negative_log_posterior(log_probs, labels, fit_temperature(log_probs, labels))
    return {"accuracy": float(right.mean()), "balanced_accuracy": float(recall.mean()), "nll": nll}


def _log_probs(model: MagicFlow, images: NDArray[Any], ranks: Ranks | None) -> NDArray[Any]:
    """Log-likelihoods (N, K) under all labels, float64; each rank scores its rows in batches."""
    own = np.arange(len(images))[_rows(ranks, len(images)).index]
    values = torch.zeros((len(images), model.config.num_classes), dtype=torch.float64)
    for rows in np.array_split(own, -(-len(own) // ACCURACY_BATCH_SIZE)) if len(own) else ():
        x = from_uint8(torch.from_numpy(images[rows]).to(model.device))
        values[rows] = model.log_prob_all(x).double().cpu()
    return _of_all(values, model, ranks).numpy()


def _rows(ranks: Ranks | None, whole: int) -> BatchRows:
    return BatchRows.all(whole) if ranks is None else ranks.rows(whole)


def _of_all(values: Tensor, model: MagicFlow, ranks: Ranks | None) -> Tensor:
    """Numbers of all rows, from those that each rank has put at its own, zeros elsewhere."""
    return values if ranks is None else ranks.sum(values.to(model.device)).cpu()
