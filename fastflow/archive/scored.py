"""The results of `classify` as labelled volumes with log-likelihoods, to be evaluated. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.archive.inputs import Item
from fastflow.archive.journal import Journal, Row
from fastflow.archive.output_folder import JOURNAL, RUN, SUMMARY
from fastflow.data.inventory import REASONS, Inventory
from fastflow.data.manifest import is_manifest
from fastflow.data.preprocess import GREY_LEVEL, Preprocess
from fastflow.data.records import Record, subject_of
from fastflow.data.words import class_indices, class_name
from fastflow.decision import logits_of
from fastflow.errors import FastflowError, ManifestError, OutputFolderError
from fastflow.evaluation.decisions import DecidedVolumes
from fastflow.evaluation.metrics import logs_of
from fastflow.readout import ARGMAX, GAUSSIAN, GaussianReadout

SHARDS = "shard-*-of-*"
# The reasons for which a row is left out, beside the error codes of rows.
NO_LABEL, UNKNOWN_LABEL, OTHER_SPLIT, NOT_LISTED = "no_label", "unknown_label", "other_split", "not_listed"
HINTS = {
    NO_LABEL: "evaluation needs the class; a manifest may name it",
    UNKNOWN_LABEL: "the model knows no such class",
    OTHER_SPLIT: REASONS[OTHER_SPLIT],
    NOT_LISTED: "the manifest has no such file",
}

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Results:
    """A finished or unfinished run of `classify`, in one folder or in one for each part of the inputs.

    Attributes:
        folders: each with ``run.json`` and ``journal.jsonl``.
        settings: of the rows, see ``run.json``; those of parts are the same but for ``shard``.
        finished: whether every run came to its end.
    """

    folders: tuple[Path, ...]
    settings: Mapping[str, Any]
    finished: bool

    @property
    def class_names(self) -> tuple[str, ...]:
        """The model's classes."""
        return tuple(self.settings["class_names"])

    @property
    def preprocess(self) -> Preprocess:
        """How the scored images were prepared."""
        return Preprocess.from_dict(self.settings["preprocess"])

    def rows(self) -> Iterator[Row]:
        """All rows, part by part.

        Raises:
            JournalError: a journal is damaged.
        """
        for folder in self.folders:
            path = folder / JOURNAL
            # A journal of a run that is under way may end in half a line, which is no row and stays.
            for _, row in Journal(path, path.stat().st_size if path.exists() else 0).read():
                yield row


def is_results(folder: str | PathLike[str]) -> bool:
    """Whether a folder holds results of `classify`, or those of its parts."""
    return (Path(folder) / RUN).is_file() or bool(_parts_in(Path(folder)))


def _parts_in(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"{SHARDS}/{RUN}"))


def open_results(folder: str | PathLike[str]) -> Results:
    """The run in a folder, or all parts of a run with ``--shard``.

    Raises:
        OutputFolderError: there is none, a file of it cannot be read, a part is missing, or parts have
            different settings.
    """
    path = Path(folder)
    folders = [path] if (path / RUN).is_file() else _parts_in(path)
    if not folders:
        raise OutputFolderError(f"{folder}: holds no results of `fastflow classify` ({RUN})")
    runs = [_document(each / RUN) for each in folders]
    for each, run in zip(folders, runs, strict=True):
        for name in ("class_names", "temperature", "dims", "preprocess", "id_from", "inputs"):
            if name not in run:
                raise OutputFolderError(f"{each / RUN}: has no {name!r}; it is of another version")
        differing = [name for name in run if name != "shard" and run[name] != runs[0].get(name)]
        if differing:
            raise OutputFolderError(
                f"{each}: its {differing[0]} differs from that of {folders[0]}; evaluate parts of one run"
            )
    if folders != [path]:
        _check_parts(path, [str(run["shard"]) for run in runs])
    states = [
        _document(each / SUMMARY).get("state") if (each / SUMMARY).exists() else None for each in folders
    ]
    return Results(tuple(folders), runs[0], all(state == "finished" for state in states))


