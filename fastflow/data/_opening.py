"""Files opened for one reading, during which they must stay as they are; and names that lead to no file.

Files are read and never mapped: a process that maps a file is killed when another one cuts it.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Iterator
from stat import S_ISDIR, S_ISREG
from typing import Protocol

from fastflow.data._kinds import HEAD_BYTES, PNG_MAGIC, wrong_kind
from fastflow.data.endings import ENDINGS, HINTS, ending_of, unread_ending_of
from fastflow.errors import VolumeError

# An image of the sizes that models take is far smaller.
MAX_PNG_BYTES = 64 << 20
# Linux gives this number to the clock that stamps files, which moves in steps of up to 10 ms.
_CLOCK_REALTIME_COARSE = 5
_CLOCK_STEP_NS = 10_000_000


class Readable(Protocol):
    """A file or a stream."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes."""


def read_up_to(stream: Readable, size: int) -> bytes:
    """`size` bytes, or those that are left: a file on a network may give fewer at once."""
    block = stream.read(size)
    while len(block) < size and (more := stream.read(size - len(block))):
        block += more
    return block


def check_file(name: str) -> int:
    """Size in bytes of a regular file.

    Raises:
        VolumeError: it is missing, empty, or a folder, a pipe or a device, which would block its reader.
    """
    try:
        stat = os.stat(name)
    except FileNotFoundError:
        raise _missing(name) from None
    except OSError as error:
        raise _unreadable(name, error) from error
    except ValueError as error:
        raise VolumeError(name, "unreadable", f"is no file name: {error}") from error
    if not S_ISREG(stat.st_mode):
        what = "a folder" if S_ISDIR(stat.st_mode) else "a pipe, a socket or a device"
        raise VolumeError(name, "not_a_file", f"is {what}, not a file")
    if stat.st_size == 0:
        raise VolumeError(name, "empty", "the file is empty")
    return stat.st_size


def _missing(name: str) -> VolumeError:
    """The error of a name without a file: a link, the file itself or a folder above, may lead nowhere.

    The message names no target, as results can be asked for without names.
    """
    message = "there is no such file"
    link = next((path for path in _with_parents(name) if _leads_nowhere(path)), None)
    if link is not None and "/annex/objects/" in os.readlink(link):
        # git-annex and DataLad keep every file as a link, also where its content was not fetched.
        message = "is a link of git-annex whose content was not fetched: run 'git annex get' or 'datalad get'"
    elif link == name:
        message = "is a link to a file that does not exist: its content was not fetched, or moved away"
    elif link is not None:
        message = "lies below a link to a folder that does not exist: is a disk or an archive not mounted?"
    return VolumeError(name, "missing", message)


def _with_parents(name: str) -> Iterator[str]:
    path = name
    while path:
        yield path
        path = os.path.dirname(path) if os.path.dirname(path) != path else ""


def _leads_nowhere(path: str) -> bool:
    return os.path.islink(path) and not os.path.exists(path)


def _unreadable(name: str, error: OSError) -> VolumeError:
    return VolumeError(name, "unreadable", f"cannot be read: {error.strerror or error}")


def check_ending(name: str, accepted: tuple[str, ...]) -> None:
    """Refuse a file by its name, with what its ending or its content says about it.

    Raises:
        VolumeError: its ending is none of `accepted`, or there is no such file.
    """
    ending = ending_of(name)
    if ending in accepted:
        return
    try:
        check_file(name)
    except VolumeError as error:
        if error.code != "empty":
            raise
    message = f"is none of {', '.join(accepted)}"
    if (unread := unread_ending_of(name)) is not None:
        message = f"is {HINTS[unread]}; {', '.join(ENDINGS)} are read"
    elif ending is None:
        with contextlib.suppress(OSError), open(name, "rb", buffering=0) as file:
            known = wrong_kind(name, file.read(HEAD_BYTES))
            message = f"{known.message}; {', '.join(ENDINGS)} are read" if known else message
    raise VolumeError(name, "unsupported_format", message)


@contextlib.contextmanager
def opened(name: str) -> Iterator[io.FileIO]:
    """Open a file for one reading, and see that no other program changes it meanwhile.

    A file that is replaced by another of its name is read as it was. A change that leaves size and time as
    they were cannot be seen.

    Raises:
        VolumeError: there is no such file, it cannot be read, or it was changed while it was read.
    """
    check_file(name)
    try:
        with open(name, "rb", buffering=0) as file:
            before = _settled_state(name, file.fileno())
            try:
                yield file
            except VolumeError as error:
                _check_unchanged(name, file.fileno(), before, error)
                raise
            _check_unchanged(name, file.fileno(), before)
    except FileNotFoundError:
        raise _missing(name) from None
    except OSError as error:
        raise _unreadable(name, error) from error
    except MemoryError as error:
        raise VolumeError(name, "too_large", "needs more memory than there is") from error


def _state(file: int) -> tuple[int, int]:
    """(size in bytes, last change in nanoseconds) of an open file."""
    status = os.fstat(file)
    return status.st_size, status.st_mtime_ns


def _settled_state(name: str, file: int) -> tuple[int, int]:
    """The state of a file whose next change will have another time.

    Raises:
        VolumeError: the file is being written.
    """
    before = _state(file)
    # Two changes within a step of the clock have the same time, so that step must be over.
    while 0 <= before[1] - _clock() < _CLOCK_STEP_NS:
        time.sleep(0.001)
    _check_unchanged(name, file, before)
    return before


def _clock() -> int:
    """The time in nanoseconds with which a file would be stamped that is changed now."""
    try:
        return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
    except (AttributeError, OSError):
        return time.time_ns()


def _check_unchanged(name: str, file: int, before: tuple[int, int], error: VolumeError | None = None) -> None:
    """Replace the error of a reading, or its result, if the file is not as it was.

    Raises:
        VolumeError: the file has another size or time.
    """
    now = _state(file)
    if now == before:
        return
    if now[0] < before[0]:
        message = f"was cut from {before[0]} to {now[0]} bytes while it was read: try it again"
        raise VolumeError(name, "truncated", message) from error
    size = f"has now {now[0]} bytes instead of {before[0]}" if now[0] != before[0] else "kept its size"
    raise VolumeError(name, "changed", f"was changed while it was read, and {size}: try it again") from error


def read_png(name: str) -> bytes:
    """The bytes of a PNG file, whose beginning only has been looked at.

    Raises:
        VolumeError: it is something else, too large, or cannot be read.
    """
    with opened(name) as file:
        size = os.fstat(file.fileno()).st_size
        head = read_up_to(file, min(size, HEAD_BYTES))
        if not head.startswith(PNG_MAGIC):
            message = f"is no PNG image: it begins with {head[:8]!r}"
            raise wrong_kind(name, head) or VolumeError(name, "image", message)
        if size > MAX_PNG_BYTES:
            raise VolumeError(name, "too_large", f"has {size} bytes; the limit is {MAX_PNG_BYTES}")
        return head + read_up_to(file, size - len(head))
