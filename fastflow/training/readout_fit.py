"""Fitting the Gaussian read-out by cross-fitting: no volume is judged by numbers that it helped to fit.

Training volumes have optimistic likelihoods, since the flow has seen them, but they are many: the classes'
means and the covariance are fitted to training and validation volumes together, while the temperature and all
figures are of validation volumes alone. No torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.decision import posterior
from fastflow.errors import ReadoutError
from fastflow.readout import GaussianReadout, gaps
from fastflow.training.calibration import fit_temperature, negative_log_posterior

FOLDS = 5
# Shares of the covariance's mean variance; the one of Ledoit and Wolf is tried first.
SHRINKAGES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.3)
# Densities are tempered and never sharpened: few volumes without an error would ask for any sharpness.
LEAST_TEMPERATURE = 1.0

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class VolumeScores:
    """The log-likelihoods of V volumes.

    Attributes:
        log_probs: (V, K) nats, sums over a volume's slices.
        counts: (V,) slices of each volume.
        labels: (V,) integers in [0, K).
        groups: (V,) names of subjects, or of sites: a group is judged as a whole by what others have fitted.

    Raises:
        ValueError: the shapes do not fit, a label is out of range, a number is not finite, or a volume has no
            slice.
    """

    log_probs: Array
    counts: NDArray[Any]
    labels: NDArray[Any]
    groups: NDArray[Any]

    def __post_init__(self) -> None:
        shapes = [np.shape(self.counts), np.shape(self.labels), np.shape(self.groups)]
        if self.log_probs.ndim != 2 or any(shape != (len(self.log_probs),) for shape in shapes):
            raise ValueError(
                f"log_probs (V, K) and counts, labels, groups (V,) must fit, got {self.log_probs.shape} and "
                f"{shapes}"
            )
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < self.log_probs.shape[1]:
            raise ValueError(f"labels must lie in 0 to {self.log_probs.shape[1] - 1}")
        if not np.isfinite(self.log_probs).all() or (len(self.counts) and self.counts.min() < 1):
            raise ValueError("log_probs must be finite and counts at least 1; leave such volumes out")

    def __len__(self) -> int:
        return len(self.log_probs)

    @property
    def means(self) -> Array:
        """(V, K) nats a slice."""
        return np.asarray(self.log_probs / np.asarray(self.counts)[:, None])

    def joined(self, other: VolumeScores) -> VolumeScores:
        """The volumes of both, these first."""
        return VolumeScores(
            *(
                np.concatenate([getattr(self, field.name), getattr(other, field.name)])
                for field in dataclasses.fields(self)
            )
        )


@dataclasses.dataclass(frozen=True)
class ReadoutFit:
    """A fitted read-out, and how it judges volumes that it had not seen.

    Attributes:
        readout: fitted to all volumes.
        probabilities: (V, K) of the held-out volumes in their order, uniform prior; means, covariance and
            temperature of each row come from other groups.
        folds: number of parts of the groups.
    """

    readout: GaussianReadout
    probabilities: Array
    folds: int


def fit_readout(
    held_out: VolumeScores,
    training: VolumeScores | None,
    class_names: Sequence[str],
    slices: str | None = None,
    seed: int = 0,
) -> ReadoutFit:
    """Fit the read-out to held-out and training volumes.

    The groups are dealt to 5 folds, class by class. The volumes of a fold are judged by means and a
    covariance of all others. The shrinkage is the one with the lowest mean negative log-posterior of all
    volumes so judged, each with its own best temperature: Ledoit and Wolf's estimate (2004), or one of
    `SHRINKAGES`. The temperature makes the held-out volumes so judged most likely.

    Args:
        held_out: volumes that the flow was not trained on, those of validation.
        training: some volumes that it was trained on, or None. They make means and covariance better and
            judge nothing.
        class_names: K names.
        slices: the choice of slices that the volumes have, kept with the read-out.
        seed: of the dealing.

    Raises:
        ReadoutError: there are fewer than two classes, or volumes or groups of a class are too few; the
            message says which.
    """
    volumes = held_out if training is None else held_out.joined(training)
    own = np.arange(len(volumes)) < len(held_out)
    fold = _checked_folds(volumes, own, class_names, seed)
    best: tuple[float, float | None, Array] | None = None
    for shrinkage in (None, *SHRINKAGES):
        judged = _judge(volumes, fold, class_names, shrinkage)
        least = fit_temperature(judged, volumes.labels, least=LEAST_TEMPERATURE)
        loss = negative_log_posterior(judged, volumes.labels, least)
        if best is None or loss < best[0]:
            best = (loss, shrinkage, judged)
    assert best is not None
    judged, labels = best[2][own], held_out.labels
    counts = np.asarray(volumes.counts)
    readout = dataclasses.replace(
        gaussian_of(volumes, class_names, best[1]),
        temperature=fit_temperature(judged, labels, least=LEAST_TEMPERATURE),
        slices=slices,
        slice_counts=(int(counts.min()), int(counts.max())),
    )
    probabilities = cross_fitted(judged, labels, fold[own], LEAST_TEMPERATURE)
    return ReadoutFit(readout, probabilities, int(fold.max()) + 1)


def gaussian_of(
    volumes: VolumeScores, class_names: Sequence[str], shrinkage: float | None = None
) -> GaussianReadout:
    """Class means and the shared covariance of the volumes' gaps; temperature 1.

    Args:
        volumes: of every class at least one, and at least one more than classes.
        class_names: K names.
        shrinkage: share of the mean variance; Ledoit and Wolf's estimate when None.

    Raises:
        ReadoutError: a class has no volume, or volumes within a class do not differ.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    values, labels, classes = gaps(volumes.means), volumes.labels, len(class_names)
    counts = np.bincount(labels, minlength=classes)
    if not counts.all():
        name = class_names[int(np.flatnonzero(counts == 0)[0])]
        raise ReadoutError(f"no read-out: no volume of class {name!r} is left for a fold; add volumes of it")
    means = np.stack([values[labels == k].mean(axis=0) for k in range(classes)])
    within = values - means[labels]
    covariance = within.T @ within / max(1, len(values) - classes)
    share = float(ledoit_wolf_shrinkage(within, assume_centered=True)) if shrinkage is None else shrinkage
    mean_variance = float(np.trace(covariance)) / (classes - 1)
    shrunk = (1.0 - share) * covariance + share * mean_variance * np.eye(classes - 1)
    try:
        return GaussianReadout(
            tuple(class_names), means, shrunk, shrinkage=share, volumes=tuple(counts.tolist())
        )
    except ValueError as error:
        raise ReadoutError(f"no read-out: volumes within the classes hardly differ ({error})") from error


