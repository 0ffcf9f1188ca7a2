"""The main job from end to end: archive, training, classification of held-out scans, metrics and a report."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflow import __version__
from fastflow._files import write_text
from fastflow.archive.classify import class_names as model_class_names
from fastflow.archive.classify import classify, pick_device
from fastflow.archive.distorted import Noticed, classify_distorted
from fastflow.archive.explain import explain_slice
from fastflow.archive.results import read_results
from fastflow.archive.sample import draw
from fastflow.archive.scanners import describe_scanners
from fastflow.archive.summary import Summary
from fastflow.archive.train import calibrate, describe_images
from fastflow.data.demo import SCANNERS, build_archive
from fastflow.data.demo.distortions import DISTORTIONS, Distortion
from fastflow.data.manifest import Record, class_names, write_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import SliceSet, load_slices
from fastflow.evaluation.baselines import GrainBaseline, HistogramBaseline
from fastflow.evaluation.classification import classification_metrics
from fastflow.evaluation.report import PROVENANCE, DistortedSet, TestSet, write_report
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.training.config import TrainConfig
from fastflow.training.metrics import evaluate_bits_per_dim, middle_slices
from fastflow.training.trainer import EpochRecord, train

Notify = Callable[[str, int, int], None]

SAMPLE_TEMPERATURE = 0.7

# These splits of the demo archive are tests; each has a prefix in metrics.json, a heading and a note.
TESTS = {
    "test": (
        "",
        "Unseen subjects",
        "Subjects made from the heads that the training subjects were made from; no subject is shared.",
    ),
    "unseen_head": (
        "unseen_head_",
        "Unseen head",
        "Everything made from one head that no training subject has any part of. It comes from the same "
        "study as one of the training heads, so its field of view is known, its anatomy is not.",
    ),
}


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The results of `run_demo`.

    Attributes:
        folder: holds ``archive/``, ``manifest.csv``, ``model/``, ``results/``, ``metrics.json`` and
            ``report.html``.
        metrics: the content of ``metrics.json``.
        tests: results on each test set.
        summary: of the classification.
        distorted: which distortions of held-out scans were noticed.
    """

    folder: Path
    metrics: dict[str, float]
    tests: tuple[TestSet, ...]
    summary: Summary
    distorted: tuple[Noticed, ...] = ()


def run_demo(
    out: str | PathLike[str],
    seed: int = 0,
    size: str | Mapping[str, Sequence[int]] = "demo",
    workers: int = 2,
    device: str = "auto",
    config: FlowConfig | None = None,
    training: TrainConfig | None = None,
    notify: Notify | None = None,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    distortions: Sequence[Distortion] = DISTORTIONS,
) -> DemoResult:
    """Run the whole demo on simulated scanners on real anatomy.

    Args:
        out: the folder to fill; files of an earlier run are replaced.
        seed: of the archive and of training.
        size: of the archive, see `fastflow.data.demo.build_archive`.
        workers: processes that write and read volumes.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        config: the flow; the ``demo`` preset when None.
        training: how to train; `TrainConfig.demo` when None.
        notify: called with (stage, done, total) as work proceeds.
        on_epoch: called with each epoch's record.
        distortions: done to one scan of each class in the first test set, to see which are noticed.

    Returns:
        The results; the same stand in the folder.

    Raises:
        ValueError: an argument does not fit.
    """
    start = time.perf_counter()
    say = notify or (lambda stage, done, total: None)
    folder = Path(out)
    device = pick_device(device)
    records = build_archive(
        folder / "archive", seed, size, workers, lambda done, total: say("archive", done, total)
    )
    write_manifest(records, folder / "manifest.csv")
    names = class_names(records)
    config = config or FlowConfig.demo(len(names), class_names=names)
    training = training or TrainConfig.demo(seed=seed)
    preprocess = Preprocess(config.input_shape[1:], "center+-4:2", spacing=(2.0, 2.0, 2.0))
    sets = _load_sets(records, preprocess, names, workers, say)

    torch.manual_seed(seed)
    model = MagicFlow(config)
    model.metadata["preprocess"] = preprocess.to_dict()
    model.metadata["data"] = PROVENANCE
    describe_images(model, sets)
    watch = {name: sets[name] for name in TESTS}

    def epoch_done(record: EpochRecord) -> None:
        say("training", int(record["epoch"]), training.epochs)
        if on_epoch is not None:
            on_epoch(record)

    say("training", 0, training.epochs)
    history = train(model, sets["train"], sets["val"], training, folder / "model", watch, epoch_done, device)
    calibrate(model, sets["val"], sets["train"], training.calibration_volumes, seed)
    describe_scanners(model, sets)
    model.save(folder / "model")

    held_out = [record for record in records if record.split in TESTS]
    write_manifest(held_out, folder / "held_out.csv")
    summary = classify(
        [folder / "held_out.csv"],
        folder / "model",
        folder / "results",
        batch_size=32,
        workers=workers,
        device=device,
        progress=lambda done, total, errors: say("classification", done, total or len(held_out)),
        overwrite=True,
    )
    (folder / "held_out.csv").unlink()
    tests = _evaluate(model, sets, summary)
    distorted = classify_distorted(
        first_of_each_class(held_out, next(iter(TESTS))),
        folder / "model",
        workers,
        device,
        distortions,
        lambda done, total: say("distortions", done, total),
    )
    metrics = _metrics(tests, distorted) | {"seconds": time.perf_counter() - start}
    details = _details(metrics, model, seed, device)
    _write_report(folder / "report.html", model, sets, tests, history, details, distorted)
    metrics["seconds"] = time.perf_counter() - start
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return DemoResult(folder, metrics, tuple(tests.values()), summary, tuple(distorted))


