"""Evaluation of a model, or of results that `classify` made: figures with intervals, tables and a page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fastflow._places import Kind, check_place, held, telling_what_stays
from fastflow.archive.baselines import FittedBaselines, decide_by_baselines, fit_baselines
from fastflow.archive.classify import classify
from fastflow.archive.evaluate_options import EvaluateOptions
from fastflow.archive.evaluation_files import CLASSES, METRICS, REPORT, TABLE, document_of, write_all
from fastflow.archive.index import check_subjects
from fastflow.archive.names import clean_stem
from fastflow.archive.options import ONNX, pick_workers
from fastflow.archive.scored import (
    Results,
    Scored,
    decisions_of,
    is_results,
    manifest_of,
    open_results,
    read_scored,
    records_by_id,
)
from fastflow.data.listing import list_records
from fastflow.data.manifest import Record, is_manifest, write_manifest
from fastflow.data.words import split_name
from fastflow.errors import CheckpointError, ManifestError, ReadoutError, VolumeError
from fastflow.evaluation.decisions import ScoredVolumes, evaluate_decisions, figures_of_part
from fastflow.readout import GAUSSIAN, GaussianReadout, chosen_readout
from fastflow.runtime.export_folder import DOCUMENT, read_export

TRAIN, TEST, ALL = "train", "test", "all"
RESULTS, MANIFEST = "results", "manifest.csv"
OWN_NAMES = {METRICS, TABLE, CLASSES, REPORT, RESULTS, MANIFEST}
KIND = Kind(
    "an earlier evaluation",
    "an evaluation needs a folder of its own",
    "go on with it (--resume), replace it (--overwrite) or name another folder",
)
# The configuration of a model folder; `fastflow.models.checkpoint` would load torch.
CONFIG = "config.json"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluation.

    Attributes:
        folder: holds ``metrics.json``, ``metrics.csv``, ``classes.csv``, ``report.html`` and, of a model, its
            ``results/``.
        document: the content of ``metrics.json``.
        failed: rows with an error, over all splits.
    """

    folder: Path
    document: dict[str, Any]
    failed: int

    @property
    def warnings(self) -> list[str]:
        """Doubts about the figures."""
        return list(self.document["warnings"])


@dataclasses.dataclass(frozen=True)
class _Task:
    """The task of an evaluation: `source` holds results, or a model whose results go below `folder`."""

    source: Path
    is_scored: bool
    records: list[Record] | None
    manifest: str | None
    folder: Path
    options: EvaluateOptions
    warnings: list[str]


def evaluate(
    source: str | PathLike[str],
    manifest: str | PathLike[str] | None = None,
    out: str | PathLike[str] = "evaluation",
    options: EvaluateOptions | None = None,
) -> Evaluation:
    """Evaluate a model on a manifest, or results of `classify` without scoring anything again.

    Args:
        source: a model folder, an export, or a folder with results of `fastflow.archive.classify.classify`
            (also one that holds the folders of all its parts).
        manifest: a manifest, a folder of split/class/file or a BIDS dataset. For results it may be left out:
            then it is the manifest that was classified, or labels are those of the rows.
        out: the folder of the figures; for a model, also of its results.
        options: how to evaluate.

    Raises:
        ManifestError: the manifest cannot be read, a subject is in two splits, or a split has no volume that
            can be evaluated.
        CheckpointError: the folder is neither a model nor results, or the model is not usable.
        ExportError: the export is not usable.
        OutputFolderError: `out` holds other files, an earlier evaluation, or another run writes there; or the
            results cannot be read.
        JournalError: the results are damaged.
        OSError: `out` cannot be written. What was scored stays, and resume goes on.
        ValueError: an option does not fit.
    """
    options, folder, path = options or EvaluateOptions(), Path(out), Path(source)
    is_scored = _is_scored(path)
    if manifest is None and not is_scored:
        raise ValueError(f"MANIFEST is needed beside the model {source}: a manifest or folder with labels")
    if manifest is None and options.label is not None:
        raise ValueError("label names a column of a manifest: give MANIFEST too")
    results = open_results(path) if is_scored else None
    known = manifest
    if known is None and results is not None:
        known = manifest_of(results)
    warnings: list[str] = []
    records = None
    if known is not None:
        listing = list_records(known, options.label)
        records = listing.records
        warnings += listing.warnings
        check_subjects([record for record in records if record.split is not None])

    def check() -> None:
        check_place(folder, KIND, _others, options.overwrite or options.resume)

    with (
        held(folder, check, options.lock),
        telling_what_stays(folder, lambda: "what was scored stays, and --resume goes on"),
    ):
        name = None if known is None else os.path.abspath(known)
        task = _Task(path, is_scored, records, name, folder, options, warnings)
        splits = _splits(task, results)
        fitted = _fitted(task, splits, results)
        sets = {}
        failed = 0
        for split in splits:
            run = results or _score(task, split)
            scored = _scored(task, run, split)
            failed += _count_errors(scored)
            sets[split or ALL] = _evaluate_split(task, run, scored, fitted)
        if isinstance(fitted, str):
            warnings.append(f"no baseline stands beside the accuracy: {fitted}")
        document = document_of(run.settings, options, sets, fitted) | {
            "source": os.path.abspath(path),
            "manifest": name,
            "warnings": list(dict.fromkeys(warnings)),
        }
        write_all(folder, document)
    return Evaluation(folder, document, failed)


