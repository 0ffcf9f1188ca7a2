"""The statistics of the images that a model was trained on, and which images are unlike them.

A likelihood alone does not tell whether an image was prepared like the training data. The range of each
number of `fastflow.data.statistics` over the training and validation volumes travels with the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastflow.data.endings import is_image
from fastflow.data.statistics import CELLS, MEASURED, STATISTICS, Statistic

if TYPE_CHECKING:
    from fastflow.data.slices import SliceSet

UNLIKE_TRAINING = "unlike_training"
FORMAT = 1
# Fewer volumes than this say nothing about the range of others.
MIN_VOLUMES = 8
# A range is widened at each end by this share of its width, and by more where it comes from few volumes.
MARGIN, MARGIN_OF_FEW = 0.25, 5.0
# Layouts vary along this many patterns at most, each of which needs so many volumes.
MAX_PATTERNS, VOLUMES_PER_PATTERN = 4, 8
# The layout of each volume is compared with that of the others, in so many parts.
FOLDS = 5
# A message names so many numbers at most.
MAX_NAMED = 3
# Saved numbers have so many digits.
DIGITS = 6

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Range:
    """The values of a statistic.

    Attributes:
        seen: lowest and highest of the slices of training.
        accepted: lowest and highest that an image may have.
    """

    seen: tuple[float, float]
    accepted: tuple[float, float]


# Arrays have no equality that is true or false, so statistics are compared by their documents.
@dataclasses.dataclass(frozen=True, eq=False)
class TrainingImages:
    """The statistics of the images that a model was trained and validated on.

    Attributes:
        volumes: number of volumes (or PNG files).
        slices: which slices of them, see `Preprocess`; None where unknown.
        ranges: by name in `STATISTICS`; a statistic that no image has is missing.
        layout: (64,) mean of the layouts, brightness removed.
        patterns: (k, 64) in which layouts differ most, orthonormal.
    """

    volumes: int
    slices: str | None
    ranges: Mapping[str, Range]
    layout: Array
    patterns: Array

    @classmethod
    def of(cls, measured: Array, volumes: NDArray[np.int64], slices: str | None) -> TrainingImages | None:
        """Statistics of measured slices; None where there are fewer than 8 volumes.

        A range reaches from the lowest to the highest value of a slice, and is `widened`. The difference of a
        layout is taken from the mean and the patterns of other volumes, as that of a new image will be.

        Args:
            measured: (N, 75), see `measure`.
            volumes: (N,) the volume of each slice.
            slices: which slices they are.
        """
        numbers, group = np.unique(volumes, return_inverse=True)
        if len(numbers) < MIN_VOLUMES:
            return None
        layouts = _layouts(measured)
        difference = np.empty(len(measured))
        for fold in range(FOLDS):
            # Volumes of a class mostly follow each other, so that each part has some of every class.
            inside = group % FOLDS == fold
            difference[inside] = _difference(layouts[inside], *_patterns(layouts[~inside], len(numbers)))
        values = {name: measured[:, place] for place, name in enumerate(MEASURED)} | {"layout": difference}
        ranges = {name: _range(STATISTICS[name], value, len(numbers)) for name, value in values.items()}
        known = {name: found for name, found in ranges.items() if found is not None}
        return cls(len(numbers), slices, known, *_patterns(layouts, len(numbers)))

    @classmethod
    def of_sets(cls, sets: Iterable[SliceSet], slices: str) -> TrainingImages | None:
        """Statistics of the slices of some sets; None where they were not measured or are too few."""
        measured, volumes, before = [], [], 0
        for data in sets:
            if data.measured is None:
                return None
            measured.append(data.measured)
            volumes.append(data.volumes + before)
            before += len(data.paths)
        return cls.of(np.concatenate(measured), np.concatenate(volumes), slices) if measured else None

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_dict` is its inverse, up to rounding."""

        def rounded(values: Any) -> Any:
            return [rounded(v) for v in values] if np.ndim(values) else float(f"{values:.{DIGITS}g}")

        ranges = {
            name: {"seen": rounded(found.seen), "accepted": rounded(found.accepted)}
            for name, found in self.ranges.items()
        }
        layout = {"mean": rounded(self.layout), "patterns": rounded(self.patterns)}
        counts = {"volumes": self.volumes, "slices": self.slices}
        return {"format": FORMAT, **counts, "ranges": ranges, "layout": layout}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingImages:
        """Build from `to_dict`'s form.

        Raises:
            ValueError: they are of another format, or are damaged.
        """
        if values.get("format") != FORMAT:
            raise ValueError(
                f"statistics of the training images have format {values.get('format')!r}, "
                f"this version of fastflow reads format {FORMAT}: update fastflow"
            )
        try:
            ranges = {
                name: Range(_pair(r["seen"]), _pair(r["accepted"])) for name, r in values["ranges"].items()
            }
            mean = np.asarray(values["layout"]["mean"], dtype=np.float64).reshape(CELLS * CELLS)
            patterns = np.asarray(values["layout"]["patterns"], dtype=np.float64).reshape(-1, CELLS * CELLS)
            return cls(int(values["volumes"]), values.get("slices"), ranges, mean, patterns)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"statistics of the training images are damaged: {error!r}") from error

    def flags(self, measured: Array | None, path: str, slices: str) -> tuple[tuple[str, str], ...]:
        """The flag of an image that is unlike those of training, as (code, message); none if it is like them.

        Args:
            measured: (n, 75) of its slices, see `measure`; None where they were not measured.
            path: of the image.
            slices: which slices are taken of a volume. Where they are others than those of training, only the
                voxels of the whole volume are compared.
        """
        if measured is None:
            return ()
        same = slices == self.slices or is_image(path)
        found: list[tuple[float, str]] = []
        values = {name: measured[:, place] for place, name in enumerate(MEASURED)}
        values["layout"] = _difference(_layouts(measured), self.layout, self.patterns)
        for name, own in values.items():
            if (same or name == "negative") and name in self.ranges and name in STATISTICS:
                found += _beyond(STATISTICS[name], self.ranges[name], own)
        if not found:
            return ()
        found.sort(key=lambda one: -one[0])
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        named = ", ".join(text for _, text in found[:MAX_NAMED])
        return ((UNLIKE_TRAINING, f"unlike the training images: {named}{more}"),)


