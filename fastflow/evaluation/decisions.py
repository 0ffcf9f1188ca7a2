"""Figures, intervals, confusion and ROC curves of several decisions about the same volumes, side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from fastflow.evaluation.bootstrap import Resamples, estimate
from fastflow.evaluation.classification import classification_metrics
from fastflow.evaluation.metrics import FIGURES, log_odds, mean_over_classes, weighted_figures

# The figures that the table of classes shows.
CLASS_FIGURES = ("recall", "precision", "f1", "auc")
# The model's likelihood of the images, beside the figures of its decision.
BITS = ("bits_per_dim", "bits_per_dim_predicted")
# The curve of the means over classes has so many steps.
MACRO_STEPS = 100
# A ROC curve keeps at most so many of its points.
MAX_POINTS = 200

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredVolumes:
    """Labelled volumes, in the order of all decisions about them.

    Attributes:
        labels: (N,) indices into `class_names`.
        subjects: N names; volumes of one subject are resampled together.
        class_names: K names.

    Raises:
        ValueError: there is no volume, or sizes differ.
    """

    labels: NDArray[np.int64]
    subjects: Sequence[str]
    class_names: Sequence[str]

    def __post_init__(self) -> None:
        if not len(self.labels) or len(self.labels) != len(self.subjects):
            raise ValueError(
                f"labels and subjects must be of the same N > 0 volumes, got {len(self.labels)} and "
                f"{len(self.subjects)}"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class DecidedVolumes:
    """The decision of one rule or classifier on each volume: a row of the table.

    Attributes:
        name: of the row, such as ``"argmax"`` or ``"histogram"``.
        log_probabilities: (N, K) of the classes; the largest decides.
        values: further figures that are means over volumes, (N,) each, such as ``"bits_per_dim"``.

    Raises:
        ValueError: a probability is NaN, or sizes differ.
    """

    name: str
    log_probabilities: Array
    values: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.log_probabilities.ndim != 2 or np.isnan(self.log_probabilities).any():
            raise ValueError(
                f"log_probabilities of {self.name!r} must be (N, K) numbers, got "
                f"{self.log_probabilities.shape} with {np.isnan(self.log_probabilities).sum()} NaN"
            )
        for name, values in self.values.items():
            if values.shape != (len(self.log_probabilities),):
                raise ValueError(f"{name} of {self.name!r} must have a value for each volume")


def evaluate_decisions(
    volumes: ScoredVolumes, decisions: Sequence[DecidedVolumes], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """All figures of each decision, with 95 % bootstrap intervals by subject (`Resamples`).

    Args:
        volumes: labelled ones.
        decisions: about these volumes; others are compared with the first, on the same resamples.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        JSON values: ``volumes``, ``subjects``, ``class_names``, ``classes`` (volumes and subjects of each),
        ``one_subject`` (classes of which there is one subject, so that their interval says nothing),
        ``absent`` (classes without a volume), ``decisions`` by name, each with ``figures``, ``classes``,
        ``confusion`` and ``roc``, and ``differences`` of each further decision from the first.

    Raises:
        ValueError: there is no decision, or sizes differ.
    """
    if not decisions or any(len(d.log_probabilities) != len(volumes.labels) for d in decisions):
        raise ValueError(f"decisions must be about the {len(volumes.labels)} volumes")
    draws = Resamples.of(volumes.subjects, volumes.labels, resamples, seed)
    counts = _counts(volumes)
    document: dict[str, Any] = {
        "volumes": len(volumes.labels),
        "subjects": len(set(volumes.subjects)),
        "class_names": list(volumes.class_names),
        "classes": counts,
        "one_subject": [name for name, count in counts.items() if count["subjects"] == 1],
        "absent": [name for name, count in counts.items() if not count["volumes"]],
        "decisions": {},
        "differences": {},
    }
    first: tuple[dict[str, Array], dict[str, Array]] | None = None
    for decision in decisions:
        own, drawn = _whole_and_resampled(volumes, decision, draws)
        document["decisions"][decision.name] = _describe(volumes, decision, own, drawn)
        if first is None:
            first = own, drawn
        else:
            document["differences"][decision.name] = {"against": decisions[0].name} | {
                name: estimate(
                    float((mean_over_classes(own[name]) - mean_over_classes(first[0][name]))[0]),
                    mean_over_classes(drawn[name]) - mean_over_classes(first[1][name]),
                )
                for name in FIGURES
            }
    return document


def _counts(volumes: ScoredVolumes) -> dict[str, dict[str, int]]:
    subjects = np.asarray(volumes.subjects, dtype=str)
    return {
        name: {
            "volumes": int(np.count_nonzero(volumes.labels == k)),
            "subjects": len(np.unique(subjects[volumes.labels == k])),
        }
        for k, name in enumerate(volumes.class_names)
    }


def _whole_and_resampled(
    volumes: ScoredVolumes, decision: DecidedVolumes, draws: Resamples
) -> tuple[dict[str, Array], dict[str, Array]]:
    def figures(weights: Array) -> dict[str, Array]:
        means = {
            name: (weights * values).sum(axis=1) / weights.sum(axis=1)
            for name, values in decision.values.items()
        }
        return weighted_figures(volumes.labels, decision.log_probabilities, weights) | means

    return figures(np.ones((1, len(volumes.labels)))), draws.apply(figures)


def _describe(
    volumes: ScoredVolumes, decision: DecidedVolumes, own: Mapping[str, Array], drawn: Mapping[str, Array]
) -> dict[str, Any]:
    names = list(volumes.class_names)
    predictions = decision.log_probabilities.argmax(axis=1)
    return {
        "figures": {
            name: estimate(float(mean_over_classes(own[name])[0]), mean_over_classes(drawn[name]))
            for name in own
        },
        "classes": {
            class_name: {name: estimate(float(own[name][0, k]), drawn[name][:, k]) for name in CLASS_FIGURES}
            for k, class_name in enumerate(names)
        },
        "confusion": classification_metrics(volumes.labels, predictions, len(names), names)["confusion"],
        "roc": roc_curves(volumes, decision.log_probabilities),
    }


def figures_of_part(
    volumes: ScoredVolumes,
    decision: DecidedVolumes,
    part: NDArray[np.bool_],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy and balanced accuracy of a part of the volumes, such as the flagged ones.

    Args:
        volumes: labelled ones.
        decision: about all of them.
        part: (N,) which of them count.
        resamples: of all subjects.
        seed: of the bootstrap.

    Returns:
        JSON values: ``volumes``, ``accuracy`` and ``balanced_accuracy`` with intervals.
    """
    names = ("accuracy", "balanced_accuracy")

    def figures(weights: Array) -> dict[str, Array]:
        with np.errstate(divide="ignore", invalid="ignore"):
            found = weighted_figures(volumes.labels, decision.log_probabilities, weights * part)
        return {name: mean_over_classes(found[name]) for name in names}

    own = figures(np.ones((1, len(volumes.labels))))
    drawn = Resamples.of(volumes.subjects, volumes.labels, resamples, seed).apply(figures)
    estimates = {name: estimate(float(own[name][0]), drawn[name]) for name in names}
    return {"volumes": int(np.count_nonzero(part))} | estimates


