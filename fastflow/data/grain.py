"""Six numbers about the grain and the grey levels of a slice, made by hand for telling scanners apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

GRAIN_NUMBERS = ("variance", "across", "down", "deviation", "mean", "spread")
# The residual is what a Gaussian of so many pixels leaves; beyond so many deviations it is edge, not grain.
SMOOTHING, LARGEST = 1.0, 3.0
# A pixel belongs to the head from this share of the slice's bright level on, and from this grey level on.
HEAD_SHARE, HEAD_LEVEL = 0.25, 10.0

Array = NDArray[np.float64]


def grain_numbers(pixels: NDArray[np.uint8]) -> Array:
    """The grain and the grey levels of slices.

    Args:
        pixels: (n, H, W), without padding or with black padding.

    Returns:
        (n, 6) in the order of `GRAIN_NUMBERS`: variance of the residual in the head (squared grey levels),
        its correlations with the pixel to the right and with the pixel below, its median absolute value, mean
        and standard deviation of the head (grey levels). Zeros for a slice without a head.
    """
    return np.stack([_of_slice(each.astype(np.float64)) for each in pixels])


def _of_slice(pixels: Array) -> Array:
    head = pixels > max(HEAD_LEVEL, HEAD_SHARE * float(np.percentile(pixels, 90)))
    if not head.any():
        return np.zeros(len(GRAIN_NUMBERS))
    residual = pixels - gaussian_filter(pixels, SMOOTHING)
    deviation = float(np.median(np.abs(residual[head])))
    residual = np.clip(residual, -LARGEST * deviation, LARGEST * deviation)
    across = _correlation(residual[:, 1:], residual[:, :-1], head[:, 1:] & head[:, :-1])
    down = _correlation(residual[1:], residual[:-1], head[1:] & head[:-1])
    inside = pixels[head]
    return np.array([residual[head].var(), across, down, deviation, inside.mean(), inside.std()])


def _correlation(first: Array, second: Array, where: NDArray[np.bool_]) -> float:
    a, b = first[where], second[where]
    if len(a) < 2:
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0
