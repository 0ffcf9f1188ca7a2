"""Atomic writing: a reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def replacing(path: str | PathLike[str]) -> Iterator[BinaryIO]:
    """A stream into a temporary file of the same folder (created when missing), which takes the place of `path` at the end.

    Where the body raises, the old file stays and the temporary one goes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream
            stream.flush()
            # Or a power cut could leave an empty file under the new name.
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | PathLike[str]) -> None:
    """Make names in a folder last, where the file system can."""
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
    """`write_bytes` of UTF-8 text. What is not valid Unicode (a file name of another encoding) is written as an escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
