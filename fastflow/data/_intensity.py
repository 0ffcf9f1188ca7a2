"""The facts about all voxels that a scaling to 8 bits needs, gathered chunk by chunk in bounded memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERCENTILE = 99.9
# This is the largest float64 that rounds to a float32 of 0.
_ROUNDS_TO_ZERO = 2.0**-150
# So many voxels beyond the capacity may wait before the largest are chosen again.
_MAX_PENDING = 1 << 16


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A header's slope and intercept, which turn stored values into intensities."""

    slope: float = 1.0
    inter: float = 0.0

    @classmethod
    def of_header(cls, slope: float, inter: float) -> Scaling:
        """The scaling of a header, in which a slope of 0 or not finite means none, as in NIfTI."""
        if not math.isfinite(slope) or slope == 0:
            return cls()
        return cls(slope, inter if math.isfinite(inter) else 0.0)

    def apply(self, voxels: NDArray[Any]) -> NDArray[np.float32]:
        """Intensities of stored values, computed in float64; those beyond float32 become infinite."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self == Scaling():
                return np.asarray(voxels, dtype=np.float32)
            return np.asarray(voxels.astype(np.float64) * self.slope + self.inter, dtype=np.float32)


class Intensities:
    """Finiteness, contrast, the upper percentile and the share below 0 of a volume's intensities.

    Intensities follow stored values monotonically, rounding included, so that all is decided on stored
    values, and only few of them are ever scaled. For a negative slope, the order of the stored values is
    reversed.

    Memory: a mask of one chunk and the largest 0.1 % of the voxels.

    Args:
        dtype: of the stored values: integers or floats of up to 64 bits.
        count: voxels of the volume.
        scaling: from stored values to intensities.
        ranked: whether contrast and percentile are wanted; the others always are.

    Attributes:
        non_finite: how many intensities are NaN or infinite.
    """

    def __init__(self, dtype: np.dtype[Any], count: int, scaling: Scaling, ranked: bool) -> None:
        self.non_finite = 0
        self._dtype, self._scaling, self._ranked = dtype.newbyteorder("="), scaling, ranked
        self._watched = dtype.kind == "f"
        if dtype.kind != "f":
            ends = np.array([np.iinfo(dtype).min, np.iinfo(dtype).max], dtype=self._dtype)
            self._watched = not np.isfinite(scaling.apply(ends)).all()
        self._least, self._greatest = np.float32(np.inf), np.float32(-np.inf)
        self._positive = 0
        self._count, self._negative = count, 0
        self._first_positive: Any = (
            _first(self._dtype, scaling, lambda value: value > _ROUNDS_TO_ZERO) if ranked else None
        )
        self._first_not_negative: Any = _first(self._dtype, scaling, lambda value: value >= -_ROUNDS_TO_ZERO)
        # Most volumes hold integers that cannot be negative, or are not.
        self._can_be_negative = bool(
            scaling.apply(self._reverse(np.array([_ends(self._dtype)[0]], dtype=self._dtype)))[0] < 0
        )
        # At most this many voxels lie at or above the percentile, even if all `count` voxels are positive.
        self._capacity = count - int((count - 1) * (PERCENTILE / 100)) + 1
        self._bar: Any = None
        self._largest: list[NDArray[Any]] = []
        self._mask = np.empty(0, dtype=np.bool_)

    def add(self, chunk: NDArray[Any]) -> None:
        """Take in voxels of any shape, stored values in either byte order."""
        if not (self._watched or self._ranked or self._can_be_negative):
            return
        values = self._reverse(chunk.reshape(-1).astype(self._dtype, copy=False))
        with np.errstate(invalid="ignore"):
            low, high = values.min(), values.max()
            if self._watched or not self._least < self._greatest:
                ends = self._scaling.apply(self._reverse(np.array([low, high])))
                if not np.isfinite(ends).all():
                    parts = np.array_split(values, max(1, values.size >> 16))
                    self.non_finite += sum(map(self._count_non_finite, parts))
                    return
                self._least, self._greatest = min(self._least, ends[0]), max(self._greatest, ends[1])
        if self._can_be_negative:
            self._count_negative(values, low)
        if self._first_positive is not None:
            self._rank(values, high)

    def _count_non_finite(self, values: NDArray[Any]) -> int:
        return int((~np.isfinite(self._scaling.apply(self._reverse(values)))).sum())

    def _count_negative(self, values: NDArray[Any], low: Any) -> None:
        if self._first_not_negative is None:
            self._negative += values.size
        elif low < self._first_not_negative:
            self._negative += int(np.count_nonzero(values < self._first_not_negative))

    @property
    def negative_share(self) -> float:
        """The share of the volume's voxels whose intensity is below 0."""
        return self._negative / self._count

    def top(self) -> float | None:
        """The percentile of the positive intensities.

        It is None if no intensity is positive, or if all intensities are equal.

        Interpolated linearly between the two nearest, as `np.percentile` does.
        """
        if self._positive == 0 or not self._least < self._greatest:
            return None
        self._merge()
        position = (self._positive - 1) * (PERCENTILE / 100)
        largest = self._largest[0]
        lower = largest.size - (self._positive - int(position))
        upper = min(lower + 1, largest.size - 1)
        stored = np.partition(largest, (lower, upper))[[lower, upper]].astype(self._dtype)
        low, high = (float(value) for value in self._scaling.apply(self._reverse(stored)))
        share = position - int(position)
        return low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share)

    def _reverse(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values in the order of intensities: the identity unless the slope is negative; its own inverse."""
        if self._scaling.slope > 0:
            return values
        return -values if self._dtype.kind == "f" else ~values

    def _rank(self, values: NDArray[Any], high: Any) -> None:
        if self._mask.size < values.size:
            self._mask = np.empty(values.size, dtype=np.bool_)
        mask = self._mask[: values.size]
        np.greater_equal(values, self._first_positive, out=mask)
        self._positive += int(np.count_nonzero(mask))
        if self._bar is not None:
            if not high > self._bar:
                return
            np.greater(values, self._bar, out=mask)
        self._largest.append(values[mask])
        if sum(part.size for part in self._largest) > self._capacity + _MAX_PENDING:
            self._merge()

    def _merge(self) -> None:
        # NumPy selects among 32 bits several times faster than among 16 or 8.
        sort_dtype = np.dtype(np.int32) if self._dtype.itemsize < 4 else self._dtype
        merged = np.concatenate(self._largest).astype(sort_dtype, copy=False)
        if merged.size > self._capacity:
            merged.partition(merged.size - self._capacity)
            merged = merged[-self._capacity :].copy()
            self._bar = self._dtype.type(merged[0])
        self._largest = [merged]


def _ends(dtype: np.dtype[Any]) -> tuple[Any, Any]:
    """The least and the greatest finite value of a dtype."""
    limits: Any = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    return limits.min, limits.max


def _first(dtype: np.dtype[Any], scaling: Scaling, wanted: Callable[[float], bool]) -> Any:
    """The stored value of the least intensity that is wanted, as all greater ones are; None if none is."""
    decode: Callable[[int], float]
    if dtype.kind == "f":
        # The bits of floats, read as integers with the float's sign, are in the order of the floats.
        bits = np.dtype(f"u{dtype.itemsize}")
        last = int(np.array(np.finfo(dtype).max, dtype=dtype).view(bits))
        first = -last

        def decode(key: int) -> float:
            return math.copysign(float(np.array(abs(key), dtype=bits).view(dtype)), key)
    else:
        first, last = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        decode = int

    def found(key: int) -> bool:
        stored = decode(key if scaling.slope > 0 else first + last - key)
        return wanted(stored * scaling.slope + scaling.inter)

    low, high = first, last
    if not found(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) else (middle + 1, high)
    return dtype.type(decode(low))