def _is_scored(path: Path) -> bool:
    if is_results(path):
        return True
    if (path / CONFIG).is_file() or (path / DOCUMENT).is_file():
        return False
    there = "there is no such folder" if not path.is_dir() else "it is none of these"
    raise CheckpointError(
        f"{path}: must be a model folder ({CONFIG}), an export ({DOCUMENT}) or a folder with results of "
        f"`fastflow classify`; {there}"
    )


def _others(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in OWN_NAMES]


# -- what is evaluated ---------------------------------------------------------------------------------------


def _splits(task: _Task, results: Results | None) -> list[str | None]:
    """The splits to be evaluated; None is all files."""
    asked = task.options.splits
    found = Counter(record.split for record in task.records or ())
    if asked:
        names = [None if name == ALL else split_name(name) for name in asked]
        there = ", ".join(f"{name or '(none)'} {count}" for name, count in found.most_common())
        for name in names:
            if name is not None and task.records is None:
                raise ManifestError(
                    f"{task.source}: no manifest says which rows are of the split {name!r}: name it"
                )
            if name is not None and name not in found:
                raise ManifestError(
                    f"{task.manifest}: no entry is in the split {name!r}; its splits are {there or 'none'}"
                )
        return list(dict.fromkeys(names))
    own = results.settings["split"] if results is not None else None
    if own is not None and own in found:
        return [own]
    if TEST in found:
        return [TEST]
    if set(found) <= {None}:
        return [None]
    if results is not None:
        task.warnings.append(
            f"rows of the splits {', '.join(map(str, found))} are evaluated together (--split)"
        )
        return [None]
    there = ", ".join(f"{name or '(none)'} {count}" for name, count in found.most_common())
    raise ManifestError(
        f"{task.manifest}: no entry is in the split 'test'; --split takes one of {there}, or all"
    )


def _score(task: _Task, split: str | None) -> Results:
    """Classify the volumes of a split by the model, or go on with that."""
    options, manifest = task.options, str(task.manifest)
    if not is_manifest(manifest) or os.path.isdir(manifest):
        # The labels of a folder or dataset are in its records alone.
        write_manifest(task.records or (), task.folder / MANIFEST)
        manifest = str(task.folder / MANIFEST)
    what = f"scoring {split or 'all files'}"
    summary = classify(
        [manifest],
        task.source,
        task.folder / RESULTS / clean_stem(split or ALL),
        batch_size=options.batch_size,
        workers=options.workers,
        device=options.device,
        split=split,
        progress=lambda done, total, errors: options.tell(what, done, total),
        precision=options.precision,
        engine=ONNX if (task.source / DOCUMENT).is_file() else options.engine,
        # An earlier run there is one of this very evaluation.
        resume=options.resume,
        overwrite=options.overwrite,
        lock=options.lock,
    )
    return open_results(summary.out)


def _scored(task: _Task, results: Results, split: str | None) -> Scored:
    by_id = None if task.records is None else records_by_id(results, task.records)
    scored = read_scored(results, by_id, split)
    if not results.finished:
        task.warnings.append(f"{results.folders[0]}: the run is not finished; its rows so far are evaluated")
    if by_id is None:
        task.warnings.append("no manifest: subjects are read from the names of the files")
    # The files of another split were not asked for.
    task.warnings.extend(
        f"left out: {line}" for line in scored.inventory.details() if not line.startswith("other_split ")
    )
    return scored


