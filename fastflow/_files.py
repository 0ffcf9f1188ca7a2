"""Atomic writing: a reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO

from fastflow.errors import OutputFolderError


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A stream into a temporary file, which takes the place of `path` at the end.

    The temporary file lies in the same folder, which is created when missing. Where the body raises, the old
    file stays and the temporary one goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            # Without it, a power cut could leave an empty file under the new name.
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


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


@contextlib.contextmanager
def replacing_folder(path: str | PathLike[str]) -> Iterator[Path]:
    """A new folder beside `path`, which takes its place at the end; the earlier folder is gone then.

    Where the body raises, the new folder goes and the old one stays.

    Raises:
        OutputFolderError: the new folder cannot be put there.
    """
    # A link is resolved, so that the folder behind it is replaced and not the link.
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        # The new folder lies inside the one of mkdtemp, which other users could not read.
        new = work / "new"
        new.mkdir()
        yield new
        _put(new, path, work.with_name(f"{work.name}.old"))
        sync_folder(path.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put(new: Path, path: Path, old: Path) -> None:
    """Rename a finished folder to its place; the earlier folder is gone at the end, or back if that fails."""
    occupied = path.exists()
    try:
        if occupied:
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
