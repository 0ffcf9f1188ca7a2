"""Cross-validation: a model for each fold, evaluated on what it has not seen; resumable fold by fold."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from fastflow._files import write_text
from fastflow._places import Kind, check_place, held, telling_what_stays, without_mark
from fastflow.archive.crossval_plan import TEST, Plan, Round, plan_rounds
from fastflow.archive.crossval_summary import DOCUMENT, document_of, write_all
from fastflow.archive.evaluate import evaluate
from fastflow.archive.evaluate_options import EvaluateOptions, Progress
from fastflow.archive.evaluation_files import METRICS
from fastflow.archive.model_folder import can_resume
from fastflow.archive.rows import _hash_of
from fastflow.archive.train import train_on_archive
from fastflow.archive.training_data import Reading
from fastflow.data.folds import FOLDS
from fastflow.data.listing import Listing
from fastflow.data.manifest import Record, write_manifest
from fastflow.data.slice_cache import SliceCache
from fastflow.errors import OutputFolderError, VolumeError
from fastflow.evaluation.bootstrap import RESAMPLES
from fastflow.models.checkpoint import CONFIG
from fastflow.training.config import TrainConfig
from fastflow.training.trainer import EpochRecord

FORMAT = 1
PLAN, EVALUATIONS, MANIFESTS = "plan.json", "evaluations", "folds"
KIND = Kind(
    "an earlier cross-validation",
    "a cross-validation needs a folder of its own",
    "go on with it (--resume), replace it (--overwrite) or name another folder",
)


@dataclasses.dataclass(frozen=True)
class FoldTraining:
    """How the model of a fold is trained: arguments of `train_on_archive` of the same names.

    The seed of `config` is replaced by that of each training.

    Raises:
        ValueError: `config` asks for several devices, which a single training can use.
    """

    preset: str = "demo"
    slices: str = "center"
    config: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    flow_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    application_mask: str | None = None

    def __post_init__(self) -> None:
        devices, nodes = self.config.devices, self.config.num_nodes
        if (devices or 1) * nodes > 1:
            raise ValueError(
                f"devices is {devices} on num_nodes {nodes}, but a cross-validation trains on one device: "
                "leave them out, or train single folds by `fastflow train --devices`"
            )

    def to_dict(self) -> dict[str, Any]:
        """JSON values, without the seed."""
        values = dataclasses.asdict(self) | {"flow_changes": dict(self.flow_changes)}
        del values["config"]["seed"]
        return dict(json.loads(json.dumps(values)))


@dataclasses.dataclass(frozen=True)
class CrossvalOptions:
    """How to cross-validate.

    Attributes:
        folds: how many, at least 3.
        seed: of the folds.
        seeds: of the trainings; each fold is trained with each of them. That of the folds when empty.
        keep_out: splits that are in no fold; every model is evaluated on them, apart from its fold.
        baselines: put them into the tables.
        resamples: of the bootstrap of each fold's evaluation.
        workers: processes that read files.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        resume: go on with a cross-validation that was interrupted; finished folds are kept.
        overwrite: replace an earlier cross-validation.
        lock: hold the folders.
        cache: of decoded slices, which all folds share; None decodes for each training.
        save_seconds: seconds between two states of a training, see `RunControl`.
        tensorboard: write event files of each training.
        progress: called with what is done, how much of it, and the total (None until it is known).
        on_epoch: called after each epoch.

    Raises:
        ValueError: an option does not fit; the message names it.
    """

    folds: int = FOLDS
    seed: int = 0
    seeds: tuple[int, ...] = ()
    keep_out: tuple[str, ...] = ()
    baselines: bool = True
    resamples: int = RESAMPLES
    workers: int = 1
    device: str = "auto"
    resume: bool = False
    overwrite: bool = False
    lock: bool = True
    cache: SliceCache | None = None
    save_seconds: float | None = 300.0
    tensorboard: bool = False
    progress: Progress | None = None
    on_epoch: Callable[[EpochRecord], None] | None = None

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {', '.join(map(str, self.seeds))}")
        self.evaluation(resume=True, overwrite=False)
        if self.resume and self.overwrite:
            raise ValueError("overwrite starts anew, resume goes on: give one of them")

    def evaluation(self, **changes: Any) -> EvaluateOptions:
        """The options of a fold's evaluation."""
        names = ("baselines", "resamples", "workers", "device", "lock", "progress")
        return EvaluateOptions(**{name: getattr(self, name) for name in names}, seed=self.seed, **changes)


@dataclasses.dataclass(frozen=True)
class Crossvalidation:
    """The results of a cross-validation.

    Attributes:
        folder: holds ``plan.json``, a model folder for each fold, ``folds/``, ``evaluations/``,
            ``crossval.json``, ``crossval.csv`` and ``report.html``.
        document: the content of ``crossval.json``.
        errors: of files that the trainings of this run could not use.
    """

    folder: Path
    document: dict[str, Any]
    errors: tuple[VolumeError, ...]


