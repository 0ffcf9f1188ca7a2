"""The folder of a run's results: whose it is, and what may be in it when a run begins. Torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastflow.archive.inputs import Inputs
from fastflow.archive.journal import Journal, Row
from fastflow.archive.locks import LOCK, is_temporary
from fastflow.archive.results import found
from fastflow.archive.rows import Settings
from fastflow.errors import OutputFolderError

RUN, JOURNAL, SUMMARY = "run.json", "journal.jsonl", "summary.json"


def identity_of(
    sources: Inputs, settings: Settings, precision: str, format: str, shard_rows: int
) -> dict[str, Any]:
    """The settings that must be equal where a run goes on, as JSON values."""
    fields = dataclasses.asdict(settings)
    # The model's hash covers the validation values.
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


def prepare_folder(folder: Path, identity: dict[str, Any], resume: bool, overwrite: bool) -> bool:
    """See to it that the folder can be written into. Returns whether it was made for this run.

    Raises:
        OutputFolderError: it is a file, holds other files, or an earlier run that is not to be replaced or
            gone on with.
    """
    if not folder.exists():
        folder.mkdir(parents=True)
        return True
    if not folder.is_dir():
        raise OutputFolderError(f"{folder}: must be a folder, it is a file")
    here = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not is_temporary(path.name))
    if here and not (folder / RUN).exists():
        raise OutputFolderError(
            f"{folder}: holds other files, such as {here[0]!r}; results need a folder of their own"
        )
    if here and resume:
        _compare(folder, identity)
    elif here and not overwrite:
        raise OutputFolderError(
            f"{folder}: holds an earlier run; go on with it (--resume) or replace it (--overwrite)"
        )
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


def clear_folder(folder: Path) -> None:
    """Remove the files of an earlier run.

    Results go before the journal that they were made from, and the file that says whose folder it is goes
    last.
    """
    for path in [*found(folder), folder / SUMMARY, folder / JOURNAL, folder / RUN]:
        path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder that was made for a run which could not begin; other files in it stay."""
    clear_folder(folder)
    (folder / LOCK).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def forget_rows(folder: Path, journal: Journal, wanted: Callable[[bytes, Row], bool]) -> None:
    """Take rows back. The result files go first: they are made again from whatever the journal then holds."""
    for path in found(folder):
        path.unlink()
    journal.keep(wanted)
