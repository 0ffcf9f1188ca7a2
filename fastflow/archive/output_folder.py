"""The folder of a run's results: whose it is, and what may be in it when a run begins. Torch-free."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastflow._places import Kind, check_place, make_folder, without_mark
from fastflow.archive.inputs import Inputs
from fastflow.archive.journal import Journal, Row
from fastflow.archive.results import found
from fastflow.archive.rows import Settings
from fastflow.errors import OutputFolderError
from fastflow.readout import ARGMAX

RUN, JOURNAL, SUMMARY = "run.json", "journal.jsonl", "summary.json"
# The settings of runs of earlier versions, which did not write them down.
EARLIER_SETTINGS = {"readout": ARGMAX}
RESULTS = Kind(
    "an earlier run",
    "results need a folder of their own",
    "go on with it (--resume) or replace it (--overwrite)",
)


def identity_of(
    sources: Inputs, settings: Settings, precision: str, format: str, shard_rows: int
) -> dict[str, Any]:
    """The settings that must be equal where a run goes on, as JSON values."""
    fields = dataclasses.asdict(settings)
    # The model's hash covers the validation values, the statistics of the training images and the read-out.
    for name in ("validation", "accepted", "images", "scanners"):
        del fields[name]
    fields["readout"] = settings.constant["readout"]
    return {
        "inputs": [os.path.abspath(source) for source in sources.sources],
        "split": sources.split,
        "shard": str(sources.shard) if sources.shard else None,
        **json.loads(json.dumps(fields | {"preprocess": settings.preprocess.to_dict()})),
        "precision": precision,
        "format": format,
        "shard_rows": shard_rows,
    }


def prepare_folder(folder: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    """See to it that the folder can be written into. Returns whether it was made for this run.

    Raises:
        OutputFolderError: it is a file, holds other files, or an earlier run that is not to be replaced or
            gone on with.
        OSError: it cannot be written, or the disk is full.
    """
    check_folder(folder, identity, resume, overwrite)
    return make_folder(folder)


def check_folder(folder: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> None:
    """Check that a run may write into a folder.

    Raises:
        OutputFolderError: see `prepare_folder`.
    """
    if check_place(folder, RESULTS, without_mark(RUN), resume or overwrite) and resume:
        _compare(folder, identity)


def _compare(folder: Path, identity: dict[str, Any]) -> None:
    try:
        before = dict(json.loads((folder / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise OutputFolderError(f"{folder / RUN} cannot be read: {error}") from error
    for name, value in identity.items():
        earlier = before.get(name, EARLIER_SETTINGS.get(name))
        if earlier != value:
            raise OutputFolderError(
                f"{folder}: cannot be resumed, because {name} was {earlier!r} and is now {value!r}; "
                "use another folder, or --overwrite"
            )


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run.

    Results go before the journal that they were made from, and the file that says whose folder it is goes
    last.
    """
    for path in [*found(folder), folder / SUMMARY, folder / JOURNAL, folder / RUN]:
        path.unlink(missing_ok=True)


def forget_rows(folder: Path, journal: Journal, wanted: Callable[[bytes, Row], bool]) -> None:
    """Take rows back. The result files go first: they are made again from whatever the journal then holds."""
    for path in found(folder):
        path.unlink()
    journal.keep(wanted)
