"""The baselines that stand beside a model's accuracy: fitted on a split, asked about scored volumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastflow.data.preprocess import Preprocess
from fastflow.data.records import Record
from fastflow.data.slices import SliceSet, load_slices
from fastflow.data.words import class_indices
from fastflow.errors import ManifestError, VolumeError
from fastflow.evaluation.baselines import GrainBaseline, HistogramBaseline, ThumbnailBaseline
from fastflow.evaluation.decisions import DecidedVolumes
from fastflow.evaluation.metrics import logs_of

Progress = Callable[[str, int, int], None]


class Baseline(Protocol):
    """A classifier of volumes that needs no model of images."""

    def fit(self, data: SliceSet) -> Any:
        """Learn from labelled volumes; raises ValueError where they are too few."""

    def predict_proba(self, data: SliceSet) -> NDArray[np.float64]:
        """(V, K) probabilities of the classes of `data`."""


# Each name is a row of every table.
BASELINES: dict[str, Callable[[], Baseline]] = {
    "histogram": HistogramBaseline,
    "grain": GrainBaseline,
    "thumbnail": ThumbnailBaseline,
}


@dataclasses.dataclass(frozen=True)
class FittedBaselines:
    """Baselines that learned from the volumes of a training split.

    Attributes:
        baselines: by name.
        missing: a sentence for each that could not be fitted.
        classes: training volumes by class.
        errors: of training volumes that could not be read, and were left out.
    """

    baselines: Mapping[str, Baseline]
    missing: Mapping[str, str]
    classes: Mapping[str, int]
    errors: tuple[VolumeError, ...]


def fit_baselines(
    records: Sequence[Record],
    preprocess: Preprocess,
    names: Sequence[str],
    workers: int = 1,
    progress: Progress | None = None,
) -> FittedBaselines:
    """Fit all of `BASELINES`.

    Args:
        records: training volumes; those of other classes than the model's are left out.
        preprocess: the model's.
        names: K class names of the model.
        workers: processes that read.
        progress: called with what is read, the number of files read and their total.

    Raises:
        ManifestError: none of the records has a class of the model.
    """
    known = _of_classes(records, names)
    if not known:
        raise ManifestError(
            f"none of the {len(records)} training files has a class of the model ({', '.join(names)}): "
            "no baseline can be fitted; name another manifest, or go on without (--no-baselines)"
        )
    data, errors = _load("training volumes of baselines", known, preprocess, names, workers, progress)
    fitted: dict[str, Baseline] = {}
    missing: dict[str, str] = {}
    for name, make in BASELINES.items():
        baseline = make()
        try:
            baseline.fit(data)
        except ValueError as error:
            missing[name] = str(error)
        else:
            fitted[name] = baseline
    counts = np.bincount(data.volume_labels, minlength=len(names))
    classes = {name: int(count) for name, count in zip(names, counts, strict=True)}
    return FittedBaselines(fitted, missing, classes, tuple(errors))


def decide_by_baselines(
    fitted: FittedBaselines,
    files: Sequence[str],
    preprocess: Preprocess,
    names: Sequence[str],
    workers: int = 1,
    progress: Progress | None = None,
) -> list[DecidedVolumes]:
    """The decisions of the fitted baselines on the volumes that a model decided on.

    Args:
        fitted: by `fit_baselines`.
        files: N paths.
        preprocess: the model's.
        names: K class names of the model.
        workers: see `fit_baselines`.
        progress: see `fit_baselines`.

    Raises:
        VolumeError: a file can no longer be read, so that rows would not be about the same volumes.
    """
    if not fitted.baselines:
        return []
    records = [Record(path, None, path) for path in files]
    data, errors = _load("volumes for baselines", records, preprocess, names, workers, progress)
    if errors:
        raise errors[0]
    return [
        DecidedVolumes(name, logs_of(baseline.predict_proba(data)))
        for name, baseline in fitted.baselines.items()
    ]


def _of_classes(records: Sequence[Record], names: Sequence[str]) -> list[Record]:
    known = class_indices(names)
    return [
        dataclasses.replace(record, label=names[known[record.label]])
        for record in records
        if record.label in known
    ]


def _load(
    what: str,
    records: Sequence[Record],
    preprocess: Preprocess,
    names: Sequence[str],
    workers: int,
    progress: Progress | None,
) -> tuple[SliceSet, list[VolumeError]]:
    def report(done: int) -> None:
        if progress is not None:
            progress(what, done, len(records))

    return load_slices(records, preprocess, names, workers, report)
