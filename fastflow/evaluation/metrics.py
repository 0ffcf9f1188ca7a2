"""Figures of merit of probabilities: calibration, ranking and per-class averages, by volume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import cohen_kappa_score, precision_recall_fscore_support, roc_auc_score

from fastflow.evaluation.classification import classification_metrics

CALIBRATION_BINS = 15
# A probability of 0 for the true class would make the mean infinite.
LEAST_PROBABILITY = 1e-300


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
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gap = np.bincount(place, right.astype(np.float64) - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(labels))


def negative_log_likelihood(labels: NDArray[Any], probabilities: NDArray[Any]) -> float:
    """Mean of ``-log p(label)``, nats a volume.

    Args:
        labels: (N,) integers in [0, K).
        probabilities: (N, K), rows sum to 1.
    """
    own = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(own, LEAST_PROBABILITY)).mean())


def auc_one_vs_rest(labels: NDArray[Any], probabilities: NDArray[Any]) -> float | None:
    """Mean over classes of the area under the curve of this class against all others.

    Classes that do not occur, or that alone occur, have none; None where no class has one.

    Args:
        labels: (N,) integers in [0, K).
        probabilities: (N, K).
    """
    areas = [
        roc_auc_score(labels == k, probabilities[:, k])
        for k in range(probabilities.shape[1])
        if 0 < np.count_nonzero(labels == k) < len(labels)
    ]
    return float(np.mean(areas)) if areas else None


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
    predictions = probabilities.argmax(axis=1)
    metrics = classification_metrics(labels, predictions, probabilities.shape[1], class_names)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predictions, labels=np.unique(labels), average="macro", zero_division=0.0
    )
    kappa = float(cohen_kappa_score(labels, predictions, labels=np.arange(probabilities.shape[1])))
    return metrics | {
        "auc": auc_one_vs_rest(labels, probabilities),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
        "kappa": kappa if np.isfinite(kappa) else None,
        "ece": expected_calibration_error(labels, probabilities),
        "nll": negative_log_likelihood(labels, probabilities),
    }
