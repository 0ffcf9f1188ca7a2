"""Folders that commands write into: what may be in one, and whether it can be written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fastflow._files import FULL, explained, open_temporary, where_known
from fastflow._locks import LOCK, is_leftover, locked
from fastflow.errors import LowSpaceWarning, OutputFolderError

# A file of so many bytes is written to see whether a folder can be written.
PROBE_BYTES = 4096
LOW_SPACE_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Kind:
    """The words in which messages name the things that a command leaves in a folder of its own.

    Attributes:
        earlier: what is there after the command, such as "an earlier export".
        own: who needs the folder alone, such as "an export needs a folder of its own".
        ways: what can be done where something earlier is there.
    """

    earlier: str
    own: str
    ways: str = "replace it (--overwrite) or name another folder"


def check_place(
    folder: Path, kind: Kind, others: Callable[[Sequence[str]], Sequence[str]], may_replace: bool
) -> bool:
    """Check what is in a folder when a command begins. Nothing is written.

    Args:
        folder: where the command will write; there may be nothing yet.
        kind: what the command leaves there.
        others: which of the names in the folder are not the command's own.
        may_replace: whether something earlier may be replaced or gone on with.

    Returns:
        Whether something earlier is there.

    Raises:
        OutputFolderError: it is no folder, holds other files, or something earlier that may not be replaced.
    """
    here = names_in(folder)
    foreign = others(here)
    if foreign:
        raise OutputFolderError(f"{folder}: holds other files, such as {foreign[0]!r}; {kind.own}")
    if here and not may_replace:
        raise OutputFolderError(f"{folder}: holds {kind.earlier}; {kind.ways}")
    return bool(here)


def without_mark(mark: str) -> Callable[[Sequence[str]], Sequence[str]]:
    """For `check_place`: all names are others' unless one of them is that of the file that marks our own."""
    return lambda names: [] if mark in names else names


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted, without locks and what killed runs left; none where there is no folder.

    Raises:
        OutputFolderError: it is no folder.
        OSError: it cannot be listed.
    """
    try:
        found = sorted(os.listdir(folder))
    except FileNotFoundError as error:
        if os.path.islink(folder):
            raise explained(folder, error) from error
        return []
    except OSError as error:
        raise explained(folder, error) from error
    return [name for name in found if name != LOCK and not is_leftover(name)]


def make_folder(folder: Path, needed: int = LOW_SPACE_BYTES) -> bool:
    """Make a folder, which may be there, and see whether it can be written.

    Args:
        folder: the folder.
        needed: bytes that will be written into it; where fewer are free, a warning says so.

    Returns:
        Whether it was made.

    Raises:
        OutputFolderError: it is no folder.
        OSError: it cannot be made or written, or the disk is full.
    """
    is_new = not os.path.exists(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_probe(folder)
    except OSError as error:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise explained(folder, error) from error
    warn_of_low_space(folder, needed)
    return is_new


def check_writable(folder: Path) -> None:
    """See whether a folder can be written, or made where it is missing. Nothing stays of it.

    Raises:
        OutputFolderError: it is no folder.
        OSError: it cannot, or the disk is full.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    try:
        _write_probe(place)
    except OSError as error:
        raise explained(folder, error) from error


def warn_of_low_space(folder: Path, needed: int) -> None:
    """Warn where fewer bytes are free than will be written, or next to none."""
    try:
        state = os.statvfs(folder)
    except OSError:
        # The folder is missing still, or the file system does not tell.
        return
    free = state.f_bavail * state.f_frsize
    if state.f_blocks and free < max(needed, LOW_SPACE_BYTES):
        message = f"{folder}: only {free / 1e6:.1f} MB are free there"
        warnings.warn(message, LowSpaceWarning, stacklevel=3)


def _write_probe(folder: Path) -> None:
    handle, file = open_temporary(folder / "probe")
    try:
        os.write(handle, bytes(PROBE_BYTES))
        # Some file systems find room only when the content leaves the cache.
        with where_known():
            os.fsync(handle)
    finally:
        os.close(handle)
        os.unlink(file)


@contextlib.contextmanager
def held(
    folder: Path, check: Callable[[], object], lock: bool = True, needed: int = LOW_SPACE_BYTES
) -> Iterator[None]:
    """Check a folder, make it, hold it and check it once more; it goes again where nothing was put into it.

    Args:
        folder: the folder.
        check: raises where the folder may not be written; see `check_place`.
        lock: see `locked`.
        needed: see `make_folder`.

    Raises:
        OutputFolderError: it may not be written, or another process holds it.
        OSError: it cannot be written, or the disk is full.
    """
    check()
    is_new = make_folder(folder, needed)
    try:
        with locked(folder, lock):
            # Another process may have come and gone before the lock was taken.
            check()
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def telling_what_stays(folder: Path, state: Callable[[], str]) -> Iterator[None]:
    """Let the error of a full disk say what is in the folder all the same.

    Raises:
        OSError: the disk is full; the message ends with `state()`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        reason = (error.strerror or str(error)).removeprefix("cannot write: ")
        file = error.filename or str(folder)
        raise OSError(error.errno, f"cannot write: {reason}; {state()}", file) from error
