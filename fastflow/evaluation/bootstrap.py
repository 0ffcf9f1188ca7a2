"""Bootstrap intervals by subject: a subject's volumes are no independent data, and are drawn together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
# A figure that is defined in a smaller share of the resamples than this has no interval.
LEAST_DEFINED = 0.5
# So many weights are in memory together.
MAX_WEIGHTS = 4_000_000

Array = NDArray[np.float64]
Figures = Callable[[Array], Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
class Resamples:
    """Resamples of the subjects of N volumes, with replacement and stratified by class.

    Each class keeps its number of subjects, since how many were scanned is a choice of the study and not
    chance; a subject with volumes of several classes counts for the first of them. Whoever iterates twice
    gets the same resamples, so that differences of two classifiers are paired.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile intervals).

    Attributes:
        subject: (N,) index of each volume's subject, in [0, S).
        strata: (S,) class of each subject.
        count: of resamples, R.
        seed: of the draws.

    Raises:
        ValueError: there is no resample, or no volume.
    """

    subject: NDArray[np.int64]
    strata: NDArray[np.int64]
    count: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"resamples must be at least 1, got {self.count}")
        if not len(self.subject):
            raise ValueError("subjects must be those of at least one volume, got none")

    @classmethod
    def of(
        cls, subjects: Sequence[str], labels: NDArray[np.int64], count: int = RESAMPLES, seed: int = 0
    ) -> Resamples:
        """Resamples of volumes.

        Args:
            subjects: N names.
            labels: (N,) classes.
            count: of resamples.
            seed: equal seeds give equal resamples, whatever the order of the volumes.
        """
        _, subject = np.unique(np.asarray(subjects, dtype=str), return_inverse=True)
        strata = np.full(int(subject.max(initial=-1)) + 1, np.iinfo(np.int64).max)
        np.minimum.at(strata, subject, labels)
        return cls(subject.astype(np.int64), strata, count, seed)

    def __iter__(self) -> Iterator[Array]:
        """How often each volume is drawn: arrays (r, N), whose r sum to R."""
        rng = np.random.default_rng(self.seed)
        size = max(1, min(self.count, MAX_WEIGHTS // len(self.subject)))
        for start in range(0, self.count, size):
            draws = np.zeros((min(size, self.count - start), len(self.strata)))
            for stratum in np.unique(self.strata):
                members = np.flatnonzero(self.strata == stratum)
                draws[:, members] = rng.multinomial(
                    len(members), np.full(len(members), 1 / len(members)), len(draws)
                )
            yield draws[:, self.subject]

    def apply(self, figures: Figures) -> dict[str, Array]:
        """The figures of all resamples, with R as their first axis."""
        parts = [figures(weights) for weights in self]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def interval(values: Array, level: float = LEVEL) -> tuple[float, float] | None:
    """The percentile interval of a figure; None where it is not defined often enough.

    Args:
        values: (R,) of the resamples, NaN where the figure is not defined.
        level: the share of the resamples between the two ends.
    """
    defined = values[np.isfinite(values)]
    if len(defined) < LEAST_DEFINED * len(values) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def estimate(value: float, values: Array, level: float = LEVEL) -> dict[str, Any]:
    """A figure with its interval as JSON values: ``value``, ``low`` and ``high``, None where not defined."""
    ends = interval(values, level) if np.isfinite(value) else None
    low, high = ends or (None, None)
    return {"value": float(value) if np.isfinite(value) else None, "low": low, "high": high}
