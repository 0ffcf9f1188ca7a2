"""Figures of merit of probabilities: calibration, ranking and per-class averages, by volume.

Every figure is computed of weighted volumes, for many weightings at once. Equal weights give the figure
itself, and numbers of draws those of a bootstrap's resamples (`fastflow.evaluation.bootstrap`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.evaluation.classification import classification_metrics

CALIBRATION_BINS = 15
# A probability of 0 for the true class would make the mean infinite.
LEAST_PROBABILITY = 1e-300
FIGURES = ("accuracy", "balanced_accuracy", "auc", "precision", "recall", "f1", "kappa", "ece", "nll")
# Log-odds that agree to so many decimals are ties: sums of probabilities differ by rounding.
TIE_DECIMALS = 9

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


def weighted_figures(labels: Labels, log_probabilities: Array, weights: Array) -> dict[str, Array]:
    """All figures of a classifier that gives probabilities, for each of R weightings of N volumes.

    Args:
        labels: (N,) integers in [0, K).
        log_probabilities: (N, K), of rows whose probabilities sum to 1.
        weights: (R, N), not negative, each row with a positive sum.

    Returns:
        By the names of `FIGURES`, (R,), or (R, K) of those that are means over classes (`mean_over_classes`);
        NaN where a figure is not defined, as for a class without weight among the labels.
    """
    each = np.ascontiguousarray(weights.T, dtype=np.float64)
    total, classes = each.sum(axis=0), log_probabilities.shape[1]
    predictions = log_probabilities.argmax(axis=1)
    confusion = _sums(each, labels * classes + predictions, classes**2).reshape(classes, classes, -1)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    right = np.einsum("kkr->kr", confusion)
    with np.errstate(divide="ignore", invalid="ignore"):
        occurs = np.where(true > 0, 1.0, np.nan)
        recall, f1 = right / true, occurs * 2 * right / (true + predicted)
        precision = occurs * np.where(predicted > 0, right / predicted, 0.0)
        accuracy, chance = right.sum(axis=0) / total, (true * predicted).sum(axis=0) / total**2
        kappa = np.where(chance < 1, (accuracy - chance) / (1 - chance), np.nan)
    own = log_probabilities[np.arange(len(labels)), labels]
    return {
        "accuracy": accuracy,
        "balanced_accuracy": recall.T,
        "auc": _areas(labels, log_probabilities, each),
        "precision": precision.T,
        "recall": recall.T,
        "f1": f1.T,
        "kappa": kappa,
        "ece": _calibration_error(labels, log_probabilities, each, CALIBRATION_BINS),
        "nll": -(each * own[:, None]).sum(axis=0) / total,
    }


def mean_over_classes(values: Array) -> Array:
    """Means (R,) of the values (R, K) of classes, over those that have one; (R,) as it is.

    Args:
        values: of `weighted_figures`.
    """
    if values.ndim == 1:
        return values
    defined = np.isfinite(values)
    counts = defined.sum(axis=1)
    sums = np.where(defined, values, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _sums(each: Array, groups: Labels, count: int) -> Array:
    """Sums (count, R) of the rows of (N, R) by group."""
    order = np.argsort(groups, kind="stable")
    present, starts = np.unique(groups[order], return_index=True)
    out = np.zeros((count, each.shape[1]))
    out[present] = np.add.reduceat(each[order], starts, axis=0)
    return out


# -- ranking -------------------------------------------------------------------------------------------------


def log_odds(log_probabilities: Array) -> Array:
    """Log-odds of each class against all others, (N, K), by which volumes are ranked.

    They have the order of the probabilities, and differ still where these round to 0 or 1.

    Args:
        log_probabilities: (N, K), K at least 2.
    """
    columns = []
    for k in range(log_probabilities.shape[1]):
        others = np.delete(log_probabilities, k, axis=1)
        highest = others.max(axis=1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            rest = highest[:, 0] + np.log(np.exp(others - highest).sum(axis=1))
        # A prior of 0 for all other classes leaves no doubt.
        rest = np.where(np.isneginf(highest[:, 0]), -np.inf, rest)
        columns.append(log_probabilities[:, k] - rest)
    return np.asarray(np.round(np.stack(columns, axis=1), TIE_DECIMALS), dtype=np.float64)


def _areas(labels: Labels, log_probabilities: Array, each: Array) -> Array:
    """Area under the ROC curve of each class against all others, (R, K)."""
    classes = log_probabilities.shape[1]
    areas = np.full((each.shape[1], classes), np.nan)
    if classes < 2:
        return areas
    scores = log_odds(log_probabilities)
    for k in np.unique(labels):
        values, rank = np.unique(scores[:, k], return_inverse=True)
        mine = (labels == k)[:, None]
        positive = _sums(each * mine, rank, len(values))
        negative = _sums(each * ~mine, rank, len(values))
        # A tie counts as half.
        beaten = np.cumsum(negative, axis=0) - negative / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            areas[:, k] = (positive * beaten).sum(axis=0) / (positive.sum(axis=0) * negative.sum(axis=0))
    return areas


def auc_one_vs_rest(labels: NDArray[Any], probabilities: NDArray[Any]) -> float | None:
    """Mean over classes of the area under the curve of this class against all others.

    Classes that do not occur, or that alone occur, have none; None where no class has one.

    Args:
        labels: (N,) integers in [0, K).
        probabilities: (N, K).
    """
    areas = _areas(np.asarray(labels), logs_of(probabilities), _alike(labels))
    return _value(mean_over_classes(areas))


# -- calibration ---------------------------------------------------------------------------------------------


def expected_calibration_error(
    labels: NDArray[Any], probabilities: NDArray[Any], bins: int = CALIBRATION_BINS
) -> float:
    """Mean distance between confidence and accuracy over bins of equal width, weighted by their counts.

    Source: Guo et al., 2017.

    Args:
        labels: (N,) integers in [0, K).
        probabilities: (N, K), rows sum to 1.
        bins: of the confidence, which is the largest probability of a row.
    """
    return float(_calibration_error(np.asarray(labels), logs_of(probabilities), _alike(labels), bins)[0])


def _calibration_error(labels: Labels, log_probabilities: Array, each: Array, bins: int) -> Array:
    confidence = np.exp(log_probabilities.max(axis=1))
    gap = (log_probabilities.argmax(axis=1) == labels) - confidence
    # Logarithm and exponential must not move a confidence over the edge of a bin.
    place = np.minimum((np.round(confidence, TIE_DECIMALS) * bins).astype(np.int64), bins - 1)
    return np.abs(_sums(each * gap[:, None], place, bins)).sum(axis=0) / each.sum(axis=0)


def negative_log_likelihood(labels: NDArray[Any], probabilities: NDArray[Any]) -> float:
    """Mean of ``-log p(label)``, nats a volume.

    Args:
        labels: (N,) integers in [0, K).
        probabilities: (N, K), rows sum to 1.
    """
    return float(-logs_of(probabilities)[np.arange(len(labels)), labels].mean())


# -- all figures ---------------------------------------------------------------------------------------------


def logs_of(probabilities: NDArray[Any]) -> Array:
    """Logarithms of probabilities; those below `LEAST_PROBABILITY` count as that."""
    return np.log(np.maximum(np.asarray(probabilities, dtype=np.float64), LEAST_PROBABILITY))


def probability_metrics(
    labels: NDArray[Any], probabilities: NDArray[Any], class_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """All figures of a classifier that gives probabilities.

    The means over classes (macro averages) are over the classes that occur among the labels.

    Args:
        labels: (N,) integers in [0, K).
        probabilities: (N, K), rows sum to 1.
        class_names: K names; "0" to "K-1" when None.

    Returns:
        What `classification_metrics` returns, and ``auc``, ``precision``, ``recall``, ``f1``, ``kappa``,
        ``ece``, ``nll``.

    Raises:
        ValueError: shapes do not fit, or a probability is not finite.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or len(probabilities) != len(labels):
        raise ValueError(
            f"probabilities must be (N, K) beside {len(labels)} labels, got {probabilities.shape}"
        )
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite")
    metrics = classification_metrics(
        labels, probabilities.argmax(axis=1), probabilities.shape[1], class_names
    )
    figures = weighted_figures(labels, logs_of(probabilities), _alike(labels).T)
    return metrics | {
        name: _value(mean_over_classes(figures[name])) for name in FIGURES if name not in metrics
    }


def _alike(labels: NDArray[Any]) -> Array:
    return np.ones((len(labels), 1))


def _value(values: Array) -> float | None:
    return float(values[0]) if np.isfinite(values[0]) else None