def first_of_each_class(records: Sequence[Record], split: str) -> list[str]:
    """Paths of the first record of each class in a split."""
    first: dict[str | None, str] = {}
    for record in records:
        if record.split == split:
            first.setdefault(record.label, record.path)
    return list(first.values())


def _load_sets(
    records: Sequence[Record], preprocess: Preprocess, names: Sequence[str], workers: int, say: Notify
) -> dict[str, SliceSet]:
    slices, errors = load_slices(
        records, preprocess, names, workers, lambda done: say("reading", done, len(records))
    )
    if errors:
        raise errors[0]
    split = {record.path: record.split for record in records}
    volumes: dict[str, list[int]] = {}
    for index, path in enumerate(slices.paths):
        volumes.setdefault(str(split[path]), []).append(index)
    return {name: slices.subset(members) for name, members in volumes.items()}


# -- results -------------------------------------------------------------------------------------------------


def _evaluate(model: MagicFlow, sets: Mapping[str, SliceSet], summary: Summary) -> dict[str, TestSet]:
    names = summary.class_names
    histogram, grain = HistogramBaseline().fit(sets["train"]), GrainBaseline().fit(sets["train"])
    rows = list(read_results(summary.out))
    tests = {}
    for name, (_, heading, note) in TESTS.items():
        data = sets[name]
        here = {os.path.relpath(path, Path(summary.out).parent) for path in data.paths}
        all_rows = [row for row in rows if row["path"] in here]
        mine = [row for row in all_rows if row["status"] != "error"]
        labels = np.array([names.index(row["label"]) for row in mine])
        predictions = np.array([names.index(row["predicted"]) for row in mine])
        tests[name] = TestSet(
            heading,
            classification_metrics(labels, predictions, len(names), names),
            classification_metrics(data.volume_labels, histogram.predict(data), len(names), names),
            evaluate_bits_per_dim(model, data.images, data.labels),
            note,
            sum(row["status"] != "ok" for row in all_rows) / len(all_rows),
            classification_metrics(data.volume_labels, grain.predict(data), len(names), names),
        )
    return tests


def _metrics(tests: Mapping[str, TestSet], distorted: Sequence[Noticed]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name, test in tests.items():
        prefix = TESTS[name][0]
        if test.grain is not None:
            metrics |= {
                f"{prefix}grain_accuracy": test.grain["accuracy"],
                f"{prefix}grain_balanced_accuracy": test.grain["balanced_accuracy"],
            }
        metrics |= {
            f"{prefix}accuracy": test.metrics["accuracy"],
            f"{prefix}balanced_accuracy": test.metrics["balanced_accuracy"],
            f"{prefix}histogram_accuracy": test.histogram["accuracy"],
            f"{prefix}histogram_balanced_accuracy": test.histogram["balanced_accuracy"],
            f"{prefix}bits_per_dim": test.bits_per_dim,
            f"{prefix}flagged": test.flagged or 0.0,
        }
    return metrics | {f"flagged_{one.name}": one.share for one in distorted}


def _details(metrics: Mapping[str, float], model: MagicFlow, seed: int, device: str) -> dict[str, Any]:
    return {
        "data": f"{PROVENANCE}: {len(SCANNERS)} scanners",
        "seed": seed,
        "device": torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {torch.get_num_threads()} threads",
        "seconds until this page": round(metrics["seconds"]),
        "versions": (
            f"fastflow {__version__}, torch {torch.__version__}, numpy {np.__version__}, "
            f"nibabel {version('nibabel')}, Python {platform.python_version()}"
        ),
        "epoch that was kept (best validation accuracy)": model.metadata["training"]["kept_epoch"],
        "latent temperature of the generated slices": SAMPLE_TEMPERATURE,
        "flow": model.config.to_dict(),
        "training": model.metadata["training"],
    }


# -- pictures ------------------------------------------------------------------------------------------------


def _write_report(
    path: Path,
    model: MagicFlow,
    sets: Mapping[str, SliceSet],
    tests: Mapping[str, TestSet],
    history: Sequence[EpochRecord],
    details: Mapping[str, Any],
    distorted: Sequence[Noticed],
) -> None:
    classes, shown = model.config.num_classes, 3
    images, labels = middle_slices(sets["test"])
    by_class = [np.flatnonzero(labels == k) for k in range(classes)]
    shown = min(shown, *(len(members) for members in by_class))
    real = np.stack([images[members[:shown], 0] for members in by_class])
    generated = draw(model, range(classes), 3, SAMPLE_TEMPERATURE)[:, :, 0]
    names = model_class_names(model)
    explanations = [
        explain_slice(model, images[members[0]], truth=k, name=names[k])
        for k, members in enumerate(by_class[:4])
    ]
    write_report(
        path,
        list(tests.values()),
        real,
        generated,
        explanations,
        history,
        details,
        distorted=[
            DistortedSet(
                f"{one.name.replace('_', ' ')}: {one.text}",
                one.count,
                one.share,
                ", ".join(f"{code} {count}" for code, count in sorted(one.codes.items())),
            )
            for one in distorted
        ],
    )
