"""The journal of a run: rows are made durable batch by batch, and survive whatever stops the run.

A line is the CRC-32 of its content, the input's key and the row as JSON. Torch-free.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fastflow._files import replacing, sync_folder, where_known
from fastflow.archive.inputs import name_bytes
from fastflow.errors import JournalError

KEY_BYTES = 16
# Starts may overlap, so they are looked for ahead of each position.
_LINE_START = re.compile(rb"(?=[0-9a-f]{8} [0-9a-f]{%d} )" % (2 * KEY_BYTES))
Row = dict[str, Any]


def key_of(path: str, size: int, mtime_ns: int, model_hash: str) -> bytes:
    """16 bytes that stand for one state of a file under one model.

    Args:
        path: of the file; relative ones are relative to the working directory.
        size: bytes, -1 where there is no file.
        mtime_ns: time of the last change, -1 where there is no file.
        model_hash: of the model folder.
    """
    fields = (
        name_bytes(os.path.abspath(path)),
        str(size).encode(),
        str(mtime_ns).encode(),
        model_hash.encode(),
    )
    return hashlib.blake2b(b"\0".join(fields), digest_size=KEY_BYTES).digest()


@dataclasses.dataclass
class Journal:
    """An append-only file of rows.

    Attributes:
        path: the file; created by the first `append`.
        size: bytes that are whole and durable.
    """

    path: Path
    size: int = 0

    @classmethod
    def open(cls, path: str | PathLike[str]) -> Journal:
        """A journal that may be there already. At its end, bytes that are no whole line are cut off.

        Raises:
            JournalError: a line is damaged and a whole one follows.
            OSError: it cannot be read or cut.
        """
        journal = cls(Path(path))
        if not journal.path.exists():
            return journal
        length = journal.path.stat().st_size
        for _, _, end in journal._lines(0, length):
            journal.size = end
        if journal.size < length:
            os.truncate(journal.path, journal.size)
        return journal

    def append(self, rows: Iterable[tuple[bytes, Row]]) -> list[int]:
        """Write rows and wait until they are durable.

        Returns:
            The offset at which each row ends.

        Raises:
            OSError: they cannot be written; the journal is as before.
        """
        lines = [_line(key, row) for key, row in rows]
        block = b"".join(lines)
        ends = [self.size + n for n in itertools.accumulate(map(len, lines))]
        fresh = not self.path.exists()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _write_all(handle, block, self.size)
            with where_known():
                os.fdatasync(handle)
        except OSError as error:
            # Half a line may have been written. Cutting it off needs no space on a full disk.
            with contextlib.suppress(OSError):
                os.ftruncate(handle, self.size)
            raise OSError(error.errno, f"cannot write: {error.strerror}", str(self.path)) from error
        finally:
            os.close(handle)
        if fresh:
            sync_folder(self.path.parent)
        self.size += len(block)
        return ends

    def ends(self) -> Iterator[int]:
        """The offset at which each row ends."""
        for *_, end in self._lines(0, self.size):
            yield end

    def keys(self) -> Iterator[bytes]:
        """The key of each row."""
        for key, *_ in self._lines(0, self.size):
            yield key

    def read(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[bytes, Row]]:
        """The (key, row) of lines between two offsets that are starts of lines."""
        for key, text, _ in self._lines(start, self.size if stop is None else stop):
            yield key, json.loads(text)

    def _lines(self, start: int, stop: int) -> Iterator[tuple[bytes, bytes, int]]:
        """(key, text of the row, offset of the next line); ends early where no whole line follows."""
        if start >= stop:
            return
        with self.path.open("rb") as stream:
            stream.seek(start)
            end = start
            for line in stream:
                if end >= stop:
                    return
                parsed = _parse(line)
                if parsed is None:
                    if _holds_whole_line(line) or any(map(_holds_whole_line, stream)):
                        raise JournalError(
                            f"{self.path}: the line at byte {end} is damaged; run anew into another folder"
                        )
                    return
                end += len(line)
                yield *parsed, end

    def keep(self, wanted: Callable[[bytes, Row], bool]) -> int:
        """Rewrite the journal, atomically, without the rows that are not wanted. Returns how many went."""
        gone = 0
        with replacing(self.path) as stream:
            for key, row in self.read():
                if wanted(key, row):
                    stream.write(_line(key, row))
                else:
                    gone += 1
            size = stream.tell()
        self.size = size
        return gone


def _line(key: bytes, row: Row) -> bytes:
    # Names in any encoding survive as ASCII, and no line holds a line break of its own.
    return _with_checksum(f"{key.hex()} {json.dumps(row, separators=(',', ':'))}".encode("ascii"))


def _with_checksum(text: bytes) -> bytes:
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parse(line: bytes) -> tuple[bytes, bytes] | None:
    """The (key, text of the row) of a line; None where any of its bytes is another one than was written."""
    text = line[9:-1]
    if line != _with_checksum(text):
        return None
    try:
        key = bytes.fromhex(text[: 2 * KEY_BYTES].decode("ascii"))
    except ValueError:
        return None
    # The checksum of nothing is zero, so a line of zeros and a space has a right one.
    return (key, text[2 * KEY_BYTES + 1 :]) if len(key) == KEY_BYTES else None


def _holds_whole_line(line: bytes) -> bool:
    """Whether bytes up to a line break end with a line as it was written.

    A line whose own break was changed is read together with the next one.
    """
    return any(_parse(line[found.start() :]) is not None for found in _LINE_START.finditer(line))


def _write_all(handle: int, block: bytes, at: int) -> None:
    view = memoryview(block)
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written


class FinishedInputs:
    """The inputs that a journal holds rows of: 24 bytes for each of them, whatever their names.

    Args:
        keys: of the journal's rows; a key may occur more than once, where an input was given more than once.
    """

    def __init__(self, keys: Iterable[bytes]) -> None:
        packed = bytearray()
        for key in keys:
            packed += key
        found = (
            np.frombuffer(bytes(packed), dtype=f"S{KEY_BYTES}")
            if packed
            else np.empty(0, dtype=f"S{KEY_BYTES}")
        )
        self._keys, self._left = np.unique(found, return_counts=True)

    def take(self, key: bytes) -> bool:
        """Whether a row of this key is left; it is then used up."""
        # NumPy takes zeros at the end of a byte string for padding, and gives strings without them.
        bare = key.rstrip(b"\0")
        at = int(np.searchsorted(self._keys, np.bytes_(bare)))
        if at == len(self._keys) or bytes(self._keys[at]) != bare or self._left[at] == 0:
            return False
        self._left[at] -= 1
        return True

    def left(self) -> dict[bytes, int]:
        """Keys that no input has taken, with their counts."""
        rest = np.flatnonzero(self._left)
        return {bytes(self._keys[i]).ljust(KEY_BYTES, b"\0"): int(self._left[i]) for i in rest}


def __getattr__(name: str) -> Any:
    if name != "Done":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("Done is now called FinishedInputs", DeprecationWarning, stacklevel=2)
    return FinishedInputs