def cross_validate(
    files: Listing | Sequence[Record],
    out: str | PathLike[str],
    training: FoldTraining | None = None,
    options: CrossvalOptions | None = None,
) -> Crossvalidation:
    """Train and evaluate a model for each fold.

    In round i, fold i is the test, fold i + 1 validates, and the others train
    (`fastflow.data.folds.folds_of`). Splits of the files are replaced, except those of `keep_out`.

    Args:
        files: labelled ones.
        out: the folder of the models and results.
        training: how each model is trained.
        options: how to cross-validate.

    Raises:
        ManifestError: a class has fewer subjects than there are folds, a split that is kept out has no file,
            a class that the folds lack or a subject of theirs.
        OutputFolderError: `out` holds other files or an earlier cross-validation, or that one was begun with
            other files or settings.
        OSError: `out` cannot be written. Finished folds stay.
        ValueError: an option does not fit.
    """
    training, options, folder = training or FoldTraining(), options or CrossvalOptions(), Path(out)
    plan = plan_rounds(files, options.folds, options.seed, options.seeds, options.keep_out)
    identity = {
        "format": FORMAT,
        **plan.identity,
        "training": training.to_dict(),
        "baselines": options.baselines,
        "resamples": options.resamples,
    }
    errors: list[VolumeError] = []

    def check() -> None:
        if check_place(folder, KIND, without_mark(PLAN), options.resume or options.overwrite):
            before = _read(folder / PLAN)
            if options.resume:
                _compare(folder, before, identity)

    with (
        held(folder, check, options.lock),
        telling_what_stays(folder, lambda: "finished folds stay, and --resume goes on"),
    ):
        if options.overwrite:
            _clear(folder)
        write_text(folder / PLAN, json.dumps(identity, indent=1) + "\n")
        for fold, records in enumerate(plan.rounds):
            write_manifest(records, _manifest_of(folder, fold))
        evaluations = {}
        for round_ in plan.trainings:
            if not (folder / round_.name / CONFIG).exists():
                errors += _train(folder, round_, training, options)
            evaluations[round_] = _evaluated(folder, plan, round_, training, options)
        document = document_of(identity, plan, evaluations)
        write_all(folder, document)
    return Crossvalidation(folder, document, tuple(errors))


def _manifest_of(folder: Path, fold: int) -> Path:
    return folder / MANIFESTS / f"fold-{fold}.csv"


def _train(
    folder: Path, round_: Round, training: FoldTraining, options: CrossvalOptions
) -> Sequence[VolumeError]:
    """Train the model of a round, or go on with a training of it that was stopped."""
    place = folder / round_.name
    resumes = can_resume(place)

    def reading(done: int, total: int) -> None:
        if options.progress is not None:
            options.progress(f"{round_.name}: reading volumes", done, total)

    trained = train_on_archive(
        round_.records,
        place,
        training.preset,
        training.slices,
        dataclasses.replace(training.config, seed=round_.seed),
        training.flow_changes,
        training.application_mask,
        options.workers,
        options.device,
        reading=Reading(reading, options.cache),
        progress=options.on_epoch,
        resume=resumes,
        # The plan says that whatever else is there is of this cross-validation.
        overwrite=not resumes,
        lock=options.lock,
        save_seconds=options.save_seconds,
        tensorboard=options.tensorboard,
    )
    return trained.errors


def _evaluated(
    folder: Path, plan: Plan, round_: Round, training: FoldTraining, options: CrossvalOptions
) -> dict[str, Any]:
    """The evaluation of a round's model, which may be there already."""
    model, place = folder / round_.name, folder / EVALUATIONS / round_.name
    _check_model(model, training, round_)
    if (place / METRICS).exists():
        document = _read(place / METRICS)
        if document.get("model", {}).get("model_hash") != _hash_of(model / CONFIG):
            raise OutputFolderError(
                f"{model}: is another model than the one evaluated in {place}; "
                "remove one of the two folders, or begin anew (--overwrite)"
            )
        return document
    splits = (TEST, *plan.kept)
    done = evaluate(
        model, _manifest_of(folder, round_.fold), place, options.evaluation(splits=splits, resume=True)
    )
    return done.document


def _check_model(model: Path, training: FoldTraining, round_: Round) -> None:
    """Raise where the model in a round's folder was trained with another seed or other settings."""
    trained = _read(model / CONFIG).get("metadata", {}).get("training", {})
    wanted = json.loads(
        json.dumps(dataclasses.asdict(dataclasses.replace(training.config, seed=round_.seed)))
    )
    for name, value in wanted.items():
        if name in trained and trained[name] != value:
            raise OutputFolderError(
                f"{model}: was trained with {name} {trained[name]!r}, this cross-validation has {value!r}; "
                "remove that folder, or begin anew (--overwrite)"
            )


# -- the folder ----------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputFolderError(f"{path} cannot be read: {error}") from error


def _compare(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise where a cross-validation that is to be gone on with was begun otherwise."""
    flat_before, flat_now = _flat(before), _flat(now)
    for name in (*flat_now, *flat_before):
        if flat_before.get(name) != flat_now.get(name):
            raise OutputFolderError(
                f"{folder}: cannot be resumed, because {name} was {flat_before.get(name)!r} and is now "
                f"{flat_now.get(name)!r}; use another folder, or --overwrite"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in values.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return out


def _clear(folder: Path) -> None:
    """Remove an earlier cross-validation: what its plan named, and nothing else."""
    if not (folder / PLAN).exists():
        return
    names = [str(name) for name in _read(folder / PLAN).get("models", [])]
    # Whoever changed the plan must not make this remove folders elsewhere.
    for name in [*(name for name in names if os.path.basename(name) == name), EVALUATIONS, MANIFESTS]:
        if name not in ("", ".", "..") and (folder / name).is_dir():
            shutil.rmtree(folder / name)
    (folder / DOCUMENT).unlink(missing_ok=True)
