"""One run: a method, a fold and a seed, from the manifest to the document of its results."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bench.baselines.classification.networks import NETWORKS, build
from bench.baselines.classification.protocol import search, volume_probabilities
from bench.baselines.classification.results import (
    check_finished,
    run_name,
    set_document,
    versions,
    write_run,
)
from bench.baselines.classification.settings import KEPT_OUT, Settings
from bench.baselines.classification.slices import cached_slices, labelled, sets_of_fold
from bench.baselines.classification.weights import load_weights
from fastflow.archive.train import preprocess_like
from fastflow.data.listing import list_records
from fastflow.data.slices import SliceSet
from fastflow.evaluation.baselines import GrainBaseline, HistogramBaseline, ThumbnailBaseline

# These have no learning rate and no budget.
FITTED = {"histogram": HistogramBaseline, "grain": GrainBaseline, "thumbnail": ThumbnailBaseline}
SCRATCH = "scratch"

Say = Callable[[str], None]
Builder = Callable[[int, tuple[int, int]], nn.Module]


@dataclasses.dataclass(frozen=True)
class Run:
    """A classifier, and the part of an archive that it is trained on.

    Attributes:
        name: a key of `FITTED` or of `NETWORKS`.
        manifest: labelled files.
        out: folder of the results.
        fold: which fold is the test set.
        folds: how many there are.
        fold_seed: of the division into folds.
        seed: of weights, order and augmentation.
        label: column of the manifest that holds the class; its usual names when None.
        kept_out: split whose files are no part of the folds.
        size: (H, W).
        slices: see `fastflow.data.preprocess.Preprocess`.
        workers: processes that read.
        cache: folder of decoded slices; inside `out` when None.
        weights: file to start from; random weights when None.
    """

    name: str
    manifest: Path
    out: Path
    fold: int = 0
    folds: int = 5
    fold_seed: int = 0
    seed: int = 0
    label: str | None = None
    kept_out: str = KEPT_OUT
    size: tuple[int, int] = (96, 96)
    slices: str = "center"
    workers: int = 1
    cache: Path | None = None
    weights: Path | None = None

    def identity(self, settings: Settings | None) -> dict[str, Any]:
        """The fields of the document that make two runs the same run."""
        start = None
        if settings is not None:
            start = SCRATCH
        if self.weights is not None:
            digest = hashlib.sha256(self.weights.read_bytes()).hexdigest()
            start = f"{self.weights.name} {digest[:16]}"
        return {
            "method": self.name,
            "start": start,
            "manifest": self.manifest.name,
            "slices": {"size": list(self.size), "slices": self.slices},
            "fold": self.fold,
            "folds": self.folds,
            "fold_seed": self.fold_seed,
            "seed": self.seed,
            "budget": None if settings is None else dataclasses.asdict(settings.budget),
            "settings": None if settings is None else settings.to_dict(),
        }


def run(
    wanted: Run,
    settings: Settings | None,
    overwrite: bool = False,
    say: Say = lambda line: None,
    builder: Builder | None = None,
) -> Path:
    """Train and test, unless that was done before.

    Args:
        wanted: what.
        settings: how; None for a method of `FITTED`.
        overwrite: replace a finished run, also one of other settings.
        say: told about the progress.
        builder: makes the network of K classes and an image size; that of `NETWORKS` when None.

    Returns:
        The file with the document, which ``docs/rivals.md`` describes.

    Raises:
        ManifestError: see `fastflow.data.folds.folds_of`.
        OutputFolderError: a run of other settings has the same place.
        ValueError: a setting does not fit.
        ImportError: timm is not installed.
    """
    identity = wanted.identity(settings)
    start = wanted.weights.stem if wanted.weights else ""
    budget = "" if settings is None else str(settings.budget)
    path = wanted.out / run_name(wanted.name, start, budget, wanted.fold, wanted.folds, wanted.seed)
    if not overwrite and check_finished(path, identity):
        say(f"{path}: finished before")
        return path
    records = labelled(list_records(wanted.manifest, wanted.label).records)
    preprocess = preprocess_like(records, wanted.size, wanted.slices, wanted.workers)
    slices = cached_slices(records, preprocess, wanted.cache or wanted.out / "slices", wanted.workers)
    sets = sets_of_fold(slices, records, wanted.kept_out, wanted.fold, wanted.folds, wanted.fold_seed)
    tests = {name: data for name, data in sets.items() if name != "train" and len(data)}
    if settings is None:
        predictions, costs = _fit(wanted.name, sets, tests)
    else:
        make = builder or functools.partial(build, wanted.name)
        predictions, costs = _train(wanted, settings, make, sets, tests, say)
    root = wanted.manifest.resolve().parent
    document = {
        **identity,
        "class_names": list(slices.class_names),
        **costs,
        "versions": versions(),
        "train_volumes": len(sets["train"].paths),
        "sets": {name: set_document(data, predictions[name], root) for name, data in tests.items()},
    }
    write_run(path, document)
    return path


Predictions = dict[str, NDArray[np.float64]]


def _fit(
    name: str, sets: Mapping[str, SliceSet], tests: Mapping[str, SliceSet]
) -> tuple[Predictions, dict[str, Any]]:
    start, cpu = time.perf_counter(), time.process_time()
    fitted = FITTED[name]().fit(sets["train"])
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    costs = {
        "parameters": None,
        "images": len(sets["train"]),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "threads": 1,
        "learning_rate": None,
        "tried": [],
    }
    return {key: fitted.predict_proba(data) for key, data in tests.items()}, costs


def _train(
    wanted: Run,
    settings: Settings,
    make: Builder,
    sets: Mapping[str, SliceSet],
    tests: Mapping[str, SliceSet],
    say: Say,
) -> tuple[Predictions, dict[str, Any]]:
    def begin() -> nn.Module:
        model = make(len(sets["train"].class_names), wanted.size)
        if wanted.weights is not None:
            say(load_weights(model, wanted.weights, wanted.name).line())
        return model

    model, best, tried = search(begin, sets["train"], sets["val"], settings, say)
    costs = {
        "network": NETWORKS[wanted.name].text if wanted.name in NETWORKS else None,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images": best.images,
        "seconds": best.seconds,
        "cpu_seconds": best.cpu_seconds,
        "images_per_second": best.images / max(best.train_seconds, 1e-9),
        "seconds_of_all_rates": sum(each.seconds for each in tried),
        "threads": settings.threads,
        "learning_rate": best.rate,
        "tried": [each.to_dict() for each in tried],
    }
    # The test sets are looked at here for the first time.
    return {
        name: volume_probabilities(model, data, settings.precision) for name, data in tests.items()
    }, costs
