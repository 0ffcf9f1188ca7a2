"""Runs of `classify` that load a model once, or score by a matrix: for tests of what is around a model."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastflow.archive import prepare as module
from fastflow.archive.batches import local_runner
from fastflow.archive.options import RunOptions
from fastflow.archive.prepare import PreparedRun
from fastflow.archive.rows import Settings
from fastflow.data.preprocess import Preprocess

_models: dict[Any, Any] = {}
_scorers: dict[Any, Any] = {}


@contextlib.contextmanager
def _cached() -> Iterator[None]:
    """Models and scorers that are loaded from the same folder, with the same content, are the same."""
    from fastflow.models import magic_flow, scoring

    load, scorer = magic_flow.MagicFlow.load, scoring.LabelScorer

    def load_once(folder: Path, device: str = "cpu") -> Any:
        config = Path(folder) / "config.json"
        key = (str(folder), config.exists() and config.read_bytes(), device)
        if key not in _models:
            _models[key] = load(folder, device)
        return _models[key]

    def scorer_once(model: Any, precision: str, engine: str = "auto") -> Any:
        key = (id(model), precision, engine, scorer)
        if key not in _scorers:
            _scorers[key] = scorer(model, precision, engine)
        return _scorers[key]

    magic_flow.MagicFlow.load = load_once  # type: ignore[method-assign,assignment]
    scoring.LabelScorer = scorer_once  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        del magic_flow.MagicFlow.load
        magic_flow.MagicFlow.load = load  # type: ignore[method-assign]
        scoring.LabelScorer = scorer  # type: ignore[misc]


def prepare_once(folder: Path, options: RunOptions) -> PreparedRun:
    """As `fastflow.archive.prepare.prepare`, without loading anew what was loaded before."""
    with _cached():
        return module.prepare(folder, options)


class MatrixScorer:
    """A likelihood that is linear in the pixels, with sums that are exact wherever an image stands."""

    input_shape = (1, 16, 16)
    needs_full_batches = True
    # Seconds that a batch takes.
    pause = 0.0
    weights = np.random.default_rng(0).integers(-8, 9, (256, 2)).astype(np.float64)

    def score(self, images: np.ndarray) -> np.ndarray:
        time.sleep(self.pause)
        return images.reshape(len(images), -1).astype(np.float64) @ self.weights / 16.0 - 300.0

    def score_with_latents(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scores = self.score(images)
        return scores, np.zeros((*scores.shape, 1, 2))


def prepare_matrix(folder: Path, options: RunOptions) -> PreparedRun:
    """As `fastflow.archive.prepare.prepare`, with `MatrixScorer` for the model, and without PyTorch."""
    document = (Path(folder) / "config.json").read_bytes()
    preprocess = Preprocess.from_dict(json.loads(document)["metadata"]["preprocess"])
    if options.slices is not None:
        preprocess = dataclasses.replace(preprocess, slices=options.slices)
    settings = Settings(
        hashlib.sha256(document).hexdigest()[:16],
        ("flat", "striped"),
        5.0,
        None if options.prior is None else tuple(options.prior),
        preprocess,
        options.combine,
        options.id_from,
        256,
        None,
    )
    runner = local_runner(MatrixScorer(), preprocess, options.batch_size, options.num_workers)
    return PreparedRun(settings, runner, options.precision, "cpu", {})
