"""Locks of places that are written: one process writes into a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow._files import (
    MAX_NAME_BYTES,
    NOT_KNOWN,
    clear_leftovers,
    explained,
    is_temporary,
    shortened,
)
from fastflow.errors import OutputFolderError

LOCK = ".lock"
# Another process holds the lock.
_HELD_ELSEWHERE = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (*NOT_KNOWN, errno.ENOLCK)
# Earlier versions gave these names to files that they were writing.
_EARLIER_TEMPORARY = re.compile(
    r"\.(run\.json|summary\.json|journal\.jsonl|inventory\.json|results-\d+\.\w+"
    r"|config\.json|history\.jsonl|model-[0-9a-f]{16}\.safetensors)\.[a-z0-9_]{8}"
)
# Handles of the lock files that this process holds.
_held: set[int] = set()


def _let_go() -> None:
    """Close the lock files in a forked process, or the locks would live as long as that one does."""
    for handle in _held:
        with contextlib.suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def locked(folder: str | PathLike[str], enabled: bool = True) -> Iterator[None]:
    """Hold an output folder, which is made when missing, for this process.

    The lock ends with the process, however it ends, and its file goes when it is given back. Files that a
    killed run had begun to write are removed.

    Args:
        folder: the folder.
        enabled: take the lock; without it, the caller sees to it that nothing else writes there.

    Raises:
        OutputFolderError: another process holds it, it is no folder, or its file system has no locks.
        OSError: it cannot be written, or the disk is full.
    """
    folder = Path(folder)
    with _holding(folder / LOCK, folder, enabled):
        for name in filter(is_leftover, os.listdir(folder)):
            with contextlib.suppress(OSError):
                os.unlink(folder / name)
        yield


@contextlib.contextmanager
def locked_beside(path: str | PathLike[str], enabled: bool = True) -> Iterator[None]:
    """Hold the place of a folder that is written beside it and put there whole.

    Args:
        path: the place; there may be nothing yet.
        enabled: see `locked`.

    Raises:
        OutputFolderError: another process holds it, or its file system has no locks.
        OSError: it cannot be written, or the disk is full.
    """
    path = Path(path).resolve()
    name = shortened(path.name, MAX_NAME_BYTES - len(LOCK) - 1)
    with _holding(path.with_name(f".{name}{LOCK}"), path, enabled):
        clear_leftovers(path)
        yield


def is_leftover(name: str) -> bool:
    """Whether a file of an output folder is one that a run was writing when it was killed."""
    return is_temporary(name) or _EARLIER_TEMPORARY.fullmatch(name) is not None


@contextlib.contextmanager
def _holding(file: Path, place: Path, enabled: bool) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(file, place) if enabled else None
    except OSError as error:
        raise explained(place, error) from error
    if handle is None:
        yield
        return
    _held.add(handle)
    try:
        yield
    finally:
        # A process that was forked inside has no part in the lock.
        if handle in _held:
            _held.remove(handle)
            if _lies_at(handle, file):
                with contextlib.suppress(OSError):
                    os.unlink(file)
            os.close(handle)


def _take(file: Path, place: Path) -> int:
    """Open a lock file and lock it. Returns its handle, which no started program inherits."""
    while True:
        handle = _open(file)
        try:
            _lock(handle, file, place)
            # The process that held the lock before removes the file; a lock on what is gone keeps nobody out.
            if _lies_at(handle, file):
                _sign(handle)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open(file: Path) -> int:
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except PermissionError:
        # A killed process of somebody else may have left the file, which can be locked without being written.
        with contextlib.suppress(OSError):
            return os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        raise


def _lock(handle: int, file: Path, place: Path) -> None:
    try:
        # A record lock would not keep out a second run of this very process.
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD_ELSEWHERE:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            raise OutputFolderError(
                f"{place}: another run is writing here ({holder or 'unknown process'})"
            ) from error
        # Nobody can hold this file, so nobody misses it.
        with contextlib.suppress(OSError):
            os.unlink(file)
        cause = "this file system has no locks" if error.errno in _NO_LOCKS else "no lock can be taken"
        raise OutputFolderError(
            f"{place}: {cause} ({error.strerror or error}); --no-lock goes on without one, but see to it "
            "that nothing else writes there"
        ) from error


def _sign(handle: int) -> None:
    """Write into a lock file who holds it."""
    # A file of somebody else is only open for reading.
    if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _lies_at(handle: int, file: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(file))
    except OSError:
        return False
