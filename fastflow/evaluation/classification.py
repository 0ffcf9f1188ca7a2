"""Figures of merit for classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.evaluation.baselines import BINS as BINS
from fastflow.evaluation.baselines import HistogramBaseline as HistogramBaseline
from fastflow.evaluation.baselines import volume_histograms as volume_histograms


def classification_metrics(
    labels: NDArray[Any],
    predictions: NDArray[Any],
    num_classes: int,
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Accuracy and what it hides when classes are imbalanced.

    Args:
        labels: (N,) integers in [0, K).
        predictions: (N,) integers in [0, K).
        num_classes: K.
        class_names: K names; "0" to "K-1" when None.

    Returns:
        JSON values: ``count`` N, ``accuracy``, ``balanced_accuracy`` (mean recall of the classes that occur),
        ``per_class_recall`` (name to recall, None for a class that does not occur), ``confusion`` (K lists of
        K counts; the lists are true classes, their entries predicted ones), ``class_names``.

    Raises:
        ValueError: shapes differ, nothing to count, a value is no class, or K names are not K.
    """
    labels, predictions = np.asarray(labels), np.asarray(predictions)
    names = [str(k) for k in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise ValueError(f"class_names must be {num_classes} names (num_classes), got {len(names)}")
    if labels.ndim != 1 or labels.shape != predictions.shape or len(labels) == 0:
        raise ValueError(
            f"labels and predictions must be (N,) with N > 0, got {labels.shape} and {predictions.shape}"
        )
    for name, values in (("labels", labels), ("predictions", predictions)):
        if values.min() < 0 or values.max() >= num_classes:
            raise ValueError(
                f"{name} must lie in 0 to {num_classes - 1}, got {values.min()} to {values.max()}"
            )
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    totals = confusion.sum(axis=1)
    recall = np.divide(np.diag(confusion), totals, out=np.full(num_classes, np.nan), where=totals > 0)
    return {
        "count": len(labels),
        "accuracy": float(np.diag(confusion).sum() / len(labels)),
        "balanced_accuracy": float(np.nanmean(recall)),
        "per_class_recall": {
            name: None if np.isnan(r) else float(r) for name, r in zip(names, recall, strict=True)
        },
        "confusion": confusion.tolist(),
        "class_names": names,
    }
