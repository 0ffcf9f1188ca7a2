"""Decoded slices on disk: files are decoded once, and slices may be more than memory holds.

A cache is a folder with a mark (`CACHEDIR.TAG`). Below it, a folder for each preprocessing holds segments
(`_segments.py`), which are not changed once they are finished. A run that finds files missing writes a
segment of its own, which it holds by a lock; so any number of runs can fill a cache at once. An index is
written every half minute: a run that is killed loses no more than that.

Torch-free.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastflow._files import write_text
from fastflow._places import Kind, check_place, make_folder, without_mark
from fastflow.data._grid_records import load_grids, save_grids
from fastflow.data._segments import DECODING, FORMAT, INDEX, Segment, SegmentWriter, remove, state_of
from fastflow.data.endings import is_image
from fastflow.data.grids import Grid, read_grids
from fastflow.data.indexed_images import Images, IndexedImages, as_array
from fastflow.data.preprocess import Preprocess, slice_indices
from fastflow.data.statistics import NUMBERS
from fastflow.errors import CacheWarning, FastflowError

# A cache without a name of its own lies beside the model folder under this one, which no listing looks into.
DEFAULT_NAME = ".fastflow-cache"
TAG = "CACHEDIR.TAG"
# Programs for backups know folders with this mark: https://bford.info/cachedir/
_TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Decoded slices of fastflow. This folder can be removed at any time.\n"
)
# A disk keeps at least so many bytes free for the model and everybody else.
RESERVE_BYTES = 256 << 20
_SEGMENT = re.compile(r"[0-9a-f]{16}")
_KIND = Kind("a cache", "a cache needs a folder of its own")


class Block(NamedTuple):
    """The rows of one file.

    Attributes:
        part: number of the array that holds them.
        first: row.
        measured: (n, 75) of its n slices.
    """

    part: int
    first: int
    measured: NDArray[np.float64]


class MemorySlices:
    """Slices that are kept in memory alone.

    Attributes:
        found: blocks of files that need not be decoded; none.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._size = preprocess.size
        self._kept: list[Images] = []
        self._rows = 0
        self.found: Mapping[str, Block] = {}

    def add(self, path: str, images: Images, measured: NDArray[np.float64]) -> Block:
        """Keep the slices (n, 1, H, W) of a file and what was measured of them, (n, 75)."""
        self._kept.append(images)
        self._rows += len(images)
        return Block(0, self._rows - len(images), measured)

    def images(self, blocks: Sequence[Block]) -> Images:
        """The images of the blocks, (N, 1, H, W); here, of everything that was added."""
        return np.concatenate(self._kept) if self._kept else np.zeros((0, 1, *self._size), dtype=np.uint8)


