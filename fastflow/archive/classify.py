"""Classification of archives by likelihood: one row per input, always, durable batch by batch, however many there are."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastflow import __version__
from fastflow._files import write_text
from fastflow.archive.decode import Decoded, count_elsewhere, decode, file_state
from fastflow.archive.inputs import IDS, Inputs, Item, Shard
from fastflow.archive.journal import Done, Journal, Row, is_temporary, key_of, locked
from fastflow.archive.shards import SHARD_ROWS, Shards, check_format, found
from fastflow.data.manifest import MANIFESTS
from fastflow.data.preprocess import GREY_LEVEL, Preprocess, slice_indices
from fastflow.errors import FastflowError, ManifestError, OutputFolderError, RunStoppedError, VolumeError
from fastflow.evaluation.classification import classification_metrics
from fastflow.export.runtime import NOT_FINITE, Export, OnnxScorer, read_export
from fastflow.training.calibration import ATYPICAL, check_prior, posterior, typicality
from fastflow.training.calibration import margin as margin

if TYPE_CHECKING:
    from fastflow.models.magic_flow import MagicFlow
    from fastflow.models.scoring import LabelScorer

RUN, JOURNAL, SUMMARY, LOCK = "run.json", "journal.jsonl", "summary.json", ".lock"
STATUSES = ("ok", "flagged", "error")
COMBINE = ("sum", "mean")
RAY, ONNX = "ray", "onnx"

# Codes of rows beside those of `fastflow.data.volume`: errors first, then the flag.
CODES = {
    "likelihood": NOT_FINITE,
    "worker": "the process that was reading the file died",
    "timeout": "the file could not be read in time",
    "atypical": f"the typicality p-value is below {ATYPICAL}: the image is unlike the model's validation data",
}

# Inputs that are counted by a thread. More would keep Python's lock from the one that scores.
FEW = 2000

# Longer than any axis: how many slices a specification asks for does not depend on the volume.
MANY = 1 << 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run's rows depend on, beside the files. A run is only resumed with equal ones.

    Attributes:
        model_hash: of the model's ``config.json``, which names the hash of its weights.
        class_names: K names.
        temperature: of the posterior.
        prior: (K,) probabilities, None for uniform ones.
        preprocess: the model's, with this run's slices.
        combine: ``"sum"`` or ``"mean"`` of the slices' log-likelihoods.
        id_from: see `Item.id`.
        dims: D, elements of an image.
        validation: sorted log-likelihoods a slice of validation volumes under their predicted label, None where unknown.
    """

    model_hash: str
    class_names: tuple[str, ...]
    temperature: float
    prior: tuple[float, ...] | None
    preprocess: Preprocess
    combine: str
    id_from: str
    dims: int
    validation: tuple[float, ...] | None

    @property
    def constant(self) -> dict[str, Any]:
        """Columns that are the same in every row."""
        prior = "uniform" if self.prior is None else " ".join(f"{p:.10g}" for p in self.prior)
        return {"temperature": self.temperature, "prior": prior, "model_hash": self.model_hash}


@dataclasses.dataclass(frozen=True)
class Scored:
    """An input that went through the model, or did not.

    Attributes:
        item: the input.
        size: see `Decoded`.
        mtime_ns: see `Decoded`.
        flags: see `Decoded`.
        result: (n, K) nats of its slices, or why there are none.
        seconds: of reading and scoring.
    """

    item: Item
    size: int
    mtime_ns: int
    flags: tuple[tuple[str, str], ...]
    result: NDArray[np.float64] | VolumeError
    seconds: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run's folder holds after it.

    Attributes:
        out: the folder.
        files: the result files.
        counts: rows by status.
        codes: rows by error or flag code.
        class_names: K names.
        confusion: (K, K) rows of a known label (first axis) by predicted label.
        new: rows of this run, the others were there before it.
        seconds: of this run.
        rates: of this run, see ``summary.json``.
        errors: the first errors of this run.
    """

    out: str
    files: tuple[str, ...]
    counts: dict[str, int]
    codes: dict[str, int]
    class_names: tuple[str, ...]
    confusion: NDArray[np.int64]
    new: int
    seconds: float
    rates: dict[str, Any]
    errors: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        """Number of inputs that could not be used."""
        return self.counts["error"]

    def labelled(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(labels, predictions) of the inputs that were classified and whose label the model knows, sorted."""
        label, predicted = np.indices(self.confusion.shape).reshape(2, -1)
        counts = self.confusion.reshape(-1)
        return np.repeat(label, counts), np.repeat(predicted, counts)


