"""A few numbers that describe a slice as it reaches the model, without its padding."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

# The layout is looked at in so many cells along each axis.
CELLS = 8
# Slices that are smaller than this along an axis are not measured.
MIN_SIDE = 4
# A slice is blank if fewer than this share of its pixels, or fewer than so many, are more than so many grey
# levels away from the slice's most common one.
BLANK_SHARE, BLANK_PIXELS, BLANK_LEVELS = 0.005, 4, 2

Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One number about a slice.

    Attributes:
        text: what it is, in words.
        least_margin: by which the range is widened at least.
        ends: values that it can have.
        is_share: whether it is shown in percent.
        is_difference: from training images, so that no value is too low.
    """

    text: str
    least_margin: float
    ends: tuple[float, float]
    is_share: bool = False
    is_difference: bool = False

    def show(self, value: float) -> str:
        """A value as text, without its unit."""
        return f"{100.0 * value if self.is_share else value:.3g}"

    @property
    def unit(self) -> str:
        """Follows a value."""
        return " %" if self.is_share else ""


_SHARE, _LEVEL = (0.0, 1.0), (0.0, 255.0)
STATISTICS = {
    # The scaling makes these voxels of the whole volume black.
    "negative": Statistic("share of voxels below 0", 0.005, _SHARE, True),
    "black": Statistic("share of pixels at 0", 0.005, _SHARE, True),
    "white": Statistic("share of pixels at 255", 0.005, _SHARE, True),
    "border": Statistic("grey level of the border", 2.0, _LEVEL),
    "lower_quartile": Statistic("lower quartile of the grey levels", 2.0, _LEVEL),
    "median": Statistic("median grey level", 2.0, _LEVEL),
    "upper_quartile": Statistic("upper quartile of the grey levels", 2.0, _LEVEL),
    "bright": Statistic("grey level that a tenth of the pixels exceeds", 2.0, _LEVEL),
    "grain": Statistic("grain", 0.5, (0.0, 1020.0)),
    "detail": Statistic("detail", 0.5, (0.0, 1020.0)),
    "coarse_detail": Statistic("detail at half the resolution", 0.5, (0.0, 1020.0)),
    "layout": Statistic("difference of the layout", 0.02, (0.0, 2.0), is_difference=True),
}
MEASURED = tuple(name for name in STATISTICS if name != "layout")
# `measure` gives so many numbers for a slice.
NUMBERS = len(MEASURED) + CELLS * CELLS


# -- one image -----------------------------------------------------------------------------------------------


def blank_slice(pixels: NDArray[np.uint8]) -> tuple[int, str] | None:
    """The first slice with nothing in it: (its place, what is in it), None where all show something.

    A slice is blank if its pixels are more than 2 grey levels away from the slice's most common level in
    fewer than 0.5 % of them, or in fewer than 4.

    Args:
        pixels: (n, H, W), without padding.
    """
    least = max(BLANK_PIXELS, BLANK_SHARE * pixels[0].size)
    for place, counts in enumerate(_histograms(pixels, 256)):
        level = int(counts.argmax())
        others = int(counts.sum() - counts[max(0, level - BLANK_LEVELS) : level + BLANK_LEVELS + 1].sum())
        if others < least:
            differ = "pixels differs" if others == 1 else "pixels differ"
            reason = f"{others} of its {pixels[0].size} {differ} from grey level {level}"
            return place, f"{reason} by more than {BLANK_LEVELS}"
    return None


def measure(pixels: NDArray[np.uint8], negative: float | None) -> Array:
    """The numbers of each slice: those of `STATISTICS` before the layout, then the layout's cells.

    Grain is the median, detail the mean of the absolute diagonal second difference
    ``|x[i,j] - x[i,j+1] - x[i+1,j] + x[i+1,j+1]|`` in grey levels. The first is mostly noise, as edges are in
    few places. Source: Donoho & Johnstone, 1994, with the finest wavelet of Haar.

    Args:
        pixels: (n, H, W), without padding.
        negative: share of the volume's voxels below 0; None where the image is no volume's.

    Returns:
        (n, 11 + 64) float64; NaN where nothing is known, or where slices have fewer than 4 rows or columns.
    """
    count, rows, columns = pixels.shape
    result = np.full((count, NUMBERS), np.nan)
    if min(rows, columns) < MIN_SIDE:
        return result
    greys = _histograms(pixels, 256)
    lower, median, upper, bright = _quantiles(greys, (0.25, 0.5, 0.75, 0.9))
    edges = (pixels[:, 0], pixels[:, -1], pixels[:, 1:-1, 0], pixels[:, 1:-1, -1])
    fine = _diagonal_differences(pixels.astype(np.int16))
    evens = pixels[:, : rows // 2 * 2, : columns // 2 * 2]
    halves = evens[:, ::2].astype(np.int16) + evens[:, 1::2]
    coarse = _diagonal_differences(halves[:, :, ::2] + halves[:, :, 1::2])
    values = {
        "negative": np.nan if negative is None else negative,
        "black": greys[:, 0] / (rows * columns),
        "white": greys[:, 255] / (rows * columns),
        "border": np.median(np.concatenate(edges, axis=1), axis=1),
        "lower_quartile": lower,
        "median": median,
        "upper_quartile": upper,
        "bright": bright,
        "grain": _quantiles(_histograms(fine, 1021), (0.5,))[0],
        "detail": fine.mean(axis=(1, 2)),
        # A sum of four pixels has four times their difference.
        "coarse_detail": coarse.mean(axis=(1, 2)) / 4.0,
    }
    for place, name in enumerate(MEASURED):
        result[:, place] = values[name]
    cells = _cells(rows) @ pixels.astype(np.float32) @ _cells(columns).T
    result[:, len(MEASURED) :] = cells.reshape(count, -1)
    return result


def _histograms(values: NDArray[Any], levels: int) -> NDArray[np.int64]:
    """(n, levels) counts of the values of each of n images."""
    return np.stack([np.bincount(image.reshape(-1), minlength=levels) for image in values])


def _quantiles(counts: NDArray[np.int64], shares: tuple[float, ...]) -> Array:
    """Values below which shares lie, (k, n), as if the values of a level were spread evenly over it."""
    result = np.empty((len(shares), len(counts)))
    for place, each in enumerate(counts):
        reached = each.cumsum()
        wanted = np.multiply(shares, reached[-1])
        level = reached.searchsorted(wanted)
        result[:, place] = level + 0.5 - (reached[level] - wanted) / each[level]
    return result.clip(0.0)


def _diagonal_differences(images: NDArray[np.int16]) -> NDArray[np.int16]:
    along = images[:, :, :-1] - images[:, :, 1:]
    return np.abs(along[:, :-1] - along[:, 1:])


@functools.lru_cache(maxsize=16)
def _cells(length: int) -> NDArray[np.float32]:
    """(CELLS, length) weights that take the mean of each of CELLS equal parts of an axis."""
    ends = np.linspace(0.0, length, CELLS + 1)
    first = np.arange(length)
    overlap = np.minimum(first + 1, ends[1:, None]) - np.maximum(first, ends[:-1, None])
    return (np.clip(overlap, 0.0, None) * CELLS / length).astype(np.float32)
