"""The folder of a model while it is trained: what may be in it, and how the new model takes its place.

A training works in `UNFINISHED` inside the model folder, and its files are moved out when it has ended:
until then, an earlier model stays as it is.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow._files import is_temporary, sync_folder, temporary_name, write_bytes
from fastflow._places import make_folder, names_in
from fastflow.archive.locks import LOCK, locked
from fastflow.archive.output_folder import RUN
from fastflow.errors import OutputFolderError, ResumeError
from fastflow.models.checkpoint import CONFIG
from fastflow.runtime.export_folder import DOCUMENT
from fastflow.training.logs import COLUMNS, STEPS, TENSORBOARD, is_event_file
from fastflow.training.selection import RULES
from fastflow.training.state import (
    STATE,
    clear_unfinished_files,
    has_state,
    is_complete,
    mark_complete,
)
from fastflow.training.trainer import CHECKPOINTS, HISTORY, EpochRecord

UNFINISHED, INVENTORY = "unfinished", "inventory.json"
# These are all that a training may leave beside the model; they are replaced together with it.
OWN = frozenset((CHECKPOINTS, HISTORY, INVENTORY, STEPS, TENSORBOARD))
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
# Folders with one of these hold results of another kind, which are never written into.
_OTHERS = {RUN: "the results of a classification", DOCUMENT: "an export"}
# So many bytes are written before anything is read, to find a full disk.
_PROBE_BYTES = 1 << 20


@contextlib.contextmanager
def model_folder(
    folder: str | PathLike[str], overwrite: bool = False, lock: bool = True, resume: bool = False
) -> Iterator[Path]:
    """Hold a model folder for a training. Yields the folder inside it that the training writes into.

    At the end, the files of the inner folder take the place of those of an earlier training, ``config.json``
    last; files that no training writes stay. Where the body raises, the earlier model stays as it was; the
    inner folder stays too where an epoch was finished or a state saved, else it goes, and with it a folder
    that was made here.

    Args:
        folder: the model folder; made where it is missing.
        overwrite: replace an earlier training, or write beside other files.
        lock: keep out other runs, see `locked`.
        resume: go on with the training in the inner folder, which is yielded as it is. Where its model is
            finished, and the training was stopped while its files were moved, the rest of them are moved.

    Raises:
        ResumeError: there is no training to resume.
        OutputFolderError: the folder is a file, another run writes into it, it holds results of another kind,
            or it holds anything and `overwrite` is not set.
        OSError: it cannot be written into.
    """
    path = Path(folder)
    if resume:
        # Nothing is made where there is nothing to resume.
        _check(path, overwrite, resume)
    is_new = make_folder(path)
    if not is_new and not (path / LOCK).exists():
        # No run is at work here, and a refusal leaves no file behind.
        _check(path, overwrite, resume)
    work = path / UNFINISHED
    try:
        with locked(path, lock):
            _check(path, overwrite, resume)
            try:
                _begin(work, resume)
                yield work
            except BaseException:
                if _is_worthless(work):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            _publish(work, path)
    finally:
        if is_new:
            # Only an empty folder can be removed.
            with contextlib.suppress(OSError):
                path.rmdir()


def _is_worthless(work: Path) -> bool:
    """Whether an inner folder holds no epoch, no state and no model."""
    return not ((work / HISTORY).exists() or (work / CONFIG).exists() or has_state(work))


def can_resume(folder: str | PathLike[str]) -> bool:
    """Whether a model folder holds a training that `resume` goes on with."""
    work = Path(folder) / UNFINISHED
    return has_state(work) or is_complete(work)


def read_history(folder: str | PathLike[str]) -> list[EpochRecord]:
    """The records of the epochs of the model in a folder."""
    text = (Path(folder) / HISTORY).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _check(folder: Path, overwrite: bool, resume: bool) -> None:
    """Raise OutputFolderError where no model may be written, ResumeError where nothing can be resumed."""
    here = names_in(folder)
    for name, kind in _OTHERS.items():
        if name in here:
            raise OutputFolderError(
                f"{folder}: holds {kind} ({name}); name another folder, a model needs one of its own"
            )
    for name in here:
        if not _is_own_or_other(folder / name):
            raise OutputFolderError(
                f"{folder / name}: has the name of a model's file or folder and is none of a training; "
                "name another folder, a model needs one of its own"
            )
    if resume:
        if not can_resume(folder):
            raise ResumeError(_nothing_to_resume(folder, here))
        return
    if UNFINISHED in here and _is_worthless(folder / UNFINISHED):
        # That training was killed before the end of an epoch, so nothing is lost.
        here.remove(UNFINISHED)
    if here and not overwrite:
        raise OutputFolderError(_refusal(folder, here))


def _nothing_to_resume(folder: Path, here: list[str]) -> str:
    if CONFIG in here:
        return f"{folder}: holds a finished model, there is nothing to resume; leave --resume out"
    if UNFINISHED in here:
        return (
            f"{folder / UNFINISHED}: that training was stopped before a state was saved, there is nothing to "
            "resume; train anew, without --resume (with --overwrite where it holds an epoch)"
        )
    return f"{folder}: holds no unfinished training, there is nothing to resume; leave --resume out"


def _refusal(folder: Path, here: list[str]) -> str:
    goes_on = "go on with it (--resume), " if can_resume(folder) else ""
    if CONFIG in here:
        both = f" and an unfinished training; {goes_on}" if goes_on else "; "
        return f"{folder}: holds a finished model{both}replace it (--overwrite) or name another folder"
    unfinished = [name for name in (UNFINISHED, CHECKPOINTS, HISTORY) if name in here]
    if unfinished:
        return (
            f"{folder}: holds an unfinished training ({', '.join(unfinished)}); {goes_on}"
            "replace it (--overwrite) or name another folder"
        )
    return (
        f"{folder}: holds other files, such as {here[0]!r}; a model needs a folder of its own "
        "(--overwrite writes beside them)"
    )


def _is_own_or_other(path: Path) -> bool:
    """False for a file or folder that has a name of a training's and another content."""
    if path.name in (CONFIG, HISTORY):
        return _holds_object(path, "weights" if path.name == CONFIG else "epoch")
    if path.name == CHECKPOINTS:
        return path.is_dir() and {child.name for child in path.iterdir()} <= set(RULES)
    if path.name == STEPS:
        return _first_line(path) == ",".join(COLUMNS)
    if path.name == TENSORBOARD:
        return path.is_dir() and all(is_event_file(child.name) for child in path.iterdir())
    if path.name == UNFINISHED:
        names = set(names_in(path)) if path.is_dir() else {""}
        return not names or bool(names & {CONFIG, STATE, *OWN})
    return True