def _check_parts(folder: Path, shards: Sequence[str]) -> None:
    count = int(shards[0].rpartition("/")[2])
    missing = {f"{i}/{count}" for i in range(1, count + 1)}.difference(shards)
    if missing:
        first = min(missing, key=lambda shard: int(shard.partition("/")[0]))
        raise OutputFolderError(
            f"{folder}: {len(missing)} of {count} parts are missing, such as --shard {first}; "
            "classify them, or name the folder of one part"
        )


def _document(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputFolderError(f"{path} cannot be read: {error}") from error


# -- which file a row is of ----------------------------------------------------------------------------------


def manifest_of(results: Results) -> str | None:
    """The manifest that was classified, where it was the only input and is still there."""
    inputs = results.settings["inputs"]
    return inputs[0] if len(inputs) == 1 and is_manifest(inputs[0]) and os.path.isfile(inputs[0]) else None


def records_by_id(results: Results, records: Iterable[Record]) -> dict[str, Record]:
    """Records by what stands for their files in the ``path`` of rows.

    Args:
        results: that were made of these files, by whatever manifest or folder.
        records: with paths that are absolute or relative to the working directory.
    """
    inputs, kind = results.settings["inputs"], results.settings["id_from"]
    base = os.path.dirname(inputs[0]) if is_manifest(inputs[0]) else inputs[0]
    found: dict[str, Record] = {}
    for record in records:
        path = os.path.abspath(record.path)
        # Rows name the files as they were given where inputs are several, or a single file.
        as_given = len(inputs) > 1 or path == inputs[0]
        names = [path, os.path.relpath(path), record.path] if as_given else [os.path.relpath(path, base)]
        found |= {Item(path, name).id(kind): record for name in names}
    return found


# -- rows as volumes -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """N volumes that were classified, and whose label the model knows.

    Attributes:
        labels: (N,) indices of the true classes.
        log_probs: (N, K) nats of the volumes.
        posterior: (N, K) probabilities of the rows, by whatever rule decided.
        slice_counts: (N,) number of slices whose sum `log_probs` is; 1 for means.
        predicted: (N,) indices of the labels that the rows name.
        subjects: N names.
        files: N paths; None where no manifest tells them.
        flags: the flag codes of each volume, "" without any.
        inventory: how many rows were used, and why others were left out.
    """

    labels: NDArray[np.int64]
    log_probs: Array
    posterior: Array
    slice_counts: NDArray[np.int64]
    predicted: NDArray[np.int64]
    subjects: tuple[str, ...]
    files: tuple[str, ...] | None
    flags: tuple[str, ...]
    inventory: Inventory

    def bits_per_dim(self, dims: int) -> tuple[Array, Array]:
        """((N,) bits per pixel under the true label, (N,) under the predicted one), of the 8-bit images.

        Args:
            dims: D, elements of an image.
        """
        rows = np.arange(len(self.labels))
        under = [self.log_probs[rows, index] / self.slice_counts for index in (self.labels, self.predicted)]
        true, predicted = (-(nats / dims + math.log(GREY_LEVEL)) / math.log(2.0) for nats in under)
        return true, predicted

    def log_posterior(self, temperature: float, prior: Sequence[float] | None) -> Array:
        """(N, K) logarithms of the posterior that the likelihoods alone give."""
        return _log_softmax(logits_of(self.log_probs, temperature, prior))


def read_scored(
    results: Results, records: Mapping[str, Record] | None = None, split: str | None = None
) -> Scored:
    """The volumes of results that can be evaluated.

    Args:
        results: of `classify`.
        records: by `records_by_id`; their labels, subjects and splits hold. When None, labels are those of
            the rows, and subjects are read from the names of the files.
        split: only the volumes of this split of the records; all when None.

    Raises:
        ManifestError: no row is left; the message says what was found.
        FastflowError: subjects are unknown, since rows hold hashes in place of paths.
    """
    if records is None and results.settings["id_from"] == "hash":
        raise FastflowError(
            f"{results.folders[0]}: rows hold hashes in place of paths, so that subjects are not known: "
            "name the manifest of these files"
        )
    known, inventory = class_indices(results.class_names), Inventory(hints=dict(HINTS))
    numbers = {name: k for k, name in enumerate(results.class_names)}
    rows: list[Row] = []
    labels: list[int] = []
    subjects: list[str] = []
    files: list[str] = []
    unknown: dict[str, int] = {}
    for row in results.rows():
        record = None if records is None else records.get(row["path"])
        label = row["label"] if record is None else record.label
        name = class_name(label)
        reason = _reason(row, record, name, split, records is not None, known)
        if reason is not None:
            inventory.leave_out(reason, row["path"])
            if reason == UNKNOWN_LABEL:
                unknown[str(name)] = unknown.get(str(name), 0) + 1
            continue
        inventory.used += 1
        rows.append(row)
        labels.append(known[str(name)])
        subjects.append(subject_of(row["path"]) if record is None else record.subject)
        files.append("" if record is None else record.path)
    if unknown:
        listed = ", ".join(f"{name} {count}" for name, count in sorted(unknown.items()))
        inventory.hints[UNKNOWN_LABEL] = f"{listed}; the model knows {', '.join(results.class_names)}"
    if not rows:
        where = "" if split is None else f" of the split {split!r}"
        details = "; ".join(inventory.details()) or "there are no rows"
        raise ManifestError(f"{results.folders[0]}: no volume{where} can be evaluated: {details}")
    predicted = [numbers[row["predicted"]] for row in rows]
    # Bits per dim are those of the argmax, whatever rule decided; earlier results have no such column.
    likeliest = [numbers[row.get("argmax") or row["predicted"]] for row in rows]
    log_probs = np.array([row["logp"] for row in rows], dtype=np.float64)
    return Scored(
        np.array(labels, dtype=np.int64),
        log_probs,
        np.array([row["posterior"] for row in rows], dtype=np.float64),
        _slice_counts(log_probs, likeliest, [row["bits_per_dim"] for row in rows], results.settings["dims"]),
        np.array(predicted, dtype=np.int64),
        tuple(subjects),
        None if records is None else tuple(files),
        tuple((row["error_code"] or "") if row["status"] == "flagged" else "" for row in rows),
        inventory,
    )


def _reason(
    row: Row,
    record: Record | None,
    label: str | None,
    split: str | None,
    is_listed: bool,
    known: Mapping[str, int],
) -> str | None:
    """Why a row is left out; None where it is used."""
    if is_listed and record is None:
        return NOT_LISTED
    if split is not None and (record is None or record.split != split):
        return OTHER_SPLIT
    if row["status"] == "error":
        return str(row["error_code"])
    if label is None:
        return NO_LABEL
    return None if label in known else UNKNOWN_LABEL


def _slice_counts(
    log_probs: Array, predicted: Sequence[int], bits: Sequence[float], dims: int
) -> NDArray[np.int64]:
    """How many slices each volume's log-likelihood is the sum of, by what its bits per dim say of a slice."""
    of_slice = -(np.asarray(bits) * math.log(2.0) + math.log(GREY_LEVEL)) * dims
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.nan_to_num(log_probs[np.arange(len(bits)), predicted] / of_slice, nan=1.0, posinf=1.0)
    return np.maximum(1, np.rint(ratio)).astype(np.int64)


def decisions_of(
    results: Results, scored: Scored, readout: GaussianReadout | None = None
) -> list[DecidedVolumes]:
    """The rows of the table that are the model's: each rule that makes a label of its log-likelihoods.

    Args:
        results: with the settings of the rules.
        scored: their volumes.
        readout: of the model; asked where rows were decided by argmax.
    """
    true, predicted = scored.bits_per_dim(results.settings["dims"])
    bits = {"bits_per_dim": true, "bits_per_dim_predicted": predicted}
    settings = results.settings
    posterior = scored.log_posterior(settings["temperature"], settings["prior"])
    decisions = [DecidedVolumes(ARGMAX, posterior, bits)]
    rule = settings.get("readout", ARGMAX)
    if rule != ARGMAX:
        # Rows that another rule decided hold its probabilities.
        decisions.append(DecidedVolumes(rule, logs_of(scored.posterior)))
    elif readout is not None:
        logits = readout.discriminants(scored.log_probs / scored.slice_counts[:, None])
        own = _log_softmax(logits_of(logits, readout.temperature, settings["prior"]))
        decisions.append(DecidedVolumes(GAUSSIAN, own))
    return decisions


def _log_softmax(logits: Array) -> Array:
    highest = logits.max(axis=1, keepdims=True)
    return np.asarray(logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True)))