def classify(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    prior: Sequence[float] | None = None,
    batch_size: int = 16,
    workers: int | None = None,
    device: str = "auto",
    split: str | None = None,
    progress: Callable[[int, int | None, int], None] | None = None,
    precision: str = "float32",
    engine: str = "auto",
    *,
    manifest: str | PathLike[str] | None = None,
    shard: str | Shard | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    overwrite: bool = False,
    on_error: str = "row",
    max_errors: int | None = None,
    format: str = "csv",
    id_from: str = "relpath",
    slices: str | None = None,
    combine: str = "sum",
    shard_rows: int = SHARD_ROWS,
) -> Summary:
    """Classify files and write one row per input into ``out/results-00000.csv`` and so on.

    ``docs/archives.md`` tells the columns, the codes and the files of the folder. A bad file costs an error row and changes no
    other row. Every batch is made durable in ``out/journal.jsonl`` before the next one is scored.

    Args:
        inputs: files, folders, BIDS datasets, manifests; see `fastflow.archive.inputs.Inputs`.
        model_folder: a model that was trained here, so that it knows its preprocessing; of engine ``"onnx"`` an export of one.
        out: the folder of the results; with `shard` a folder of the part's name in it.
        prior: (K,) probabilities of the labels; uniform when None.
        batch_size: slices per pass.
        workers: processes that read files; as many as half of the cores, up to 8, when None.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        split: take only this split of manifests.
        progress: called with the number of inputs done, their total (None until they are counted) and the errors among them.
        precision: see `fastflow.models.scoring.LabelScorer`; an export has its own, which ``"float32"`` leaves as it is.
        engine: see `fastflow.models.scoring.LabelScorer`; ``"compile"`` pays from thousands of slices on. ``"ray"`` spreads the
            work over a Ray cluster. ``"onnx"`` runs an export by ONNX Runtime, without PyTorch.
        manifest: one more input, which must be a manifest.
        shard: ``"i/N"``: only the i-th of N parts.
        resume: go on with a run that was interrupted; inputs that have a row and have not changed since are passed over.
        retry_failed: resume, and do the error rows again; their new rows come last.
        overwrite: replace the results of an earlier run.
        on_error: ``"row"``, or ``"fail"`` to stop at the first error row.
        max_errors: stop after more error rows than this.
        format: ``"csv"`` or ``"parquet"``.
        id_from: what stands for an input in the results: ``"relpath"`` or ``"hash"``, see `fastflow.archive.inputs.Item`.
        slices: which slices of a volume, see `Preprocess`; the model's own when None.
        combine: ``"sum"`` of the slices' log-likelihoods (slices independent given the label), or their ``"mean"``.
        shard_rows: rows of a result file.

    Raises:
        ManifestError: the inputs name nothing.
        CheckpointError: the model folder is not usable.
        ExportError: the export folder is not usable.
        OutputFolderError: the output folder is another run's, or holds anything and neither `resume` nor `overwrite` is set.
        ValueError: an argument does not fit; the message names it.
        RunStoppedError: there were more errors than allowed. The rows stay, and the run can be resumed.
        JournalError: the journal to be resumed is damaged.
        OSError: results cannot be written, such as on a full disk. What was written stays, and the run can be resumed.
        RuntimeError: ``engine="compile"`` without a C++ compiler.
    """
    if overwrite and (resume or retry_failed):
        raise ValueError("overwrite starts anew, resume and retry_failed go on: give one of them")
    limit = _error_limit(on_error, max_errors)
    _check(batch_size=batch_size, shard_rows=shard_rows)
    check_format(format)
    sources = _inputs(inputs, manifest, split, shard)
    workers = pick_workers(workers)
    choices = _Choices(model_folder, prior, slices, combine, id_from, batch_size, workers, precision, engine, device)
    prepared = _prepare_export(choices) if engine == ONNX else _prepare_model(choices)
    settings = prepared.settings
    # Inputs that name nothing are told before a folder is made.
    sources.check()
    folder = Path(out) / sources.shard.folder if sources.shard else Path(out)
    identity = _identity(sources, settings, prepared.precision, format, shard_rows)
    resume = resume or retry_failed
    new = _prepare(folder, identity, resume, overwrite)
    try:
        with locked(folder):
            # Once more: another run may have come and gone before the lock was taken.
            _prepare(folder, identity, resume, overwrite)
            if not resume:
                _clear(folder)
            write_text(folder / RUN, json.dumps(identity, indent=1) + "\n")
            journal = Journal.open(folder / JOURNAL)
            if retry_failed:
                _forget(folder, journal, lambda key, row: row["status"] != "error")
            shards = Shards(folder, journal, settings.class_names, settings.constant, format, shard_rows)
            shards.add(journal.ends())
            new = False
            details = {"device": prepared.device, "workers": workers, "batch_size": batch_size, "engine": engine} | identity
            run = _Run(folder, settings, sources, journal, shards, limit, progress, details, prepared.versions)
            return run.go(prepared.run)
    finally:
        if new:
            _remove(folder)


