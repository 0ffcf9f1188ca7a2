"""Atomic writing: a reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from fastflow.errors import OutputFolderError

# Most file systems take names of so many bytes.
MAX_NAME_BYTES = 255
# A disk or a quota that is full.
FULL = (errno.ENOSPC, errno.EDQUOT)
# A file system that knows no such call answers with one of these.
NOT_KNOWN = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_TEMPORARY = re.compile(r"\..*\.[0-9a-f]{8}\.fastflow-(tmp|old)", re.DOTALL)


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A stream into a temporary file, which takes the place of `path` at the end.

    The temporary file lies in the same folder, which is created when missing. Where the body raises, the old
    file stays and the temporary one goes. A new file follows the umask; one that takes the place of another
    has that one's permissions, where the file system can change them.

    Raises:
        OSError: it cannot be written; the error names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming(path):
        handle, temporary = open_temporary(path)
        try:
            with os.fdopen(handle, "wb") as stream:
                _keep_mode(path, handle)
                yield stream
                stream.flush()
                # Without it, a power cut could leave an empty file under the new name.
                with where_known():
                    os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    sync_folder(path.parent)


def open_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside a path, with permissions as the umask says: its handle to read and write, and where.

    Raises:
        OSError: it cannot be made.
    """
    temporary = path.with_name(temporary_name(path.name))
    # The system subtracts the umask itself; asking for the umask would change it for other threads.
    return os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), temporary


def temporary_name(name: str, end: str = "tmp") -> str:
    """A name that no other file has, under which something is made that will be called `name`."""
    return f"{_beginning(name)}{secrets.token_hex(4)}.fastflow-{end}"


def _beginning(name: str) -> str:
    # Dots, digits and the longer of the two ends take 23 bytes.
    return f".{shortened(name, MAX_NAME_BYTES - 23)}."


def is_temporary(name: str) -> bool:
    """Whether a name is one of `temporary_name`: a killed process leaves such files."""
    return _TEMPORARY.fullmatch(name) is not None


def shortened(text: str, size: int) -> str:
    """The beginning of a text that takes at most `size` bytes in UTF-8; no character is cut."""
    content = text.encode("utf-8", "replace")
    return text if len(content) <= size else content[:size].decode("utf-8", "ignore")


def _keep_mode(path: Path, handle: int) -> None:
    """Give a file the permissions of the one whose place it takes."""
    # Shares of other systems have permissions that nobody can change, and files that can be written all the
    # same.
    with contextlib.suppress(OSError):
        before = os.lstat(path).st_mode
        if stat.S_ISREG(before) and stat.S_IMODE(before) != stat.S_IMODE(os.fstat(handle).st_mode):
            os.fchmod(handle, stat.S_IMODE(before) & 0o777)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors that name none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, f"cannot write: {error.strerror or error}", str(path)) from error


@contextlib.contextmanager
def where_known() -> Iterator[None]:
    """Pass over a call that the file system does not know; other errors are raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in NOT_KNOWN:
            raise


def sync_folder(folder: str | PathLike[str]) -> None:
    """Make the names in a folder survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: str | PathLike[str], content: bytes) -> None:
    """Write a file by way of a temporary one in the same folder, which is created when missing."""
    with replacing(path) as stream:
        stream.write(content)


def write_text(path: str | PathLike[str], text: str) -> None:
    """`write_bytes` of UTF-8 text.

    Characters that are not valid Unicode (from a file name of another encoding) are written as escapes.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


# -- folders -------------------------------------------------------------------------------------------------


def explained(folder: Path, error: OSError) -> Exception:
    """The error to raise where a folder cannot be made or written: its cause, and a way on.

    Returns:
        An OutputFolderError where the path is that of something else than a folder, otherwise an OSError of
        the same number.
    """
    if os.path.isfile(folder):
        return OutputFolderError(f"{folder}: must be a folder, it is a file")
    if os.path.islink(folder) and not os.path.exists(folder):
        return OutputFolderError(f"{folder}: must be a folder, it is a link that leads nowhere")
    files = [str(path) for path in folder.parents if os.path.isfile(path)]
    reason = f"{files[0]} is a file" if files else error.strerror or str(error)
    way = "free some space or name another folder" if error.errno in FULL else "name another folder"
    number = errno.ENOTDIR if files else error.errno
    return OSError(number, f"cannot write: {reason}; {way}", str(folder))


@contextlib.contextmanager
def replacing_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path`, which takes its place at the end; the earlier folder is gone then.

    Where the body raises, the new folder goes and the old one stays. The new folder follows the umask, or has
    the permissions of the earlier one.

    Raises:
        OutputFolderError: the new folder cannot be put there.
        OSError: the new folder cannot be made, or the disk is full.
    """
    # A link is resolved, so that the folder behind it is replaced and not the link.
    path = Path(path).resolve()
    work = path.with_name(temporary_name(path.name))
    new = work / "new"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Nobody else looks into a folder that is not finished.
        work.mkdir(mode=0o700)
        new.mkdir()
    except OSError as error:
        raise explained(path, error) from error
    try:
        yield new
        _put(new, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno not in FULL:
            raise
        stays = "the earlier folder stays" if path.exists() else "nothing is left of it"
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"cannot write: {reason}; {stays}", str(path)) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(new: Path, path: Path) -> None:
    """Rename a finished folder to its place; the earlier folder is gone at the end, or back if that fails."""
    occupied, old = path.exists(), path.with_name(temporary_name(path.name, "old"))
    try:
        if occupied:
            with contextlib.suppress(OSError):
                os.chmod(new, stat.S_IMODE(path.stat().st_mode))
            os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            if occupied:
                os.rename(old, path)
            raise
    except OSError as error:
        hint = "a folder that something is mounted on cannot be replaced, name one inside it"
        raise OutputFolderError(f"{path}: the folder cannot be put there: {error} ({hint})") from error
    if occupied:
        shutil.rmtree(old, ignore_errors=True)


def clear_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a path that `replacing_folder` writes.

    A folder that was moved aside, and whose successor never came, goes back to its place.
    """
    start = _beginning(path.name)
    for found in sorted(os.listdir(path.parent)):
        # Nothing but the digits and the end follows.
        if not is_temporary(found) or found[: -len("01234567.fastflow-tmp")] != start:
            continue
        if found.endswith("old") and not os.path.lexists(path):
            os.rename(path.with_name(found), path)
        else:
            shutil.rmtree(path.with_name(found), ignore_errors=True)