def widened(seen: tuple[float, float], volumes: int, least: float = 0.0) -> tuple[float, float]:
    """A range with a margin at each end, so that hardly any volume like those it comes from lies outside.

    The margin is ``0.25 + 5 / V`` of its width, V the number of volumes, and not less than `least`: the
    lowest and highest of a few values are still far from what can be expected.
    """
    margin = max(least, (MARGIN + MARGIN_OF_FEW / volumes) * (seen[1] - seen[0]))
    return seen[0] - margin, seen[1] + margin


def training_images(model_metadata: Mapping[str, Any]) -> TrainingImages | None:
    """The statistics in a model's metadata or an export's document; None where there are none.

    Raises:
        ValueError: they are of another format, or are damaged.
    """
    values = model_metadata.get("images")
    return None if values is None else TrainingImages.from_dict(values)


def _pair(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    return float(low), float(high)


def _range(statistic: Statistic, values: Array, volumes: int) -> Range | None:
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    seen = (float(values.min()), float(values.max()))
    low, high = widened(seen, volumes, statistic.least_margin)
    lowest, highest = statistic.ends
    return Range(seen, (lowest if statistic.is_difference else max(lowest, low), min(highest, high)))


def _beyond(statistic: Statistic, known: Range, values: Array) -> list[tuple[float, str]]:
    """How far the worst slice lies outside, in widths of the accepted range, and that in words."""
    low, high = known.accepted
    # NaN, which is no value, is outside of no range.
    excess = np.nan_to_num(np.maximum(low - values, values - high), nan=-np.inf)
    worst = int(excess.argmax())
    if not excess[worst] > 0:
        return []
    seen = " to ".join(dict.fromkeys(statistic.show(end) for end in known.seen))
    value = (
        f"{statistic.text} {statistic.show(values[worst])}{statistic.unit} (training {seen}{statistic.unit})"
    )
    return [(float(excess[worst]) / max(high - low, 1e-9), value)]


def _layouts(measured: Array) -> Array:
    """(N, 64) cells without their mean, of length 1; zeros where all cells are alike."""
    cells = np.nan_to_num(measured[:, len(MEASURED) :])
    cells = cells - cells.mean(axis=1, keepdims=True)
    return np.asarray(cells / np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-6))


def _patterns(layouts: Array, volumes: int) -> tuple[Array, Array]:
    """Mean of layouts (64,), and the patterns (k, 64) in which they differ most from it."""
    mean = layouts.mean(axis=0)
    count = min(MAX_PATTERNS, volumes // VOLUMES_PER_PATTERN)
    return mean, np.linalg.svd(layouts - mean, full_matrices=False)[2][:count]


def _difference(layouts: Array, mean: Array, patterns: Array) -> Array:
    """The length of what mean and patterns leave of each layout, (N,)."""
    rest = layouts - mean
    return np.asarray(np.linalg.norm(rest - rest @ patterns.T @ patterns, axis=1))
