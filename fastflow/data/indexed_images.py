"""Images that stay where they are, on disk or in memory, until some of them are asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]


class _Place(NamedTuple):
    """Where a map of a file has its bytes."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def open(self) -> Images:
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


class IndexedImages:
    """N images, each of which is a row of one of several arrays; an index copies what it asks for, no more.

    It stands where an array (N, C, H, W) does: it has a length, a shape and a dtype, is iterated over, and is
    indexed by a number, a slice, numbers or booleans, and by a tuple that begins with one of these. A result
    is an array of its own. `numpy.asarray` copies all images, and so does arithmetic. Another process that
    gets it by pickle maps the same files, which must lie under the same paths there.

    Args:
        parts: arrays (n, C, H, W) of one dtype and image shape; maps of files among them stay maps.
        part: (N,) the array of each image.
        row: (N,) the row in it.

    Raises:
        ValueError: arrays do not fit together, or a number lies out of range.
    """

    def __init__(self, parts: Sequence[Images], part: NDArray[Any], row: NDArray[Any]) -> None:
        if not parts or any(p.shape[1:] != parts[0].shape[1:] or p.dtype != parts[0].dtype for p in parts):
            found = ", ".join(f"{p.shape} {p.dtype}" for p in parts) or "none"
            raise ValueError(f"parts must be arrays (n, C, H, W) of one image shape and dtype, got {found}")
        # A view has no methods of a map that cost time, and keeps the map alive.
        self._parts = [np.asarray(p) for p in parts]
        self._part, self._row = np.asarray(part, dtype=np.int32), np.asarray(row, dtype=np.int64)
        lengths = np.array([len(p) for p in parts])
        if self._part.shape != self._row.shape or self._part.ndim != 1:
            raise ValueError(f"part and row must be (N,), got {self._part.shape} and {self._row.shape}")
        if len(self._part) and not (
            0 <= self._part.min() <= self._part.max() < len(parts)
            and self._row.min() >= 0
            and np.all(self._row < lengths[self._part])
        ):
            raise ValueError(
                f"part and row must name rows of {len(parts)} arrays of {lengths.tolist()} images"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, C, H, W)."""
        return (len(self._row), *self._parts[0].shape[1:])

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the images."""
        return self._parts[0].dtype

    @property
    def size(self) -> int:
        """The number of all pixels."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes of all images, wherever they are."""
        return self.size * self.dtype.itemsize

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, key: Any) -> Images:
        keys = key if isinstance(key, tuple) else (key,)
        if not keys or keys[0] is Ellipsis or any(k is None for k in keys):
            return np.asarray(self)[key]
        row = self._row[keys[0]]
        images = self._copy(self._part[keys[0]], row)
        rest = keys[1:] if np.ndim(row) == 0 else (slice(None), *keys[1:])
        return images[rest] if len(keys) > 1 else images

    def __iter__(self) -> Iterator[Images]:
        for part, row in zip(self._part.tolist(), self._row.tolist(), strict=True):
            yield self._parts[part][row]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("images that lie in several places cannot become an array without a copy")
        images = self._copy(self._part, self._row)
        return images if dtype is None else images.astype(dtype, copy=False)

    def select(self, rows: NDArray[Any]) -> IndexedImages:
        """Some of the images, by numbers or booleans; none is copied."""
        return IndexedImages(self._parts, self._part[rows], self._row[rows])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_parts": [_place_of(part) for part in self._parts]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = [np.asarray(p.open()) if isinstance(p, _Place) else p for p in state["_parts"]]
        self.__dict__ |= state | {"_parts": parts}

    def _copy(self, part: NDArray[Any], row: NDArray[Any]) -> Images:
        if np.ndim(row) == 0:
            return self._parts[int(part)][int(row)].copy()
        used = np.unique(part)
        if len(used) == 1:
            return self._parts[int(used[0])][row]
        images = np.empty((*row.shape, *self.shape[1:]), dtype=self.dtype)
        for number in used:
            here = part == number
            images[here] = self._parts[int(number)][row[here]]
        return images


def _place_of(part: Images) -> _Place | Images:
    """The place of a map that is still there under its name, else the array itself."""
    map_ = part.base
    if not isinstance(map_, np.memmap) or map_.filename is None or map_.shape != part.shape:
        return part
    if not part.flags.c_contiguous or not os.path.isfile(map_.filename):
        return part
    return _Place(str(map_.filename), map_.offset, part.dtype.str, part.shape)


def select_rows(images: Images | IndexedImages, rows: NDArray[Any]) -> Images:
    """Some rows of images (N, C, H, W): a copy of an array's, none where they lie on disk.

    Args:
        images: an array, a map of a file, or `IndexedImages`.
        rows: numbers or booleans.
    """
    if isinstance(images, IndexedImages):
        return as_array(images.select(rows))
    if isinstance(images, np.memmap):
        numbers = np.arange(len(images))[rows]
        return as_array(IndexedImages((images,), np.zeros(len(numbers), dtype=np.int32), numbers))
    return cast(Images, images[rows])


def as_array(images: IndexedImages) -> Images:
    """The same object under the type of the arrays that it stands for."""
    return cast(Images, images)
