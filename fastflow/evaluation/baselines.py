"""Classifiers that see no anatomy, and stand beside each accuracy of a model of images."""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fastflow.data.grain import GRAIN_NUMBERS, grain_numbers
from fastflow.data.slices import SliceSet

BINS, THUMBNAIL = 64, 12
# These of the grain numbers are positive, and enter as logarithms: scanners differ by ratios of them.
POSITIVE = ("variance", "deviation", "mean", "spread")
LEAST_NUMBER = 1e-3


class _Baseline:
    """A classifier of volumes by a few numbers of each."""

    # It names the baseline in messages.
    name: str

    def __init__(self) -> None:
        self._pipeline: Pipeline | None = None
        self._num_classes = 0

    def fit(self, data: SliceSet) -> Self:
        """Fit to labelled volumes.

        Raises:
            ValueError: a volume has no label, or fewer than two classes occur.
        """
        labels = data.volume_labels
        if len(labels) == 0 or labels.min() < 0 or len(np.unique(labels)) < 2:
            raise ValueError(f"the {self.name} baseline needs labelled volumes of at least two classes")
        estimator = self._estimator(labels)
        self._pipeline = make_pipeline(StandardScaler(), estimator).fit(self._numbers(data), labels)
        self._num_classes = len(data.class_names)
        return self

    def predict(self, data: SliceSet) -> NDArray[np.int64]:
        """(V,) predicted labels.

        Raises:
            ValueError: the baseline was not fitted.
        """
        return np.asarray(self._fitted().predict(self._numbers(data)), dtype=np.int64)

    def predict_proba(self, data: SliceSet) -> NDArray[np.float64]:
        """(V, K) probabilities of the labels; 0 for a class that the baseline was not fitted to.

        Raises:
            ValueError: the baseline was not fitted.
        """
        fitted = self._fitted()
        probabilities = np.zeros((len(data.paths), self._num_classes))
        probabilities[:, np.asarray(fitted.classes_)] = fitted.predict_proba(self._numbers(data))
        return probabilities

    def _fitted(self) -> Pipeline:
        if self._pipeline is None:
            raise ValueError(f"the {self.name} baseline must be fitted before it predicts")
        return self._pipeline

    def _estimator(self, labels: NDArray[np.int64]) -> BaseEstimator:
        raise NotImplementedError

    def _numbers(self, data: SliceSet) -> NDArray[np.float64]:
        raise NotImplementedError


class HistogramBaseline(_Baseline):
    """Logistic regression on each volume's grey-level histogram, which shows not a single structure.

    Scanners differ in contrast and brightness, and scaling, padding or a crop leave traces in the histogram
    as well. The accuracy of a model of images means something only beyond that of this baseline, which is
    printed next to it.

    Histograms have `BINS` bins over the volume's slices and are standardised. Classes are weighted equally,
    as in the balanced accuracy that the baseline is compared in, and cross-validation on the training volumes
    chooses the regularisation: a baseline that overfits would flatter the model.
    """

    name = "histogram"

    def _estimator(self, labels: NDArray[np.int64]) -> BaseEstimator:
        return _regression(labels)

    def _numbers(self, data: SliceSet) -> NDArray[np.float64]:
        return volume_histograms(data)


class GrainBaseline(_Baseline):
    """Linear discriminant analysis of six numbers about the grain and the grey levels of each volume.

    The numbers are those of `fastflow.data.grain`, made by hand for telling scanners apart, so this is the
    stronger of the baselines where scanners differ in grain. Classes are weighted equally.
    """

    name = "grain"

    def _estimator(self, labels: NDArray[np.int64]) -> BaseEstimator:
        classes = len(np.unique(labels))
        return LinearDiscriminantAnalysis(solver="svd", priors=np.full(classes, 1.0 / classes))

    def _numbers(self, data: SliceSet) -> NDArray[np.float64]:
        return volume_grain(data)


class ThumbnailBaseline(_Baseline):
    """Logistic regression on the mean slice of each volume at a dozen pixels a side.

    It reads what is smooth, the bias field of a coil first of all, and is the stronger of the baselines where
    scanners differ in it. The regularisation is chosen as that of the histogram baseline.
    """

    name = "thumbnail"

    def _estimator(self, labels: NDArray[np.int64]) -> BaseEstimator:
        return _regression(labels)

    def _numbers(self, data: SliceSet) -> NDArray[np.float64]:
        return volume_thumbnails(data)


def _regression(labels: NDArray[np.int64]) -> BaseEstimator:
    """Logistic regression whose regularisation cross-validation chooses, where classes have two volumes."""
    folds = min(5, int(np.unique(labels, return_counts=True)[1].min()))
    fixed = {"class_weight": "balanced", "max_iter": 5000}
    if folds < 2:
        return LogisticRegression(**fixed)
    return GridSearchCV(
        LogisticRegression(**fixed), {"C": np.logspace(-4, 1, 6)}, scoring="balanced_accuracy", cv=folds
    )


def volume_thumbnails(data: SliceSet) -> NDArray[np.float64]:
    """(V, N): the mean over a volume's slices of the means of N cells, in grey levels.

    There are `THUMBNAIL` cells along an axis, or one for each pixel where it is shorter.
    """
    cells = [np.linspace(0, n, min(THUMBNAIL, n) + 1).astype(np.int64) for n in data.images.shape[2:]]
    pixels = np.outer(*map(np.diff, cells))
    sums = np.zeros((len(data.paths), *pixels.shape))
    for image, volume in zip(data.images, data.volumes, strict=True):
        rows = np.add.reduceat(image[0].astype(np.float64), cells[0][:-1], axis=0)
        sums[volume] += np.add.reduceat(rows, cells[1][:-1], axis=1)
    slices = np.maximum(np.bincount(data.volumes, minlength=len(data.paths)), 1)
    return np.asarray((sums / pixels).reshape(len(data.paths), -1) / slices[:, None])


def volume_histograms(data: SliceSet) -> NDArray[np.float64]:
    """(V, BINS): the share of each grey level range in the slices of each volume."""
    out = np.zeros((len(data.paths), BINS))
    for image, volume in zip(data.images, data.volumes, strict=True):
        out[volume] += np.bincount(image.ravel() // (256 // BINS), minlength=BINS)
    return out / np.maximum(out.sum(axis=1, keepdims=True), 1.0)


def volume_grain(data: SliceSet) -> NDArray[np.float64]:
    """(V, 6): the mean of `fastflow.data.grain.grain_numbers` over the slices of each volume.

    Those in `POSITIVE` are logarithms of the mean.
    """
    out = np.zeros((len(data.paths), len(GRAIN_NUMBERS)))
    np.add.at(out, data.volumes, grain_numbers(data.images[:, 0]))
    out /= np.maximum(np.bincount(data.volumes, minlength=len(out)), 1)[:, None]
    positive = [GRAIN_NUMBERS.index(name) for name in POSITIVE]
    out[:, positive] = np.log(np.maximum(out[:, positive], LEAST_NUMBER))
    return out
