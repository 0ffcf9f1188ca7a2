"""Atomic writing: a reader sees the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from os import PathLike
from pathlib import Path


def write_bytes(path: str | PathLike[str], content: bytes) -> None:
    """Write a file by way of a temporary one in the same folder, which is created when missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            # Or a power cut could leave an empty file under the new name.
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text(path: str | PathLike[str], text: str) -> None:
    """`write_bytes` of UTF-8 text. What is not valid Unicode (a file name of another encoding) is written as an escape."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))
