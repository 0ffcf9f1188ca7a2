"""Has the model been trained on scans of the scanner that an image comes from? NumPy only.

A likelihood does not tell, and nor does its typicality. How the neighbours of the latent go together does
(`fastflow.models.inference.correlations`), and so do the numbers of the grain (`fastflow.data.grain`). The
score of a volume is the Mahalanobis distance of the mean of both over its slices from the mean of its
predicted class, with one covariance for all classes. A conformal p-value says how rare so large a score is
among validation volumes, which played no part in the model's training.

Source of the distance: Lee et al., 2018, "A simple unified framework for detecting out-of-distribution
samples"; of the p-value: Vovk et al., 2005, "Algorithmic learning in a random world".
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.data.grain import GRAIN_NUMBERS

UNKNOWN_SCANNER = "unknown_scanner"
FORMAT = 1
# The key of a model's metadata and of an export's document.
KEY = "scanners"
# Fewer validation volumes than this say nothing about others.
MIN_VALIDATION = 8
# Correlations of features are drawn so far to 0: a class may have few volumes.
SHRINKAGE = 0.1
# Validation volumes are scored by a fit to the others, in so many parts.
FOLDS = 5
# A feature whose deviation is smaller is constant and tells nothing.
LEAST_DEVIATION = 1e-9
# Saved numbers have so many digits.
DIGITS = 8

Array = NDArray[np.float64]


def volume_features(correlations: Array, grain: Array) -> Array:
    """The features of volumes, from those of their slices.

    Args:
        correlations: (n, ..., J, 2) of the latent blocks of n slices, see
            `fastflow.models.inference.correlations.lag_correlations`; further axes are kept, such as labels.
        grain: (n, 6), see `fastflow.data.grain.grain_numbers`.

    Returns:
        (..., 2J + 6): the means over the slices, of the correlations across and down of each block, then of
        the numbers of the grain.
    """
    mean = correlations.mean(axis=0)
    latent = mean.reshape(*mean.shape[:-2], -1)
    return np.concatenate(
        [latent, np.broadcast_to(grain.mean(axis=0), (*latent.shape[:-1], grain.shape[1]))], axis=-1
    )


@dataclasses.dataclass(frozen=True)
class HeldOutVolumes:
    """Validation volumes, none of which the model was trained on.

    Attributes:
        features: (V, K, 2J + 6) under each label, see `volume_features`.
        labels: (V,) their true labels.
        predicted: (V,) the labels of the highest likelihood.
        subjects: V names; volumes of one subject are never scored by a fit that knows another of them.
    """

    features: Array
    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    subjects: Sequence[str]

    def under(self, labels: NDArray[np.int64]) -> Array:
        """(V, 2J + 6), the features under one label for each volume."""
        return self.features[np.arange(len(labels)), labels]


# Arrays have no equality that is true or false, so fits are compared by their documents.
@dataclasses.dataclass(frozen=True, eq=False)
class KnownScanners:
    """The features of the classes that a model knows, and the scores of its validation volumes.

    Attributes:
        slices: which slices of a volume they belong to, see `Preprocess`; None where unknown.
        means: (K, F) of the classes.
        whitening: (F, F), the inverse Cholesky factor of the covariance within classes.
        validation: sorted scores of validation volumes, each by a fit that does not know its subject.
    """

    slices: str | None
    means: Array
    whitening: Array
    validation: tuple[float, ...]

    @classmethod
    def fit(
        cls, features: Array, labels: NDArray[np.int64], held_out: HeldOutVolumes, slices: str | None
    ) -> KnownScanners | None:
        """Fit to training and validation volumes.

        Args:
            features: (V, F) of the training volumes under their true labels.
            labels: (V,) these labels.
            held_out: the validation volumes.
            slices: which slices they are.

        Returns:
            The fit; None of fewer than 8 validation volumes, where a class has no volume, or where there are
            no more volumes than classes.
        """
        classes = held_out.features.shape[1]
        mine, truth = held_out.under(held_out.labels), held_out.labels
        everything = np.concatenate([features, mine]), np.concatenate([labels, truth])
        if len(truth) < MIN_VALIDATION or not _can_be_fitted(everything[1], classes):
            return None
        scores = np.full(len(truth), np.nan)
        fold = np.unique(np.asarray(held_out.subjects), return_inverse=True)[1] % FOLDS
        for part in np.unique(fold):
            inside = fold == part
            known = np.concatenate([labels, truth[~inside]])
            if not _can_be_fitted(known, classes):
                continue
            means, whitening = _gaussians(np.concatenate([features, mine[~inside]]), known, classes)
            own = held_out.under(held_out.predicted)[inside]
            scores[inside] = _distances(own, held_out.predicted[inside], means, whitening)
        scores = np.sort(scores[np.isfinite(scores)])
        if len(scores) < MIN_VALIDATION:
            return None
        return cls(slices, *_gaussians(*everything, classes), tuple(scores.tolist()))

    @property
    def least_p(self) -> float:
        """The smallest p-value that there can be."""
        return 1.0 / (len(self.validation) + 1)

    def score(self, features: Array, label_index: int) -> float:
        """The distance of a volume's features (F,) from the mean of a class, at least 0."""
        wanted = np.array([label_index])
        return float(_distances(features[None], wanted, self.means, self.whitening)[0])

    def p_value(self, score: float) -> float:
        """How rare so large a score is: ``(1 + r) / (n + 1)``, r of n validation scores being as large."""
        as_large = len(self.validation) - bisect.bisect_left(self.validation, score)
        return (1 + as_large) / (len(self.validation) + 1)

    def p_of_volume(
        self, slice_log_probs: Array, correlations: Array | None, grain: Array | None
    ) -> float | None:
        """The p-value of a volume; None where its features are not known or not finite.

        The predicted class is that of the highest likelihood, whatever prior and read-out decide.

        Args:
            slice_log_probs: (n, K) nats of its slices.
            correlations: (n, K, J, 2) of its slices.
            grain: (n, 6) of its slices.

        Raises:
            ValueError: the model has other latent blocks than the fit.
        """
        if correlations is None or grain is None:
            return None
        best = int(slice_log_probs.sum(axis=0).argmax())
        features = volume_features(correlations[:, best], grain)
        if features.shape != self.means.shape[1:]:
            raise ValueError(
                f"the model gives {len(features)} features of a scanner, but its metadata {KEY!r} "
                f"have {self.means.shape[1]}: train it again"
            )
        return self.p_value(self.score(features, best)) if np.isfinite(features).all() else None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_dict` is its inverse, up to rounding."""

        def rounded(values: Any) -> Any:
            return [rounded(v) for v in values] if np.ndim(values) else float(f"{values:.{DIGITS}g}")

        return {
            "format": FORMAT,
            "slices": self.slices,
            "grain": list(GRAIN_NUMBERS),
            "means": rounded(self.means),
            "whitening": rounded(self.whitening),
            "validation": rounded(self.validation),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> KnownScanners:
        """Build from `to_dict`'s form.

        Raises:
            ValueError: they are of another format, of other numbers of the grain, or are damaged.
        """
        if values.get("format") != FORMAT or values.get("grain") != list(GRAIN_NUMBERS):
            raise ValueError(
                f"{KEY} have format {values.get('format')!r} and grain {values.get('grain')!r}, "
                f"this version of fastflow reads format {FORMAT} and grain {list(GRAIN_NUMBERS)}: "
                "use the version that the model was trained with, or train it again"
            )
        try:
            means = np.asarray(values["means"], dtype=np.float64)
            whitening = np.asarray(values["whitening"], dtype=np.float64)
            validation = tuple(sorted(map(float, values["validation"])))
            slices = values["slices"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{KEY} are damaged: {error!r}") from error
        numbers = (means, whitening, np.asarray(validation))
        if means.ndim != 2 or whitening.shape != (means.shape[1],) * 2 or not validation:
            raise ValueError(f"{KEY} are damaged: means {means.shape}, whitening {whitening.shape}")
        if not all(np.isfinite(part).all() for part in numbers):
            raise ValueError(f"{KEY} are damaged: they hold numbers that are not finite")
        return cls(slices, means, whitening, validation)


def known_scanners(metadata: Mapping[str, Any]) -> KnownScanners | None:
    """The fit in a model's metadata or an export's document; None where there is none.

    Raises:
        ValueError: it is of another format, or is damaged.
    """
    values = metadata.get(KEY)
    return None if values is None else KnownScanners.from_dict(values)


def check_reject_below(reject_below: float | None, known: KnownScanners | None, slices: str) -> None:
    """Check that a limit of the p-value can flag anything.

    Args:
        reject_below: the limit; None flags nothing.
        known: of the model.
        slices: which slices of a volume are scored.

    Raises:
        ValueError: it is not in (0, 1], the model has no fit or one of other slices, or has too few
            validation volumes for so small a p-value.
    """
    if reject_below is None:
        return
    if not 0 < reject_below <= 1:
        raise ValueError(f"reject_below must lie in (0, 1], got {reject_below}")
    if known is None:
        raise ValueError(
            "reject_below needs a model that knows its scanners, and this one does not: "
            f"train it again with at least {MIN_VALIDATION} validation volumes"
        )
    if known.slices != slices:
        raise ValueError(
            f"reject_below needs the slices of training, {known.slices}, got {slices}: "
            "leave out one of the two"
        )
    if not known.least_p < reject_below:
        raise ValueError(
            f"reject_below must be above {known.least_p:.4g}, the least p-value of {len(known.validation)} "
            f"validation volumes, got {reject_below}"
        )


def scanner_flags(p_value: float | None, reject_below: float | None) -> tuple[tuple[str, str], ...]:
    """The flag of a volume whose p-value is below the limit, as (code, message)."""
    if p_value is None or reject_below is None or not p_value < reject_below:
        return ()
    return ((UNKNOWN_SCANNER, f"unlike the scanners of training, p-value {p_value:.2g}"),)


# -- the fit -------------------------------------------------------------------------------------------------


def _can_be_fitted(labels: NDArray[np.int64], classes: int) -> bool:
    """Every class has a volume, and some have more, of which a covariance can be taken."""
    return len(np.unique(labels)) == classes and len(labels) > classes


def _gaussians(features: Array, labels: NDArray[np.int64], classes: int) -> tuple[Array, Array]:
    """Means (K, F) of the classes, and the whitening (F, F) of the covariance within them."""
    means = np.stack([features[labels == k].mean(axis=0) for k in range(classes)])
    residuals = features - means[labels]
    freedom = len(labels) - classes
    deviations = np.sqrt((residuals**2).sum(axis=0) / freedom)
    scale = np.divide(1.0, deviations, out=np.zeros_like(deviations), where=deviations > LEAST_DEVIATION)
    scaled = residuals * scale
    correlation = (1.0 - SHRINKAGE) * (scaled.T @ scaled) / freedom
    # A constant feature has variance 1 here, and weight 0 in the result.
    np.fill_diagonal(correlation, 1.0)
    factor = np.linalg.cholesky(correlation)
    return means, np.linalg.solve(factor, np.diag(scale))


def _distances(features: Array, labels: NDArray[np.int64], means: Array, whitening: Array) -> Array:
    """(V,) Mahalanobis distances of features (V, F) from the means of the labels (V,)."""
    return np.asarray(np.linalg.norm((features - means[labels]) @ whitening.T, axis=1))