class SliceCache:
    """A folder in which decoded slices are kept.

    Args:
        folder: made when the first file is missing in it.
        required: whether a folder that cannot be made or written is an error; else it is a warning, and
            slices stay in memory.

    Attributes:
        asked: files that were asked for so far.
        reused: files among them that had not to be decoded.

    Raises:
        OutputFolderError: the folder holds other files.
        OSError: it cannot be listed.
    """

    def __init__(self, folder: str | PathLike[str], required: bool = False) -> None:
        self.folder, self.required = Path(folder), required
        self.asked = self.reused = 0
        try:
            check_place(self.folder, _KIND, without_mark(TAG), may_replace=True)
        except OSError:
            # A cache that nobody asked for is missed when its first slice cannot be kept.
            if required:
                raise

    def make(self) -> None:
        """Make the folder, where it is missing, and see whether it can be written.

        Raises:
            OutputFolderError: it is no folder.
            OSError: it cannot be written, or the disk is full.
        """
        make_folder(self.folder, 0)
        if not (self.folder / TAG).exists():
            write_text(self.folder / TAG, _TAG_TEXT)
            write_text(self.folder / ".gitignore", "*\n")

    def read_grids(self, paths: Sequence[str], workers: int = 1) -> list[Grid | None]:
        """As `fastflow.data.grids.read_grids`; headers that were read before are not read again.

        Nothing is told where grids cannot be kept: they are read again next time.
        """
        states = {path: state_of(path) for path in paths}
        known = load_grids(self.folder)
        found: dict[str, Grid | None] = {}
        for path, state in states.items():
            before = known.get(os.path.abspath(path))
            if before is not None and before[0] == state:
                found[path] = before[1]
        missing = [path for path in states if path not in found]
        found |= dict(zip(missing, read_grids(missing, workers), strict=True))
        for path in missing:
            state, grid = states[path], found[path]
            if state is not None and grid is not None and state == state_of(path):
                known[os.path.abspath(path)] = state, grid
        if missing:
            with contextlib.suppress(OSError, FastflowError):
                self.make()
                save_grids(self.folder, known)
        return [found[path] for path in paths]

    @contextlib.contextmanager
    def opened(self, paths: Sequence[str], preprocess: Preprocess) -> Iterator[CachedSlices]:
        """The slices of files, of which those that are new are kept.

        Args:
            paths: of the files; relative ones are relative to the working directory.
            preprocess: which slices, and how.
        """
        slices = CachedSlices(self.folder / _name_of(preprocess), paths, preprocess)
        self.asked += len(paths)
        self.reused += sum(path in slices.found for path in paths)
        if any(path not in slices.found for path in paths):
            try:
                self.make()
            except (OSError, FastflowError) as error:
                if self.required:
                    raise
                slices.keep_in_memory(error)
        with slices:
            yield slices


def opened(
    cache: SliceCache | None, paths: Sequence[str], preprocess: Preprocess
) -> contextlib.AbstractContextManager[MemorySlices | CachedSlices]:
    """Slices that are kept in a cache, or in memory where there is none."""
    return (
        contextlib.nullcontext(MemorySlices(preprocess)) if cache is None else cache.opened(paths, preprocess)
    )


