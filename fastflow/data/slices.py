"""Coronal slices, and sets of them in memory."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastflow.data._header import Flag, Header
from fastflow.data._png import load_png
from fastflow.data.endings import is_image
from fastflow.data.indexed_images import select_rows
from fastflow.data.preprocess import Preprocess, check_not_blank, pad_evenly, without_padding
from fastflow.data.preprocess import coronal_slices as coronal_slices
from fastflow.data.slice_cache import Block, SliceCache, opened
from fastflow.data.statistics import measure
from fastflow.data.volume import open_scan
from fastflow.errors import VolumeError

if TYPE_CHECKING:
    from fastflow.data.manifest import Record

Result = NDArray[np.uint8] | VolumeError
Loaded = tuple[NDArray[np.uint8], NDArray[np.float64]] | VolumeError
# One process of a pool is given at most so many files at once, and so many times ahead of the results.
MAX_FILES_PER_TASK, TASKS_AHEAD = 16, 4


@dataclasses.dataclass(frozen=True)
class SliceSet:
    """Slices of V volumes, N in all.

    Attributes:
        images: (N, 1, H, W) uint8; an array, a map of a file, or `IndexedImages` of
            `fastflow.data.indexed_images`: it is indexed like an array, and what is not asked
            for stays on disk.
        labels: (N,) int64, index into `class_names`; -1 is unknown.
        volumes: (N,) int64, index into `paths`.
        paths: V file names.
        subjects: V subject names.
        class_names: K names.
        measured: (N, 75) what `fastflow.data.statistics.measure` says of each slice; None where unknown.

    Raises:
        ValueError: a shape or dtype does not fit, or an index lies out of range; the message names the field.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    volumes: NDArray[np.int64]
    paths: tuple[str, ...]
    subjects: tuple[str, ...]
    class_names: tuple[str, ...]
    measured: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.ndim != 4 or self.images.shape[1] != 1 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images must be (N, 1, H, W) uint8, got {self.images.shape} {self.images.dtype}"
            )
        if self.measured is not None and len(self.measured) != n:
            raise ValueError(f"measured must have {n} rows, got {len(self.measured)}")
        if self.labels.shape != (n,) or self.volumes.shape != (n,) or len(self.paths) != len(self.subjects):
            raise ValueError(f"labels and volumes must be ({n},), paths and subjects of one length")
        if self.labels.dtype != np.int64 or (n and self.labels.min() < -1):
            raise ValueError(
                f"labels must be int64 from -1, got {self.labels.dtype} {np.unique(self.labels)}"
            )
        if self.volumes.dtype != np.int64 or (
            n and not 0 <= self.volumes.min() <= self.volumes.max() < len(self.paths)
        ):
            last = len(self.paths) - 1
            raise ValueError(
                f"volumes must be int64 from 0 to {last}, got {self.volumes.dtype} {np.unique(self.volumes)}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def volume_labels(self) -> NDArray[np.int64]:
        """(V,) int64, the label of each volume; -1 where it is unknown."""
        labels = np.full(len(self.paths), -1, dtype=np.int64)
        labels[self.volumes] = self.labels
        return labels

    def subset(self, volumes: Sequence[int]) -> SliceSet:
        """The slices of some volumes, which get new numbers in the order given; images on disk stay there.

        Raises:
            ValueError: a volume is named twice or does not exist.
        """
        number = {int(volume): i for i, volume in enumerate(volumes)}
        if len(number) < len(volumes) or any(not 0 <= volume < len(self.paths) for volume in number):
            raise ValueError(
                f"volumes must be different numbers from 0 to {len(self.paths) - 1}, got {list(volumes)}"
            )
        chosen = np.flatnonzero(np.isin(self.volumes, list(number)))
        chosen = chosen[np.argsort([number[int(v)] for v in self.volumes[chosen]], kind="stable")]
        return SliceSet(
            select_rows(self.images, chosen),
            self.labels[chosen],
            np.array([number[int(v)] for v in self.volumes[chosen]], dtype=np.int64),
            tuple(self.paths[v] for v in volumes),
            tuple(self.subjects[v] for v in volumes),
            self.class_names,
            None if self.measured is None else self.measured[chosen],
        )


@dataclasses.dataclass(frozen=True)
class LoadedImage:
    """The content of one file.

    Attributes:
        images: (n, 1, H, W) uint8.
        flags: doubts about the file, whose codes are among `fastflow.data.volume.FLAG_CODES`.
        content: (h, w) of the slices before they were padded; all of the image when None.
        negative: share of the volume's voxels below 0; None for a PNG.
    """

    images: NDArray[np.uint8]
    flags: tuple[Flag, ...]
    content: tuple[int, int] | None = None
    negative: float | None = None

    def measure(self) -> NDArray[np.float64]:
        """(n, 75), see `fastflow.data.statistics.measure`."""
        pixels = self.images[:, 0]
        return measure(
            pixels if self.content is None else without_padding(pixels, self.content), self.negative
        )


def read_image(path: str, preprocess: Preprocess) -> LoadedImage:
    """The 8-bit slices of one volume, or the one slice of a PNG.

    A volume is streamed: memory holds some chunks of 0.5 MiB (or one plane along the file's last axis, if
    that is larger), the wanted slices and the largest 0.1 % of the voxels. All frames of a PET series are
    kept as they are stored, beside their median.

    Args:
        path: the file.
        preprocess: which slices, and how.

    Returns:
        The slices, exactly those that `preprocess` takes of `read_volume(path)`, and doubts about the file.

    Raises:
        VolumeError: the file cannot be used. Where the header alone says so, the voxels are not read.
    """
    if is_image(path):
        pixels = load_png(path, preprocess.size)
        check_not_blank(path, pixels[None])
        height, width = pixels.shape
        return LoadedImage(pad_evenly(pixels, preprocess.size)[None, None], (), (height, width))
    with open_scan(path) as scan:
        header = scan.header
        indices = _locate(path, preprocess, header)
        width, _, height = header.canonical_shape
        if header.frames > 1:
            images, negative = preprocess.take(scan.volume())
            return LoadedImage(images, header.flags, (height, width), negative)
        slices = _StoredSlices(header, indices)
        intensities = preprocess.intensities(header.dtype, header.voxels, header.scaling)
        for chunk in scan.chunks:
            slices.take(chunk)
            intensities.add(chunk)
        images = preprocess.render(path, slices.canonical(), header.scaling, intensities, indices)
        return LoadedImage(images, header.flags, (height, width), intensities.negative_share)


def _locate(path: str, preprocess: Preprocess, header: Header) -> list[int]:
    """Indices of the slices; a volume on another grid is told with the unit that its file states."""
    try:
        return preprocess.locate(path, header.canonical_shape, header.spacing)
    except VolumeError as error:
        if error.code != "grid_mismatch" or header.unit == "mm":
            raise
        message = f"{error.message}; the file states its lengths in {header.unit or 'no unit, taken for mm'}"
        raise VolumeError(path, error.code, message) from error


class _StoredSlices:
    """Coronal slices of a volume that passes by, cut along the axis that is nearest to the anterior one."""

    def __init__(self, header: Header, indices: Sequence[int]) -> None:
        self._header = header
        anterior = header.file_axis(1)
        forward = header.axes[anterior][1] > 0
        self._indices = np.array([i if forward else header.shape[anterior] - 1 - i for i in indices])
        # A chunk has the axes of the file in reverse order.
        self._axis, self._plane = 2 - anterior, 0
        self._left = [axis for axis in (2, 1, 0) if axis != anterior]
        self._kept = np.empty(
            (len(indices), *(header.shape[axis] for axis in self._left)), header.dtype.newbyteorder("=")
        )

    def take(self, chunk: NDArray[Any]) -> None:
        first, self._plane = self._plane, self._plane + len(chunk)
        if self._axis == 0:
            inside = (self._indices >= first) & (self._indices < self._plane)
            self._kept[inside] = chunk[self._indices[inside] - first]
        else:
            self._kept[:, first : self._plane] = np.moveaxis(
                chunk.take(self._indices, self._axis), self._axis, 0
            )

    def canonical(self) -> NDArray[Any]:
        """(n, Z, X) as `coronal_slices` gives them, stored values."""
        up, right = self._header.file_axis(2), self._header.file_axis(0)
        kept = self._kept if self._left == [up, right] else self._kept.transpose(0, 2, 1)
        return kept[:, :: -self._header.axes[up][1], :: self._header.axes[right][1]]


def load_image(path: str, preprocess: Preprocess) -> NDArray[np.uint8]:
    """The images of `read_image`, (n, 1, H, W).

    Raises:
        VolumeError: the file cannot be used.
    """
    return read_image(path, preprocess).images


def _load_or_error(path: str, preprocess: Preprocess) -> Loaded:
    try:
        image = read_image(path, preprocess)
        return image.images, image.measure()
    except VolumeError as error:
        # The copy has no traceback, which would hold the file's buffers for as long as the error is kept.
        return VolumeError(error.path, error.code, error.message)
    except Exception as error:
        # One file must never stop the others, whatever is in it.
        return VolumeError(path, "unreadable", f"{type(error).__name__}: {error}")


def iterate_images(paths: Sequence[str], preprocess: Preprocess, workers: int = 1) -> Iterator[Result]:
    """The slices of each file, or its error, in the order of `paths` whatever the number of workers.

    Args:
        paths: the files.
        preprocess: which slices, and how.
        workers: processes that read; 1 reads in this process.
    """
    for result in iterate_measured(paths, preprocess, workers):
        yield result if isinstance(result, VolumeError) else result[0]


def iterate_measured(paths: Sequence[str], preprocess: Preprocess, workers: int = 1) -> Iterator[Loaded]:
    """As `iterate_images`, with what `fastflow.data.statistics.measure` says of the slices."""
    load = partial(_load_or_error, preprocess=preprocess)
    if workers <= 1 or len(paths) <= 2 * workers:
        yield from map(load, paths)
        return
    # Processes are spawned, as a fork would copy a torch that is running threads.
    size = max(1, min(MAX_FILES_PER_TASK, len(paths) // (4 * workers)))
    tasks: deque[Future[list[Loaded]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for start in range(0, len(paths), size):
                tasks.append(pool.submit(_load_all, paths[start : start + size], preprocess))
                # Results wait here for one slow file, so there is an end to how many.
                if len(tasks) > TASKS_AHEAD * workers:
                    yield from tasks.popleft().result()
            while tasks:
                yield from tasks.popleft().result()
        finally:
            for task in tasks:
                task.cancel()


def _load_all(paths: Sequence[str], preprocess: Preprocess) -> list[Loaded]:
    return [_load_or_error(path, preprocess) for path in paths]


def load_slices(
    records: Sequence[Record],
    preprocess: Preprocess,
    class_names: Sequence[str],
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    cache: SliceCache | None = None,
) -> tuple[SliceSet, list[VolumeError]]:
    """Read the slices of many volumes or PNG files.

    Args:
        records: what to read; a label of None becomes -1.
        preprocess: which slices, and how.
        class_names: the labels that are known, in the model's order.
        workers: processes that read.
        progress: called with the number of files done.
        cache: has the slices of files that need not be decoded, and keeps the others; in memory when None.
            Files that cannot be used are read again each time.

    Returns:
        `(slices, errors)`: the slices of the files that could be read, in the order of `records`, and one
        error for each of the others.

    Raises:
        ValueError: a record has a label that is not among `class_names`.
    """
    known = {name: i for i, name in enumerate(class_names)}
    for record in records:
        if record.label is not None and record.label not in known:
            raise ValueError(
                f"{record.path} has label {record.label!r}, which is none of {', '.join(class_names)}"
            )
    good: list[tuple[Record, Block]] = []
    errors: list[VolumeError] = []
    with opened(cache, [record.path for record in records], preprocess) as kept:
        missing = [record.path for record in records if record.path not in kept.found]
        results = iterate_measured(missing, preprocess, workers)
        for done, record in enumerate(records, start=1):
            result = kept.found.get(record.path) or next(results)
            if isinstance(result, VolumeError):
                errors.append(result)
            else:
                block = result if isinstance(result, Block) else kept.add(record.path, *result)
                good.append((record, block))
            if progress is not None:
                progress(done)
        blocks = [block for _, block in good]
        images = kept.images(blocks)
    counts = [len(block.measured) for block in blocks]
    labels = [-1 if record.label is None else known[record.label] for record, _ in good]
    slices = SliceSet(
        images,
        np.repeat(np.array(labels, dtype=np.int64), counts),
        np.repeat(np.arange(len(good), dtype=np.int64), counts),
        tuple(record.path for record, _ in good),
        tuple(record.subject for record, _ in good),
        tuple(class_names),
        np.concatenate([block.measured for block in blocks]) if blocks else None,
    )
    return slices, errors