def cross_fitted(logits: Array, labels: NDArray[Any], fold: NDArray[Any], least: float) -> Array:
    """Probabilities of volumes, each with a temperature fitted to the other folds.

    Args:
        logits: (V, K) nats.
        labels: (V,) integers in [0, K).
        fold: (V,) of each volume.
        least: lowest temperature that is tried.

    Returns:
        (V, K); with a single fold the temperature is that of the volumes themselves.
    """
    out = np.empty_like(logits)
    for number in np.unique(fold):
        inside = fold == number
        others = ~inside if not inside.all() else inside
        out[inside] = posterior(logits[inside], fit_temperature(logits[others], labels[others], least=least))
    return out


def folds_of_groups(volumes: VolumeScores, own: NDArray[np.bool_], seed: int = 0) -> NDArray[np.int64]:
    """(V,) the fold of each volume; a group is in one fold, and a class's groups are spread over all.

    Args:
        volumes: V of them.
        own: (V,) which of them are held out; they are spread apart from the others.
        seed: of the order in which groups are dealt.
    """
    names, group = np.unique(np.asarray(volumes.groups), return_inverse=True)
    first_label = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(first_label, group, np.asarray(volumes.labels, dtype=np.int64))
    held = np.zeros(len(names), dtype=bool)
    np.logical_or.at(held, group, own)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    # Dealing in this order puts the groups of a class into different folds as far as there are folds.
    order = np.lexsort((shuffled, held, first_label))
    fold = np.empty(len(names), dtype=np.int64)
    fold[order] = np.arange(len(names)) % min(FOLDS, len(names))
    return fold[group]


def _checked_folds(
    volumes: VolumeScores, own: NDArray[np.bool_], class_names: Sequence[str], seed: int
) -> NDArray[np.int64]:
    """The folds, once there are enough volumes and groups of every class."""
    if len(class_names) < 2:
        raise ReadoutError("no read-out: it needs at least two classes")
    if volumes.log_probs.shape[1] != len(class_names):
        raise ValueError(f"log_probs must be of {len(class_names)} classes, got {volumes.log_probs.shape[1]}")
    if not own.any():
        raise ReadoutError("no read-out: there is no held-out volume to fit its temperature to")
    for k, name in enumerate(class_names):
        groups = np.unique(np.asarray(volumes.groups)[volumes.labels == k])
        if len(groups) < 2:
            raise ReadoutError(
                f"no read-out: class {name!r} has volumes of {len(groups)} subjects, at least 2 are needed"
            )
    return folds_of_groups(volumes, own, seed)


def _judge(
    volumes: VolumeScores, fold: NDArray[np.int64], class_names: Sequence[str], shrinkage: float | None
) -> Array:
    """(V, K) untempered log-densities of each volume by a read-out of the other folds."""
    judged, means = np.empty_like(volumes.log_probs), volumes.means
    for number in np.unique(fold):
        inside = fold == number
        others = VolumeScores(
            *(getattr(volumes, field.name)[~inside] for field in dataclasses.fields(volumes))
        )
        judged[inside] = gaussian_of(others, class_names, shrinkage).discriminants(means[inside])
    return judged