def _error_limit(on_error: str, max_errors: int | None) -> float:
    if on_error not in ("row", "fail"):
        raise ValueError(f"on_error must be row or fail, got {on_error!r}")
    if max_errors is not None and max_errors < 0:
        raise ValueError(f"max_errors must not be negative, got {max_errors}")
    return 0 if on_error == "fail" else math.inf if max_errors is None else max_errors


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _inputs(
    inputs: Iterable[str | PathLike[str]], manifest: str | PathLike[str] | None, split: str | None, shard: str | Shard | None
) -> Inputs:
    sources = [os.fspath(path) for path in inputs]
    if manifest is not None:
        if not os.fspath(manifest).endswith(MANIFESTS):
            raise ManifestError(f"{manifest}: a manifest ends in .csv or .jsonl")
        sources.append(os.fspath(manifest))
    return Inputs(tuple(sources), split, Shard.parse(shard) if isinstance(shard, str) else shard)


def pick_workers(workers: int | None) -> int:
    """The number of reading processes that None means here.

    Raises:
        ValueError: it is less than 1.
    """
    if workers is None:
        return max(1, min(8, (os.cpu_count() or 1) // 2))
    _check(workers=workers)
    return workers


def pick_device(name: str) -> str:
    """The device that ``"auto"`` means here.

    Raises:
        ValueError: the name is none of the accepted ones, or there is no such device.
    """
    import torch

    _check_device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


def _check_device(name: str) -> None:
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")


def class_names(model: MagicFlow) -> tuple[str, ...]:
    """The model's class names, or "0" to "K-1"."""
    return model.config.class_names or tuple(str(k) for k in range(model.config.num_classes))


def preprocess_of(model: MagicFlow) -> Preprocess:
    """How the model's training data were prepared.

    Raises:
        FastflowError: the model does not know.
    """
    if "preprocess" not in model.metadata:
        raise FastflowError(
            "the model does not say how its images were prepared: set model.metadata['preprocess'] = Preprocess(...).to_dict() "
            "and save it again"
        )
    return Preprocess.from_dict(model.metadata["preprocess"])


@dataclasses.dataclass(frozen=True)
class _Choices:
    """Arguments of `classify` that its rows or its scorer depend on."""

    folder: str | PathLike[str]
    prior: Sequence[float] | None = None
    slices: str | None = None
    combine: str = "sum"
    id_from: str = "relpath"
    batch_size: int = 16
    workers: int = 1
    precision: str = "float32"
    engine: str = "auto"
    device: str = "auto"


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A run that could begin: what it depends on, and what does it."""

    settings: Settings
    run: Runner
    precision: str
    device: str
    versions: dict[str, str]


def _prepare_model(choices: _Choices) -> _Prepared:
    from fastflow.models.magic_flow import MagicFlow

    model = MagicFlow.load(choices.folder, pick_device(choices.device))
    settings = _settings_of_model(model, choices)
    run = _runner(model, choices, settings.preprocess)
    return _Prepared(settings, run, choices.precision, str(model.device), {"torch": version("torch")})


def _prepare_export(choices: _Choices) -> _Prepared:
    export = read_export(choices.folder)
    settings = _settings_of_export(export, choices)
    _check_device(choices.device)
    if choices.precision not in ("float32", export.precision):
        raise ValueError(
            f"precision {choices.precision!r} was asked for, but {choices.folder} was exported in {export.precision}: "
            f"export the model with --precision {choices.precision}"
        )
    scorer = OnnxScorer(choices.folder, choices.device)
    run = _local_runner(scorer, settings.preprocess, choices)
    return _Prepared(settings, run, export.precision, scorer.device, {"onnxruntime": scorer.version})


def _settings_of_model(model: MagicFlow, choices: _Choices) -> Settings:
    from fastflow.models.checkpoint import CONFIG

    validation = model.metadata.get("validation") or {}
    return _settings(
        choices,
        Path(choices.folder) / CONFIG,
        class_names(model),
        model.temperature,
        preprocess_of(model),
        model.config.num_dims,
        tuple(validation.get("log_prob") or ()),
        validation.get("slices"),
    )


def _settings_of_export(export: Export, choices: _Choices) -> Settings:
    return _settings(
        choices,
        export.path,
        export.class_names,
        export.temperature,
        export.own_preprocess,
        export.dims,
        export.validation or (),
        export.validation_slices,
    )


def _settings(
    choices: _Choices,
    document: Path,
    names: tuple[str, ...],
    temperature: float,
    own: Preprocess,
    dims: int,
    validation: tuple[float, ...],
    validation_slices: str | None,
) -> Settings:
    for name, value, accepted in (("combine", choices.combine, COMBINE), ("id_from", choices.id_from, IDS)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
    # A prior of the wrong length must not wait for the first volume.
    prior = None if choices.prior is None else tuple(check_prior(choices.prior, len(names)).tolist())
    preprocess = own if choices.slices is None else dataclasses.replace(own, slices=choices.slices)
    # Other slices have other likelihoods.
    comparable = validation and validation_slices == preprocess.slices
    return Settings(
        hashlib.sha256(document.read_bytes()).hexdigest()[:16],
        names,
        temperature,
        prior,
        preprocess,
        choices.combine,
        choices.id_from,
        dims,
        validation if comparable else None,
    )


def _identity(sources: Inputs, settings: Settings, precision: str, format: str, shard_rows: int) -> dict[str, Any]:
    """What must be equal where a run goes on, as JSON values."""
    fields = dataclasses.asdict(settings)
    # The model's hash covers it.
    del fields["validation"]
    return {
        "inputs": [os.path.abspath(source) for source in sources.sources],
        "split": sources.split,
        "shard": str(sources.shard) if sources.shard else None,
        **json.loads(json.dumps(fields | {"preprocess": settings.preprocess.to_dict()})),
        "precision": precision,
        "format": format,
        "shard_rows": shard_rows,
    }


# -- the output folder ----------------------------------------------------------------------------------------------------


def _prepare(folder: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    """See to it that the folder can be written into. Returns whether it was made for this run."""
    if not folder.exists():
        folder.mkdir(parents=True)
        return True
    if not folder.is_dir():
        raise OutputFolderError(f"{folder}: must be a folder, it is a file")
    here = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not is_temporary(path.name))
    if here and not (folder / RUN).exists():
        raise OutputFolderError(f"{folder}: holds other files, such as {here[0]!r}; results need a folder of their own")
    if here and resume:
        _compare(folder, identity)
    elif here and not overwrite:
        raise OutputFolderError(f"{folder}: holds an earlier run; go on with it (--resume) or replace it (--overwrite)")
    return False


def _compare(folder: Path, identity: dict[str, Any]) -> None:
    try:
        before = dict(json.loads((folder / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputFolderError(f"{folder / RUN} cannot be read: {error}") from error
    for name, value in identity.items():
        if before.get(name) != value:
            raise OutputFolderError(
                f"{folder}: cannot be resumed, because {name} was {before.get(name)!r} and is now {value!r}; "
                "use another folder, or --overwrite"
            )


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run: results before the journal that they are of, last what says whose folder it is."""
    for path in [*found(folder), folder / SUMMARY, folder / JOURNAL, folder / RUN]:
        path.unlink(missing_ok=True)


def _remove(folder: Path) -> None:
    _clear(folder)
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def _forget(folder: Path, journal: Journal, wanted: Callable[[bytes, Row], bool]) -> None:
    """Take rows back. The result files go first: they are made again from whatever the journal then holds."""
    for path in found(folder):
        path.unlink()
    journal.keep(wanted)


# -- the run --------------------------------------------------------------------------------------------------------------

Runner = Callable[[Iterator[Item], "Clock"], Generator[list[Scored], None, None]]


@dataclasses.dataclass
class Clock:
    """Where the time of a run goes, in seconds.

    Attributes:
        reading: of all reading processes together.
        waiting: of the model, for files.
        scoring: in the model.
        writing: of the journal and the result files.
    """

    reading: float = 0.0
    waiting: float = 0.0
    scoring: float = 0.0
    writing: float = 0.0


def _runner(model: MagicFlow, choices: _Choices, preprocess: Preprocess) -> Runner:
    if choices.engine == RAY:
        from fastflow.archive.ray_runner import ray_runner

        return ray_runner(choices.folder, preprocess, choices.batch_size, choices.workers, choices.precision, choices.device)
    from fastflow.models.scoring import LabelScorer

    return _local_runner(LabelScorer(model, choices.precision, choices.engine), preprocess, choices)


def _local_runner(scorer: LabelScorer | OnnxScorer, preprocess: Preprocess, choices: _Choices) -> Runner:
    def run(items: Iterator[Item], clock: Clock) -> Generator[list[Scored], None, None]:
        # Two batches ahead of the model, so that it does not wait for files that could be read in time.
        ahead = 2 * choices.batch_size // len(slice_indices(preprocess.slices, MANY))
        decoded = decode(items, preprocess, choices.workers, ahead)
        with contextlib.closing(decoded):
            yield from score_batches(scorer, timed(decoded, clock), preprocess, choices.batch_size, clock)

    return run


def timed(decoded: Iterator[Decoded], clock: Clock) -> Iterator[Decoded]:
    """The same, with the time that getting each one takes put down."""
    while True:
        start = time.perf_counter()
        one = next(decoded, None)
        clock.waiting += time.perf_counter() - start
        if one is None:
            return
        clock.reading += one.seconds
        yield one


def score_batches(
    scorer: LabelScorer | OnnxScorer, decoded: Iterable[Decoded], preprocess: Preprocess, batch_size: int, clock: Clock
) -> Iterator[list[Scored]]:
    """Score inputs by batches of `batch_size` slices; an input's slices stay together."""
    each = len(slice_indices(preprocess.slices, MANY))
    chunk: list[tuple[Decoded, int]] = []
    used = 0
    for one in decoded:
        slots = 1 if one.item.path.lower().endswith(".png") else each
        if chunk and used + slots > batch_size:
            yield _score(scorer, chunk, batch_size, clock)
            chunk, used = [], 0
        chunk.append((one, slots))
        used += slots
    if chunk:
        yield _score(scorer, chunk, batch_size, clock)


def _score(scorer: LabelScorer | OnnxScorer, chunk: Sequence[tuple[Decoded, int]], batch_size: int, clock: Clock) -> list[Scored]:
    """One batch. A file has its slots in it whether it can be read or not, and every batch is full: the last bits of a sum may
    depend on the place in the batch, so a bad file must not move another's slices. Images that go one by one need no filling.
    """
    begin = time.perf_counter()
    starts = np.cumsum([0, *(slots for _, slots in chunk)])
    shape, log_probs = _functions(scorer)
    alone = isinstance(scorer, OnnxScorer) and scorer.buckets == (1,)
    images = np.zeros((max(0 if alone else batch_size, int(starts[-1])), *shape), dtype=np.uint8)
    for start, (one, slots) in zip(starts, chunk, strict=False):
        if not isinstance(one.result, VolumeError):
            images[start : start + slots] = one.result
    good = [not isinstance(one.result, VolumeError) for one, _ in chunk]
    scores = log_probs(images) if any(good) else np.zeros((len(images), 0))
    seconds = time.perf_counter() - begin
    clock.scoring += seconds
    share = seconds / max(1, sum(good))
    return [
        Scored(
            one.item,
            one.size,
            one.mtime_ns,
            one.flags,
            one.result if isinstance(one.result, VolumeError) else scores[start : start + slots],
            one.seconds + (0.0 if isinstance(one.result, VolumeError) else share),
        )
        for start, (one, slots) in zip(starts, chunk, strict=False)
    ]


def _functions(
    scorer: LabelScorer | OnnxScorer,
) -> tuple[tuple[int, ...], Callable[[NDArray[np.uint8]], NDArray[np.float64]]]:
    """The shape of a scorer's images, and what scores them, all in one call."""
    if isinstance(scorer, OnnxScorer):
        return scorer.input_shape, partial(_score_by_export, scorer)
    from fastflow.models.scoring import score_slices

    return scorer.model.config.input_shape, lambda images: score_slices(scorer, images, len(images))


def _score_by_export(scorer: OnnxScorer, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    try:
        return scorer.score(images)
    except RuntimeError as error:
        raise RunStoppedError(f"{error}. The rows so far are kept; --resume goes on") from error


def make_row(scored: Scored, settings: Settings) -> Row:
    """The journal's row of an input."""
    row: Row = {
        "path": scored.item.id(settings.id_from),
        "size": scored.size,
        "mtime_ns": scored.mtime_ns,
        "label": scored.item.label,
        "seconds": round(scored.seconds, 6),
    }
    result = scored.result
    if not isinstance(result, VolumeError) and not np.isfinite(result).all():
        result = VolumeError(scored.item.path, "likelihood", CODES["likelihood"])
    if isinstance(result, VolumeError):
        return row | {"status": "error", "error_code": result.code, "error_message": result.message}
    log_probs = result.sum(axis=0) if settings.combine == "sum" else result.mean(axis=0)
    probabilities = posterior(log_probs, settings.temperature, settings.prior)
    best = int(probabilities.argmax())
    each = float(result[:, best].mean())
    flags, p_value = list(scored.flags), None
    if settings.validation is not None:
        p_value = typicality(each, settings.validation)
        if p_value < ATYPICAL:
            flags.append(("atypical", f"typicality p-value {p_value:.2g}"))
    return row | {
        "status": "flagged" if flags else "ok",
        "error_code": ";".join(code for code, _ in flags) or None,
        "error_message": "; ".join(message for _, message in flags) or None,
        "predicted": settings.class_names[best],
        "margin": margin(log_probs, settings.temperature, settings.prior),
        "bits_per_dim": -(each / settings.dims + math.log(GREY_LEVEL)) / math.log(2.0),
        "typicality": p_value,
        "logp": log_probs.tolist(),
        "posterior": probabilities.tolist(),
    }


class _Run:
    """A run over an archive into a folder that it holds."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        sources: Inputs,
        journal: Journal,
        shards: Shards,
        limit: float,
        progress: Callable[[int, int | None, int], None] | None,
        details: dict[str, Any],
        versions: dict[str, str],
    ) -> None:
        self.folder, self.settings, self.sources, self.journal, self.shards = folder, settings, sources, journal, shards
        self.limit, self.progress, self.details, self.versions = limit, progress, details, versions
        self.done = Done(journal.keys())
        self.total: int | None = None
        self.clock = Clock()
        self.new = self.old = self.failed = 0
        self.errors: list[str] = []
        self.start = time.perf_counter()

    def go(self, run: Runner) -> Summary:
        if self.progress is not None:
            threading.Thread(target=self._count, daemon=True).start()
        batches = run(self._left(), self.clock)
        try:
            with contextlib.closing(batches):
                for batch in batches:
                    self._write(batch)
        except RunStoppedError:
            self._finish("stopped")
            raise
        self._drop_stale()
        return self._finish("finished")

    def _count(self) -> None:
        """Beside the run, so that a listing that takes minutes does not delay it."""
        # What is wrong with the inputs is for the run itself to tell.
        with contextlib.suppress(Exception):
            if (few := sum(1 for _ in itertools.islice(self.sources, FEW))) < FEW:
                self.total = few
            else:
                self.total = count_elsewhere(self.sources)

    def _left(self) -> Iterator[Item]:
        """The inputs that have no row yet."""
        known = self.journal.size > 0
        for item in self.sources:
            if known and self.done.take(self._key(item.path, *file_state(item.path))):
                self.old += 1
                self._tell()
            else:
                yield item

    def _key(self, path: str, size: int, mtime_ns: int) -> bytes:
        return key_of(path, size, mtime_ns, self.settings.model_hash)

    def _write(self, batch: Sequence[Scored]) -> None:
        rows = [make_row(scored, self.settings) for scored in batch]
        begin = time.perf_counter()
        keys = [self._key(scored.item.path, scored.size, scored.mtime_ns) for scored in batch]
        self.shards.add(self.journal.append(zip(keys, rows, strict=True)))
        self.clock.writing += time.perf_counter() - begin
        for scored, row in zip(batch, rows, strict=True):
            self.new += 1
            if row["status"] == "error":
                self.failed += 1
                if len(self.errors) < 20:
                    shown = scored.item.path if self.settings.id_from == "relpath" else row["path"]
                    self.errors.append(f"{shown}: {row['error_message']} [{row['error_code']}]")
        self._tell()
        if self.failed > self.limit:
            raise RunStoppedError(
                f"{self.failed} inputs failed, more than the {self.limit:.0f} allowed; the last: {self.errors[-1]}. "
                f"The rows so far are in {self.folder}; --resume goes on"
            )

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.old + self.new, self.total, self.failed)

    def _drop_stale(self) -> None:
        """Rows of files that have changed since, or are no longer there."""
        left = self.done.left()
        if not left:
            return

        def wanted(key: bytes, row: Row) -> bool:
            if left.get(key, 0) == 0:
                return True
            left[key] -= 1
            return False

        _forget(self.folder, self.journal, wanted)
        self.shards = dataclasses.replace(self.shards, done=0, start=0, waiting=0)
        self.shards.add(self.journal.ends())

    def _finish(self, state: str) -> Summary:
        begin = time.perf_counter()
        files = self.shards.finish()
        self.clock.writing += time.perf_counter() - begin
        counts, codes, confusion = tally(self.journal, self.settings.class_names)
        seconds = time.perf_counter() - self.start
        names = self.settings.class_names
        summary = Summary(
            str(self.folder),
            tuple(map(str, files)),
            counts,
            codes,
            names,
            confusion,
            self.new,
            seconds,
            self._rates(seconds),
            tuple(self.errors),
        )
        write_text(self.folder / SUMMARY, json.dumps(self._document(summary, state), indent=1) + "\n")
        return summary

    def _rates(self, seconds: float) -> dict[str, Any]:
        def rate(time: float) -> float | None:
            return round(self.new / time, 3) if self.new and time > 0 else None

        clock = self.clock
        shares = {"reading": clock.waiting, "scoring": clock.scoring, "writing": clock.writing}
        return {
            "files_per_second": rate(seconds),
            "reading_files_per_second": rate(clock.reading / self.details["workers"]),
            "scoring_files_per_second": rate(clock.scoring),
            "writing_files_per_second": rate(clock.writing),
            "seconds_of_the_model": {name: round(value, 3) for name, value in shares.items()},
            "bound_by": max(shares, key=lambda name: shares[name]) if self.new else None,
        }

    def _document(self, summary: Summary, state: str) -> dict[str, Any]:
        labels, predictions = summary.labelled()
        names = summary.class_names
        return {
            "state": state,
            "rows": summary.total,
            "rows_of_this_run": summary.new,
            "status": summary.counts,
            "codes": summary.codes,
            "files": [Path(file).name for file in summary.files],
            "accuracy": classification_metrics(labels, predictions, len(names), names) if len(labels) else None,
            "seconds": round(summary.seconds, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "rates": summary.rates,
            # Scores are computed, not drawn.
            "seed": None,
            "versions": {
                "fastflow": __version__,
                "python": platform.python_version(),
                **self.versions,
                **{name: version(name) for name in ("numpy", "nibabel")},
            },
            "configuration": self.details,
        }


def tally(journal: Journal, names: Sequence[str]) -> tuple[dict[str, int], dict[str, int], NDArray[np.int64]]:
    """(rows by status, rows by code, (K, K) rows by known label and predicted one) of a journal."""
    known = {name: k for k, name in enumerate(names)}
    counts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    for _, row in journal.read():
        counts[row["status"]] += 1
        codes.update((row.get("error_code") or "").split(";") if row.get("error_code") else ())
        if row["status"] != "error" and row["label"] in known:
            confusion[known[row["label"]], known[row["predicted"]]] += 1
    return {status: counts[status] for status in STATUSES}, dict(sorted(codes.items())), confusion


# -- before and after -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        total: inputs.
        bytes: of the files.
        kinds: inputs by ending of their name.
        missing: inputs that are no file.
        first: paths of the first inputs.
        class_names: of the model.
        slices: which slices of a volume.
    """

    total: int
    bytes: int
    kinds: dict[str, int]
    missing: int
    first: tuple[str, ...]
    class_names: tuple[str, ...]
    slices: str


def plan(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    *,
    manifest: str | PathLike[str] | None = None,
    split: str | None = None,
    shard: str | Shard | None = None,
    slices: str | None = None,
    engine: str = "auto",
) -> Plan:
    """List the inputs and load the model, as `classify` would, and write nothing.

    Raises:
        ManifestError: the inputs name nothing.
        CheckpointError: the model folder is not usable.
        ExportError: the export folder is not usable.
        ValueError: an argument does not fit.
    """
    choices = _Choices(model_folder, slices=slices, device="cpu")
    if engine == ONNX:
        settings = _prepare_export(choices).settings
    else:
        from fastflow.models.magic_flow import MagicFlow

        settings = _settings_of_model(MagicFlow.load(model_folder), choices)
    total = size = missing = 0
    kinds: Counter[str] = Counter()
    first: list[str] = []
    for item in _inputs(inputs, manifest, split, shard):
        total += 1
        bytes_here, _ = file_state(item.path)
        size += max(0, bytes_here) if os.path.isfile(item.path) else 0
        missing += not os.path.isfile(item.path)
        name = os.path.basename(item.path)
        kinds[".nii.gz" if name.endswith(".nii.gz") else os.path.splitext(name)[1] or "(none)"] += 1
        if len(first) < 5:
            first.append(item.path)
    return Plan(total, size, dict(sorted(kinds.items())), missing, tuple(first), settings.class_names, settings.preprocess.slices)


def parse_prior(text: str | None) -> list[float] | None:
    """Numbers separated by commas.

    Raises:
        ValueError: they are not numbers.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"prior must be numbers separated by commas, got {text!r}") from None


def describe(summary: Summary) -> str:
    """The outcome of a run in a few lines: counts, and accuracy with per-class recall where labels are known."""
    counts = summary.counts
    flagged = f" ({counts['flagged']} flagged)" if counts["flagged"] else ""
    lines = [
        f"{summary.out}: {summary.total} inputs, {summary.total - summary.failed} classified{flagged}, {summary.failed} failed"
    ]
    if summary.new < summary.total:
        lines.append(f"{summary.total - summary.new} of them were there before this run")
    if summary.codes:
        lines.append(", ".join(f"{code} {count}" for code, count in summary.codes.items()))
    rates = summary.rates
    if rates["bound_by"]:
        parts = [f"{name} {rates[f'{name}_files_per_second'] or math.inf:.3g}/s" for name in ("reading", "scoring", "writing")]
        lines.append(f"{rates['files_per_second']:.3g} inputs/s ({', '.join(parts)}; bound by {rates['bound_by']})")
    labels, predictions = summary.labelled()
    if len(labels):
        metrics = classification_metrics(labels, predictions, len(summary.class_names), summary.class_names)
        lines.append(f"accuracy {metrics['accuracy']:.3f}, balanced {metrics['balanced_accuracy']:.3f} ({len(labels)} labelled)")
        recalls = {name: recall for name, recall in metrics["per_class_recall"].items() if recall is not None}
        lines += [f"  {name}\trecall {recall:.3f}" for name, recall in recalls.items()]
    return "\n".join(lines)