def _count_errors(scored: Scored) -> int:
    reasons = scored.inventory.left_out
    return sum(count for reason, count in reasons.items() if reason not in scored.inventory.hints)


def _fitted(task: _Task, splits: Sequence[str | None], results: Results | None) -> FittedBaselines | str:
    """The baselines, or why there are none."""
    options = task.options
    if not options.baselines:
        return "they were not asked for (--no-baselines)"
    listed, where = task.records, str(task.manifest)
    if options.train_manifest is not None:
        where = str(options.train_manifest)
        listed = list_records(where, options.label).records
    if listed is None:
        return "no manifest says which volumes are for training (--train-manifest)"
    training = [record for record in listed if record.split == TRAIN]
    if not training:
        message = f"{where} has no split 'train'"
        if options.train_manifest is not None:
            raise ManifestError(f"{message}, which the baselines learn from")
        return f"{message}; --train-manifest names another"
    if task.records is None:
        return "no manifest says where the files of the rows are: name it"
    evaluated = [record for record in task.records if None in splits or record.split in splits]
    if any(record.split == TRAIN for record in evaluated):
        return "they would be asked about volumes that they learned from"
    # A baseline that knows a subject would be flattered, and the model compared with it slighted.
    check_subjects([*training, *evaluated])
    preprocess, names = _images_of(task, results)
    return fit_baselines(training, preprocess, names, pick_workers(options.workers), options.tell)


def _images_of(task: _Task, results: Results | None) -> tuple[Any, tuple[str, ...]]:
    """(preprocessing, class names) of the model."""
    if results is not None:
        return results.preprocess, results.class_names
    from fastflow.archive.options import RunOptions
    from fastflow.archive.prepare import load_settings

    engine = ONNX if (task.source / DOCUMENT).is_file() else "auto"
    settings = load_settings(task.source, RunOptions(engine=engine, device="cpu"))
    return settings.preprocess, settings.class_names


def _readout(task: _Task, results: Results) -> GaussianReadout | None:
    """The read-out of the model that is evaluated; None where there is none for these slices."""
    if task.is_scored:
        return None
    try:
        if (task.source / DOCUMENT).is_file():
            metadata = read_export(task.source).document
        else:
            metadata = json.loads((task.source / CONFIG).read_text(encoding="utf-8")).get("metadata", {})
        return chosen_readout(GAUSSIAN, metadata, results.class_names, results.preprocess.slices)
    except ReadoutError as error:
        task.warnings.append(f"no read-out stands beside the argmax: {error}")
        return None


# -- figures -------------------------------------------------------------------------------------------------


def _evaluate_split(
    task: _Task, results: Results, scored: Scored, fitted: FittedBaselines | str
) -> dict[str, Any]:
    options, names = task.options, results.class_names
    volumes = ScoredVolumes(scored.labels, scored.subjects, names)
    decisions = decisions_of(results, scored, _readout(task, results))
    if isinstance(fitted, FittedBaselines) and scored.files is not None:
        workers = pick_workers(options.workers)
        try:
            decisions += decide_by_baselines(
                fitted, scored.files, results.preprocess, names, workers, options.tell
            )
        except VolumeError as error:
            task.warnings.append(f"no baselines: {error}")
    options.tell("intervals", 0, 1)
    document = evaluate_decisions(volumes, decisions, options.resamples, options.seed)
    flagged = np.array([bool(codes) for codes in scored.flags])
    codes = Counter(code for each in scored.flags for code in each.split(";") if code)
    parts = {"flagged": flagged, "not_flagged": ~flagged}
    document["flags"] = {"codes": dict(sorted(codes.items()))} | {
        name: figures_of_part(volumes, decisions[0], part, options.resamples, options.seed)
        for name, part in parts.items()
    }
    document["inventory"] = scored.inventory.to_dict()
    options.tell("intervals", 1, 1)
    for kind, sentence in (
        ("one_subject", "there is one subject, so that its interval says nothing"),
        ("absent", "there is no volume, and means over classes leave it out"),
    ):
        task.warnings.extend(f"class {name!r}: {sentence}" for name in document[kind])
    return document
