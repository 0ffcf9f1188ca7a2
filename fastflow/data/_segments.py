"""A part of a slice cache: the slices of many files, one after the other, and an index of them.

A segment is a folder. ``images.u8`` has the slices, ``measured.f8`` what `fastflow.data.statistics.measure`
says of them, and ``index.json`` which file has which rows, in which state that file was (size, time of its
last change), and a CRC-32 of its rows; its own CRC-32 is its first line. It is written atomically after the
rows have reached the disk, so that it names nothing that is not there. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflow._files import write_text
from fastflow._locks import locked
from fastflow.data.indexed_images import Images
from fastflow.data.preprocess import Preprocess
from fastflow.data.statistics import NUMBERS
from fastflow.errors import CacheWarning, FastflowError

# The layout of the files.
FORMAT = 1
# This number is raised whenever `read_image` or `measure` gives other values for the same file.
DECODING = 1
INDEX, IMAGES, MEASURED = "index.json", "images.u8", "measured.f8"
# An index is written after so many seconds, so that a killed run loses little.
PUBLISH_INTERVAL = 30.0
# A segment without an index that is younger may belong to a run that is about to lock it.
ABANDONED_SECONDS = 60.0
State = tuple[int, int]


class Entry(NamedTuple):
    """A file in an index.

    Attributes:
        path: of the file, absolute.
        size: of the file in bytes.
        mtime_ns: time of the file's last change.
        first: row of its first slice.
        slices: how many rows it has.
        crc: CRC-32 of images and measured numbers.
    """

    path: str
    size: int
    mtime_ns: int
    first: int
    slices: int
    crc: int


class Segment:
    """A segment that is read.

    Args:
        folder: of the segment.
        preprocess: of which its slices must be.

    Attributes:
        images: (R, 1, H, W), a map of the file.
        entries: the files whose slices they are.

    Raises:
        ValueError: it is damaged, of another preprocessing or of another version.
        OSError: it cannot be read.
    """

    def __init__(self, folder: Path, preprocess: Preprocess) -> None:
        rows, self.entries = _read_index(folder / INDEX, preprocess)
        self.images = _map(folder / IMAGES, "u1", (rows, 1, *preprocess.size))
        self._measured = _map(folder / MEASURED, "<f8", (rows, NUMBERS))

    def check(self, entry: Entry) -> NDArray[np.float64]:
        """Compare all rows of a file with their checksum. Returns what was measured of its slices, (n, 75).

        Raises:
            ValueError: they are damaged.
        """
        mine = slice(entry.first, entry.first + entry.slices)
        measured = np.array(self._measured[mine], dtype=np.float64)
        if (
            not 0 <= entry.first < mine.stop <= len(self.images)
            or _crc(self.images[mine], measured) != entry.crc
        ):
            raise ValueError(f"the slices of {entry.path} have another checksum")
        return measured


class SegmentWriter:
    """A new segment, which is held by a lock while it is written.

    Args:
        folder: of the segment; made here.
        preprocess: of which its slices are.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path, preprocess: Preprocess) -> None:
        self._folder, self._preprocess = folder, preprocess
        self._rows, self._entries = 0, list[Entry]()
        self._is_new = False
        self._last = time.monotonic()
        with contextlib.ExitStack() as stack:
            folder.mkdir(parents=True)
            with contextlib.suppress(FastflowError):
                # Without locks on the file system, nobody removes a segment that is being written.
                stack.enter_context(locked(folder))
            self._images: BinaryIO = stack.enter_context(open(str(folder / IMAGES), "w+b", buffering=0))
            self._measured: BinaryIO = stack.enter_context(open(folder / MEASURED, "w+b", buffering=0))
            self._stack = stack.pop_all()

    def append(self, path: str, state: State | None, images: Images, measured: NDArray[np.float64]) -> int:
        """Write the rows of a file, whose state is None where it is not to be found again.

        Returns:
            The first row.

        Raises:
            OSError: the disk is full, or the like; earlier rows stay as they are.
        """
        first = self._rows
        _write_all(self._images, images)
        _write_all(self._measured, measured.astype("<f8", copy=False))
        self._rows += len(images)
        if state is not None:
            entry = Entry(os.path.abspath(path), *state, first, len(images), _crc(images, measured))
            self._entries.append(entry)
            self._is_new = True
        return first

    @property
    def is_due(self) -> bool:
        """Whether rows should be published."""
        return time.monotonic() - self._last >= PUBLISH_INTERVAL

    def mapped(self) -> Images:
        """The images that were written so far, also where somebody has removed the file meanwhile."""
        return _map_open(self._images, "u1", (self._rows, 1, *self._preprocess.size))

    def publish(self) -> None:
        """Bring rows to the disk, and then the index that names them.

        Raises:
            OSError: rows did not reach the disk.
        """
        if not self._is_new:
            return
        # A system tells once that it lost what was written, so that this is not tried again.
        self._is_new, self._last = False, time.monotonic()
        for stream in (self._images, self._measured):
            try:
                os.fsync(stream.fileno())
            except OSError as error:
                reason = f"slices did not reach the disk: {error.strerror}; free some space, or use no cache"
                raise OSError(error.errno, reason, str(self._folder)) from error
        document = {
            "format": FORMAT,
            "decoding": DECODING,
            "preprocess": self._preprocess.to_dict(),
            "rows": self._rows,
            "files": self._entries,
        }
        text = json.dumps(document)
        # A folder that somebody has removed stays removed.
        if not self._folder.exists():
            return
        try:
            write_text(self._folder / INDEX, f"{zlib.crc32(text.encode()):08x}\n{text}\n")
        except OSError as error:
            # This run has its slices, and the next one decodes them again.
            warnings.warn(f"{self._folder}: no index can be written: {error}", CacheWarning, stacklevel=4)

    def close(self) -> None:
        """Publish and let go. Raises OSError where the rows did not reach the disk."""
        with self._stack:
            self.publish()
        if not self._entries:
            shutil.rmtree(self._folder, ignore_errors=True)


