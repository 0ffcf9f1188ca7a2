"""Locks of output folders: one process writes into a folder at a time. Torch-free."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow.errors import OutputFolderError

LOCK = ".lock"
# Files that a run was writing when it was killed stay under these names.
_TEMPORARY = re.compile(r"\.(run\.json|summary\.json|journal\.jsonl|results-\d+\.\w+)\.[a-z0-9_]{8}")


@contextlib.contextmanager
def locked(folder: str | PathLike[str]) -> Iterator[None]:
    """Hold an output folder for this process. The lock ends with the process, however it ends.

    Files that a killed run had begun to write are removed.

    Raises:
        OutputFolderError: another process holds it.
    """
    path = Path(folder) / LOCK
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            # A record lock would not keep out a second run of this very process.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(handle, 200, 0).decode("utf-8", "replace").strip()
            raise OutputFolderError(
                f"{folder}: another run is writing here ({holder or 'unknown process'})"
            ) from error
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        for name in filter(is_temporary, os.listdir(folder)):
            os.unlink(Path(folder) / name)
        yield
    finally:
        os.close(handle)


def is_temporary(name: str) -> bool:
    """Whether a file of an output folder is one that a run was writing when it was killed."""
    return _TEMPORARY.fullmatch(name) is not None