class CachedSlices:
    """The slices of some files, of which the cache has some; see `SliceCache.opened`.

    Attributes:
        found: blocks of the files that need not be decoded, by path.
    """

    def __init__(self, folder: Path, paths: Sequence[str], preprocess: Preprocess) -> None:
        self._folder, self._preprocess = folder, preprocess
        # A file that changes while it is decoded has another state afterwards, and is not kept.
        self._states = {path: state_of(path) for path in paths}
        self._maps: list[Images] = []
        self.found: Mapping[str, Block] = self._find()
        self._segment: SegmentWriter | None = None
        self._segment_part, self._memory = -1, MemorySlices(preprocess)
        self._is_full = False

    # -- what is there ---------------------------------------------------------------------------------------

    def _find(self) -> dict[str, Block]:
        found: dict[str, Block] = {}
        wanted = {os.path.abspath(path): path for path in self._states}
        for folder in _segments(self._folder):
            try:
                if not (folder / INDEX).exists():
                    # A run is about to write here, or was killed.
                    remove(folder)
                    continue
                found |= self._read(folder, wanted, found)
            except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
                warnings.warn(
                    f"{folder}: this part of the cache is damaged and not used, its files are decoded again: "
                    f"{error}",
                    CacheWarning,
                    stacklevel=6,
                )
                remove(folder, damaged=True)
        return found

    def _read(self, folder: Path, wanted: Mapping[str, str], found: Mapping[str, Block]) -> dict[str, Block]:
        """The blocks of a segment that are wanted and not found yet, all of them checked.

        Raises:
            ValueError: it is damaged.
            OSError: it cannot be read.
        """
        segment, blocks = Segment(folder, self._preprocess), dict[str, Block]()
        for entry in segment.entries:
            path = wanted.get(entry.path)
            if path is None or path in found or self._states[path] != (entry.size, entry.mtime_ns):
                continue
            blocks[path] = Block(len(self._maps), entry.first, segment.check(entry))
        if blocks:
            self._maps.append(segment.images)
        return blocks

    # -- what is new -----------------------------------------------------------------------------------------

    def add(self, path: str, images: Images, measured: NDArray[np.float64]) -> Block:
        """Keep the slices (n, 1, H, W) of a file and what was measured of them, (n, 75).

        Where the disk cannot take them, a warning says so, and they and all later ones stay in memory.

        Raises:
            OSError: what was written before did not reach the disk.
        """
        if not self._is_full:
            try:
                block = self._write(path, images, measured)
            except (OSError, FastflowError) as error:
                self.keep_in_memory(error)
            else:
                if self._segment is not None and self._segment.is_due:
                    self._segment.publish()
                return block
        return self._memory.add(path, images, measured)._replace(part=-1)

    def keep_in_memory(self, error: Exception) -> None:
        """Write nothing more, for a reason that is told."""
        self._is_full = True
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        warnings.warn(
            f"{self._folder.parent}: slices cannot be kept in this cache and stay in memory: {reason}",
            CacheWarning,
            stacklevel=4,
        )

    def _write(self, path: str, images: Images, measured: NDArray[np.float64]) -> Block:
        if self._segment is None:
            missing = [other for other in self._states if other not in self.found]
            _check_space(self._folder.parent, _needed(missing, self._preprocess))
            self._segment = SegmentWriter(self._folder / secrets.token_hex(8), self._preprocess)
            self._segment_part = len(self._maps)
        state = self._states.get(path)
        # The file that was decoded is the one whose state is known only where that is still its state.
        first = self._segment.append(path, state if state == state_of(path) else None, images, measured)
        return Block(self._segment_part, first, measured)

    def images(self, blocks: Sequence[Block]) -> Images:
        """The images of blocks, (N, 1, H, W), which stay on disk as far as they are there."""
        parts = list(self._maps)
        if self._segment is not None:
            parts.append(self._segment.mapped())
        # The last part is in memory, and an index of -1 names it.
        parts.append(self._memory.images(()))
        counts = [len(block.measured) for block in blocks]
        part = np.repeat(np.array([b.part % len(parts) for b in blocks], dtype=np.int32), counts)
        row = [np.arange(block.first, block.first + n) for block, n in zip(blocks, counts, strict=True)]
        return as_array(IndexedImages(parts, part, np.concatenate(row) if row else np.zeros(0, np.int64)))

    def __enter__(self) -> CachedSlices:
        return self

    def __exit__(self, *error: object) -> None:
        """Finish what was written, also where reading was interrupted.

        Raises:
            OSError: it did not reach the disk, so that nothing of it can be trusted.
        """
        if self._segment is not None:
            self._segment.close()


def _name_of(preprocess: Preprocess) -> str:
    """The name of the folder of a preprocessing."""
    known = {"format": FORMAT, "decoding": DECODING, "preprocess": preprocess.to_dict()}
    return hashlib.blake2b(json.dumps(known, sort_keys=True).encode(), digest_size=8).hexdigest()


def _segments(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return [folder / name for name in sorted(os.listdir(folder)) if _SEGMENT.fullmatch(name)]
    return []


def _needed(paths: Sequence[str], preprocess: Preprocess) -> int:
    """Bytes that the slices of files take in the cache."""
    count = len(slice_indices(preprocess.slices, preprocess.grid[1] if preprocess.grid else 1 << 40))
    row = preprocess.size[0] * preprocess.size[1] + 8 * NUMBERS
    return row * sum(1 if is_image(path) else count for path in paths)


def _check_space(folder: Path, needed: int) -> None:
    """Raise OSError where a disk has no room for so many bytes and a reserve."""
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if state.f_blocks and free < needed + RESERVE_BYTES:
        raise OSError(f"they take about {needed / 1e6:.1f} MB, and {free / 1e6:.1f} MB are free there")