def roc_curves(volumes: ScoredVolumes, log_probabilities: Array) -> dict[str, Any]:
    """ROC curves of each class against all others, and their mean.

    Args:
        volumes: labelled ones.
        log_probabilities: (N, K).

    Returns:
        ``classes``, by name ``{"fpr": [...], "tpr": [...]}`` with at most `MAX_POINTS` points, without the
        classes that do not occur or occur alone; and ``macro``, the mean of their true positive rates over a
        grid of false positive rates, None without any.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    grid = np.linspace(0.0, 1.0, MACRO_STEPS + 1)
    heights = []
    scores = log_odds(log_probabilities) if log_probabilities.shape[1] > 1 else log_probabilities
    for k, name in enumerate(volumes.class_names):
        mine = volumes.labels == k
        if mine.all() or not mine.any():
            continue
        fpr, tpr, _ = roc_curve(mine, np.nan_to_num(scores[:, k]))
        heights.append(np.interp(grid, fpr, tpr))
        kept = np.unique(np.linspace(0, len(fpr) - 1, MAX_POINTS).round().astype(int))
        curves[name] = {"fpr": _rounded(fpr[kept]), "tpr": _rounded(tpr[kept])}
    if not heights:
        return {"classes": curves, "macro": None}
    # The curve begins at the origin, where some classes rise straight up.
    macro = {"fpr": [0.0, *_rounded(grid)], "tpr": [0.0, *_rounded(np.mean(heights, axis=0))]}
    return {"classes": curves, "macro": macro}


def _rounded(values: Array) -> list[float]:
    return [round(float(value), 5) for value in values]