# -- files ---------------------------------------------------------------------------------------------------


def state_of(path: str) -> State | None:
    """Size and time of the last change of a file; None where there is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns


def _crc(images: Images, measured: NDArray[np.float64]) -> int:
    return zlib.crc32(
        measured.astype("<f8", copy=False).tobytes(), zlib.crc32(np.ascontiguousarray(images).data)
    )


def _read_index(path: Path, preprocess: Preprocess) -> tuple[int, list[Entry]]:
    """Rows and entries of an index. Raises ValueError where it is damaged."""
    crc, _, text = path.read_text(encoding="utf-8").partition("\n")
    text = text.removesuffix("\n")
    if crc != f"{zlib.crc32(text.encode()):08x}":
        raise ValueError(f"{INDEX} has another checksum")
    document: dict[str, Any] = json.loads(text)
    if (document["format"], document["decoding"]) != (FORMAT, DECODING) or document[
        "preprocess"
    ] != preprocess.to_dict():
        raise ValueError(f"{INDEX} is of another preprocessing or version")
    return int(document["rows"]), [Entry(*entry) for entry in document["files"]]


def _map(path: Path, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    # A map knows its file by a name that is text.
    with open(str(path), "rb") as stream:
        return _map_open(stream, dtype, shape)


def _map_open(stream: BinaryIO, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """An array whose values are those of a file, read only when they are used.

    Raises:
        ValueError: the file is too short.
    """
    if not shape[0]:
        return np.zeros(shape, dtype=dtype)
    needed, found = int(np.prod(shape)) * np.dtype(dtype).itemsize, os.fstat(stream.fileno()).st_size
    if found < needed:
        raise ValueError(f"{Path(str(stream.name)).name} has {found} of {needed} bytes")
    return np.memmap(stream, dtype=dtype, mode="r", shape=shape)


def _write_all(stream: BinaryIO, values: NDArray[Any]) -> None:
    """Write an array; a system may take a part of it at a time."""
    rest = np.ascontiguousarray(values).data.cast("B")
    while rest:
        rest = rest[stream.write(rest) :]


def remove(folder: Path, damaged: bool = False) -> None:
    """Remove a segment that is damaged or has no index, unless a run is writing it."""
    with contextlib.suppress(OSError, FastflowError):
        if not damaged and time.time() - folder.stat().st_mtime < ABANDONED_SECONDS:
            return
        with locked(folder):
            # The run that wrote it may have finished meanwhile.
            if damaged or not (folder / INDEX).exists():
                shutil.rmtree(folder, ignore_errors=True)
