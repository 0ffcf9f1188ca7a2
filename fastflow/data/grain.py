"""Six numbers about the grain and the grey levels of a slice, made by hand for telling scanners apart.

Source of the idea: the residual of a smoothing filter is mostly noise, whose strength and correlation are
those of a scanner's reconstruction. NumPy alone computes them, as exports are scored without SciPy.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

GRAIN_NUMBERS = ("variance", "across", "down", "deviation", "mean", "spread")
# The residual is what a Gaussian of so many pixels leaves; a narrow one leaves little anatomy in it. Beyond
# so many median deviations, the residual is an edge and not grain.
SMOOTHING, LARGEST = 0.5, 3.0
# The head is found in a smoother image, as single pixels of a noisy background are brighter than dark tissue.
# It is brighter than this share of the brightest pixel there, which padding does not change, and than this
# level.
HEAD_SMOOTHING, HEAD_SHARE, HEAD_LEVEL = 1.5, 0.2, 10.0
# A filter reaches so many standard deviations.
REACH = 4.0

Array = NDArray[np.float64]


def grain_numbers(pixels: NDArray[np.uint8]) -> Array:
    """The grain and the grey levels of slices.

    Args:
        pixels: (n, H, W), without padding or with black padding.

    Returns:
        (n, 6) in the order of `GRAIN_NUMBERS`: variance of the clipped residual in the head (squared grey
        levels), its correlations with the pixel to the right and with the pixel below, its median absolute
        value, mean and standard deviation of the head (grey levels). Zeros for a slice without a head.
    """
    return np.array([_of_slice(each.astype(np.float64)) for each in pixels]).reshape(-1, len(GRAIN_NUMBERS))


def _of_slice(pixels: Array) -> Array:
    smooth = _smooth(pixels, HEAD_SMOOTHING)
    head = smooth > max(HEAD_LEVEL, HEAD_SHARE * float(smooth.max()))
    if not head.any():
        return np.zeros(len(GRAIN_NUMBERS))
    residual = pixels - _smooth(pixels, SMOOTHING)
    deviation = float(np.median(np.abs(residual[head])))
    residual = np.clip(residual, -LARGEST * deviation, LARGEST * deviation)
    across = _correlation(residual[:, 1:], residual[:, :-1], head[:, 1:] & head[:, :-1])
    down = _correlation(residual[1:], residual[:-1], head[1:] & head[:-1])
    inside = pixels[head]
    return np.array([residual[head].var(), across, down, deviation, inside.mean(), inside.std()])


def _smooth(pixels: Array, sigma: float) -> Array:
    """A Gaussian filter of (H, W); beyond an edge, the image is mirrored."""
    weights = _weights(sigma)
    reach = len(weights) // 2
    for axis in (0, 1):
        wide = np.pad(pixels, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], mode="symmetric")
        pixels = np.lib.stride_tricks.sliding_window_view(wide, len(weights), axis) @ weights
    return pixels


@functools.cache
def _weights(sigma: float) -> Array:
    reach = int(REACH * sigma + 0.5)
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / sigma))
    return np.asarray(weights / weights.sum())


def _correlation(first: Array, second: Array, where: NDArray[np.bool_]) -> float:
    a, b = first[where], second[where]
    if len(a) < 2:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0
