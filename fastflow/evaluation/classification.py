"""Figures of merit for classifiers, and the intensity-histogram baseline that stands beside each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fastflow.data.slices import SliceSet

BINS = 64


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


class HistogramBaseline:
    """Logistic regression on each volume's grey-level histogram, which shows not a single structure.

    Scanners differ in contrast and brightness, and scaling, padding or a crop leave traces in the histogram
    as well. The accuracy of a model of images means something only beyond that of this baseline, which is
    printed next to it.

    Histograms have `BINS` bins over the volume's slices and are standardised. Classes are weighted equally,
    as in the balanced accuracy that the baseline is compared in, and cross-validation on the training volumes
    chooses the regularisation: a baseline that overfits would flatter the model.
    """

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None

    def fit(self, data: SliceSet) -> HistogramBaseline:
        """Fit to labelled volumes.

        Raises:
            ValueError: a volume has no label, or fewer than two classes occur.
        """
        labels = data.volume_labels
        if len(labels) == 0 or labels.min() < 0 or len(np.unique(labels)) < 2:
            raise ValueError("the histogram baseline needs labelled volumes of at least two classes")
        folds = min(5, int(np.unique(labels, return_counts=True)[1].min()))
        fixed = {"class_weight": "balanced", "max_iter": 5000}
        regression = (
            GridSearchCV(
                LogisticRegression(**fixed),
                {"C": np.logspace(-4, 1, 6)},
                scoring="balanced_accuracy",
                cv=folds,
            )
            if folds > 1
            else LogisticRegression(**fixed)
        )
        self._pipeline = make_pipeline(StandardScaler(), regression).fit(volume_histograms(data), labels)
        return self

    def predict(self, data: SliceSet) -> NDArray[np.int64]:
        """(V,) predicted labels.

        Raises:
            ValueError: the baseline was not fitted.
        """
        if self._pipeline is None:
            raise ValueError("the histogram baseline must be fitted before it predicts")
        return np.asarray(self._pipeline.predict(volume_histograms(data)), dtype=np.int64)

    def predict_proba(self, data: SliceSet) -> NDArray[np.float64]:
        """(V, K) probabilities of the K classes of `data`; 0 of a class that was not in the training.

        Raises:
            ValueError: the baseline was not fitted.
        """
        if self._pipeline is None:
            raise ValueError("the histogram baseline must be fitted before it predicts")
        out = np.zeros((len(data.paths), len(data.class_names)))
        out[:, self._pipeline.classes_] = self._pipeline.predict_proba(volume_histograms(data))
        return out


def volume_histograms(data: SliceSet) -> NDArray[np.float64]:
    """(V, BINS): the share of each grey level range in the slices of each volume."""
    out = np.zeros((len(data.paths), BINS))
    for image, volume in zip(data.images, data.volumes, strict=True):
        out[volume] += np.bincount(image.ravel() // (256 // BINS), minlength=BINS)
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1.0)
