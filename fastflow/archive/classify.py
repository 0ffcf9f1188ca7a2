"""Classification of archives by likelihood: one row per input, always, and durable batch by batch."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

from fastflow._files import write_text
from fastflow._places import telling_what_stays
from fastflow.archive import batches as _batches
from fastflow.archive.batches import Runner, ScoredInput, Timings, score_batches
from fastflow.archive.decode import count_elsewhere, file_state
from fastflow.archive.inputs import Inputs, Item, inputs_of
from fastflow.archive.journal import FinishedInputs, Journal, Row, key_of
from fastflow.archive.locks import locked
from fastflow.archive.options import (
    ClassifyOptions,
    Progress,
    RunOptions,
    parse_prior,
    pick_device,
    pick_workers,
)
from fastflow.archive.output_folder import (
    JOURNAL,
    RUN,
    SUMMARY,
    check_folder,
    clear_folder,
    forget_rows,
    identity_of,
    prepare_folder,
)
from fastflow.archive.plan import Plan, plan
from fastflow.archive.prepare import PreparedRun, prepare
from fastflow.archive.results import ResultFiles
from fastflow.archive.rows import CODES, STATUSES, Settings, class_names, make_row, preprocess_of
from fastflow.archive.summary import Summary, describe, document_of, rates_of, tally
from fastflow.data.inventory import Inventory
from fastflow.decision import margin
from fastflow.errors import RunStoppedError

# More inputs than these are counted by another process: a thread would keep Python's lock from the one that
# scores.
MAX_COUNTED_BY_THREAD = 2000
MAX_SHOWN_ERRORS = 20
# A full disk stops a run, and this is said of it.
WHAT_STAYS = "the rows so far stay, and --resume goes on"

# Names of the parts stay importable from here.
__all__ = [
    "CODES",
    "JOURNAL",
    "RUN",
    "STATUSES",
    "SUMMARY",
    "Plan",
    "RunOptions",
    "Runner",
    "Settings",
    "Summary",
    "class_names",
    "classify",
    "describe",
    "make_row",
    "margin",
    "parse_prior",
    "pick_device",
    "pick_workers",
    "plan",
    "preprocess_of",
    "score_batches",
    "tally",
]

_OLD_NAMES = {"Clock": "Timings", "Scored": "ScoredInput"}


def __getattr__(name: str) -> Any:
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    new = _OLD_NAMES[name]
    warnings.warn(f"{name} is now fastflow.archive.batches.{new}", DeprecationWarning, stacklevel=2)
    return getattr(_batches, new)


def classify(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    *positional: Any,
    **options: Unpack[ClassifyOptions],
) -> Summary:
    """Classify files and write one row per input into ``out/results-00000.csv`` and so on.

    ``docs/archives.md`` tells the columns, the codes and the files of the folder. A bad file costs an error
    row and changes no other row. Every batch is made durable in ``out/journal.jsonl`` before the next one is
    scored.

    Args:
        inputs: files, folders, BIDS datasets, manifests; see `fastflow.archive.inputs.Inputs`.
        model_folder: a model that was trained here, so that it knows its preprocessing; of engine ``"onnx"``
            an export of one.
        out: the folder of the results; with `shard` a folder of the part's name in it.
        positional: deprecated: the first options by position.
        options: the keywords that follow.

    Keyword Args:
        prior: (K,) probabilities of the labels; uniform when None.
        batch_size: slices per pass; 16.
        workers: processes that read files; as many as half of the cores, up to 8, when None.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        split: take only this split of manifests.
        progress: called with the number of inputs done, their total (None until they are counted) and the
            errors among them.
        precision: see `fastflow.models.scoring.LabelScorer`; an export has its own, which ``"float32"``
            leaves as it is.
        engine: see `fastflow.models.scoring.LabelScorer`; ``"compile"`` pays from thousands of slices on.
            ``"ray"`` spreads the work over a Ray cluster. ``"onnx"`` runs an export by ONNX Runtime, without
            PyTorch.
        manifest: one more input, which must be a manifest.
        shard: ``"i/N"``: only the i-th of N parts.
        resume: go on with a run that was interrupted; inputs that have a row and have not changed since are
            passed over.
        retry_failed: resume, and do the error rows again; their new rows come last.
        overwrite: replace the results of an earlier run.
        on_error: ``"row"``, or ``"fail"`` to stop at the first error row.
        max_errors: stop after more error rows than this.
        format: ``"csv"`` or ``"parquet"``.
        id_from: what stands for an input in the results: ``"relpath"`` or ``"hash"``, see
            `fastflow.archive.inputs.Item`.
        slices: which slices of a volume, see `Preprocess`; the model's own when None.
        combine: ``"sum"`` of the slices' log-likelihoods (slices independent given the label), or their
            ``"mean"``.
        shard_rows: rows of a result file; 100,000.
        lock: hold the folder; without it, the caller sees to it that nothing else writes there.
        readout: ``"argmax"``, or ``"gaussian"`` for the model's Gaussian read-out, which then gives
            ``predicted``, ``posterior`` and ``margin``; a row's ``argmax`` is always that of the likelihoods.
        reject_below: flag rows ``unknown_scanner`` whose ``scanner_p`` is below; None flags none.

    Raises:
        ManifestError: the inputs name nothing.
        CheckpointError: the model folder is not usable.
        ExportError: the export folder is not usable.
        ReadoutError: the model has no read-out for these slices.
        OutputFolderError: the output folder is another run's, or holds anything and neither `resume` nor
            `overwrite` is set; or its file system has no locks.
        ValueError: an argument does not fit; the message names it.
        RunStoppedError: there were more errors than allowed. The rows stay, and the run can be resumed.
        JournalError: the journal to be resumed is damaged.
        OSError: results cannot be written, such as on a full disk. What was written stays, and the run can be
            resumed.
        RuntimeError: ``engine="compile"`` without a C++ compiler.
    """
    chosen = RunOptions(**_by_name(positional, options))
    sources = inputs_of(inputs, chosen.manifest, chosen.split, chosen.part)
    prepared = prepare(model_folder, chosen)
    # Inputs that name nothing are told before a folder is made.
    sources.check()
    folder = Path(out) / sources.shard.folder if sources.shard else Path(out)
    identity = identity_of(sources, prepared.settings, prepared.precision, chosen.format, chosen.shard_rows)
    is_new = prepare_folder(folder, identity, chosen.resumes, chosen.overwrite)
    try:
        with locked(folder, chosen.lock), telling_what_stays(folder, lambda: WHAT_STAYS):
            # Once more: another run may have come and gone before the lock was taken.
            check_folder(folder, identity, chosen.resumes, chosen.overwrite)
            if not chosen.resumes:
                clear_folder(folder)
            with _cleared_unless_begun(folder, is_new):
                write_text(folder / RUN, json.dumps(identity, indent=1) + "\n")
                journal = Journal.open(folder / JOURNAL)
                if chosen.retry_failed:
                    forget_rows(folder, journal, lambda key, row: row["status"] != "error")
                run = _Run(folder, sources, prepared, chosen, identity, journal)
            return run.go()
    finally:
        # A folder that was made for a run which could not begin is empty now.
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _cleared_unless_begun(folder: Path, is_new: bool) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if is_new:
            clear_folder(folder)
        raise


def _by_name(positional: Sequence[Any], options: ClassifyOptions) -> dict[str, Any]:
    """The options by name; once the first eight of them could be given by position."""
    names = [field.name for field in dataclasses.fields(RunOptions)][:8]
    if len(positional) > len(names):
        raise TypeError(f"classify takes at most {3 + len(names)} arguments by position")
    by_position = dict(zip(names, positional, strict=False))
    if positional:
        message = f"classify: give {', '.join(by_position)} by name; options by position go in 0.3"
        warnings.warn(message, DeprecationWarning, stacklevel=3)
    for name in by_position.keys() & options.keys():
        raise TypeError(f"classify got multiple values for argument {name!r}")
    return by_position | dict(options)


class _Run:
    """A run over an archive into a folder that it holds."""

    def __init__(
        self,
        folder: Path,
        sources: Inputs,
        prepared: PreparedRun,
        options: RunOptions,
        identity: dict[str, Any],
        journal: Journal,
    ) -> None:
        self.folder, self.sources, self.prepared, self.journal = folder, sources, prepared, journal
        self.settings: Settings = prepared.settings
        self.limit = options.error_limit
        self.progress: Progress | None = options.progress
        self.workers = options.num_workers
        self.configuration = {
            "device": prepared.device,
            "workers": self.workers,
            "batch_size": options.batch_size,
            "engine": options.engine,
        } | identity
        names, constant = self.settings.class_names, self.settings.constant
        self.files = ResultFiles(folder, journal, names, constant, options.format, options.shard_rows)
        self.files.add(journal.ends())
        self.finished = FinishedInputs(journal.keys())
        self.total: int | None = None
        self.timings = Timings()
        self.inventory = Inventory()
        self.new = self.old = self.failed = 0
        self.errors: list[str] = []
        self.start = time.perf_counter()

    def go(self) -> Summary:
        """Score what has no row yet, and write the summary."""
        if self.progress is not None:
            threading.Thread(target=self._count, daemon=True).start()
        scored = self.prepared.runner(self._left(), self.timings)
        try:
            with contextlib.closing(scored):
                for batch in scored:
                    self._write(batch)
        except RunStoppedError:
            self._finish("stopped")
            raise
        self._drop_stale()
        return self._finish("finished")

    def _count(self) -> None:
        """Count the inputs beside the run, so that a listing that takes minutes does not delay it."""
        # The run itself tells what is wrong with the inputs.
        with contextlib.suppress(Exception):
            count = sum(1 for _ in itertools.islice(self.sources, MAX_COUNTED_BY_THREAD))
            self.total = count if count < MAX_COUNTED_BY_THREAD else count_elsewhere(self.sources)

    def _left(self) -> Iterator[Item]:
        """The inputs that have no row yet."""
        resumed = self.journal.size > 0
        for item in self.sources.counted(self.inventory):
            if resumed and self.finished.take(self._key(item.path, *file_state(item.path))):
                self.old += 1
                self._tell()
            else:
                yield item

    def _key(self, path: str, size: int, mtime_ns: int) -> bytes:
        return key_of(path, size, mtime_ns, self.settings.model_hash)

    def _write(self, batch: Sequence[ScoredInput]) -> None:
        rows = [make_row(scored, self.settings) for scored in batch]
        begin = time.perf_counter()
        keys = [self._key(scored.item.path, scored.size, scored.mtime_ns) for scored in batch]
        self.files.add(self.journal.append(zip(keys, rows, strict=True)))
        self.timings.writing += time.perf_counter() - begin
        for scored, row in zip(batch, rows, strict=True):
            self.new += 1
            if row["status"] == "error":
                self.failed += 1
                if len(self.errors) < MAX_SHOWN_ERRORS:
                    shown = scored.item.path if self.settings.id_from == "relpath" else row["path"]
                    self.errors.append(f"{shown}: {row['error_message']} [{row['error_code']}]")
        self._tell()
        if self.failed > self.limit:
            raise RunStoppedError(
                f"{self.failed} inputs failed, more than the {self.limit:.0f} allowed; "
                f"the last: {self.errors[-1]}. The rows so far are in {self.folder}; --resume goes on"
            )

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(self.old + self.new, self.total, self.failed)

    def _drop_stale(self) -> None:
        """Drop the rows of files that have changed since, or are no longer there."""
        left = self.finished.left()
        if not left:
            return

        def wanted(key: bytes, row: Row) -> bool:
            if left.get(key, 0) == 0:
                return True
            left[key] -= 1
            return False

        forget_rows(self.folder, self.journal, wanted)
        self.files = dataclasses.replace(self.files, done=0, start=0, waiting=0)
        self.files.add(self.journal.ends())

    def _finish(self, state: str) -> Summary:
        begin = time.perf_counter()
        files = self.files.finish()
        self.timings.writing += time.perf_counter() - begin
        counts, codes, confusion = tally(self.journal, self.settings.class_names)
        seconds = time.perf_counter() - self.start
        summary = Summary(
            out=str(self.folder),
            files=tuple(map(str, files)),
            counts=counts,
            codes=codes,
            class_names=self.settings.class_names,
            confusion=confusion,
            new=self.new,
            seconds=seconds,
            rates=rates_of(self.timings, self.new, seconds, self.workers),
            errors=tuple(self.errors),
            inventory=self.inventory,
        )
        document = document_of(summary, state, self.prepared.versions, self.configuration)
        write_text(self.folder / SUMMARY, json.dumps(document, indent=1) + "\n")
        return summary