def _first_line(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return stream.readline().rstrip("\n")
    except OSError:
        return ""


def _holds_object(path: Path, key: str) -> bool:
    """Whether a JSON file, or the first line of one of JSON lines, is an object with this key."""
    try:
        text = path.read_text(encoding="utf-8")
        document = json.loads(text.partition("\n")[0] if path.suffix == ".jsonl" else text)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(document, dict) and key in document


def _begin(work: Path, resume: bool) -> None:
    """Make the inner folder anew, and write into it, so that a full disk is found before volumes are read."""
    for path in work.parent.iterdir():
        # A training that was killed at its very end leaves such a folder.
        if is_temporary(path.name):
            _remove(path)
    if resume:
        clear_unfinished_files(work)
        if is_complete(work):
            return
    else:
        _remove(work)
        work.mkdir()
    probe = work / INVENTORY
    try:
        write_bytes(probe, bytes(_PROBE_BYTES))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"no room for a model: {error.strerror}", str(work.parent)) from error
        raise
    probe.unlink()


def _publish(work: Path, folder: Path) -> None:
    """Move the files of a finished training to their places.

    Nothing is written, so that a disk that is full by now does no harm; ``config.json`` is replaced last, and
    names the weights that belong to it. Where this was stopped before, it does the rest.
    """
    mark_complete(work)
    names = sorted(set(os.listdir(work)) - {STATE}, key=lambda name: (name == CONFIG, name != HISTORY))
    # The history is moved first; once it is gone, so are the files of an earlier training.
    if HISTORY in names:
        for name in OWN.difference(names):
            _remove(folder / name)
    for name in names:
        if (work / name).is_dir():
            _remove(folder / name)
        os.replace(work / name, folder / name)
    weights = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["weights"]
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name != weights:
            path.unlink()
    sync_folder(folder)
    # The rest goes in one step, and is removed under a name that no training looks for.
    left = folder / temporary_name(UNFINISHED, "old")
    os.replace(work, left)
    shutil.rmtree(left, ignore_errors=True)
    sync_folder(folder)


def _remove(path: Path) -> None:
    """Remove a file or a folder, which need not be there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
