"""Ways in which a scan can reach a model other than its training data did, to see whether that is noticed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray



Array = NDArray[Any]

OFFSET = 1000.0
# Standard deviations in voxels of 2 mm, and of the noise as a share of the brightest voxels.
BLUR, NOISE = 1.0, 0.1
# So many voxels of the outer head are removed.
SKULL = 8
# Grey levels as shares of the brightest, and what they become under another contrast: fluid becomes bright.
CONTRAST = ((0.0, 0.12, 0.3, 0.55, 0.8, 1.0), (0.0, 0.12, 1.0, 0.6, 0.4, 0.3))


@dataclasses.dataclass(frozen=True)
class Distortion:
    """A change of a volume.

    Attributes:
        name: a word.
        text: what is done.
        apply: from (X, Y, Z) intensities in canonical orientation to others on the same grid.
    """

    name: str
    text: str
    apply: Callable[[Array], Array]


def _top(data: Array) -> float:
    return float(np.percentile(data[data > 0], 99.9))


def _blurred(data: Array) -> Array:
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(data, BLUR))


def _downsampled(data: Array) -> Array:
    even = np.pad(data, [(0, n % 2) for n in data.shape], mode="edge")
    x, y, z = (n // 2 for n in even.shape)
    coarse = even.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5))
    fine = coarse.repeat(2, axis=0).repeat(2, axis=1).repeat(2, axis=2)
    return np.asarray(fine[: data.shape[0], : data.shape[1], : data.shape[2]])


def _rotated(first: int, second: int) -> Callable[[Array], Array]:
    def apply(data: Array) -> Array:
        turned = np.rot90(data, 1, (first, second))
        for axis, wanted in enumerate(data.shape):
            missing = wanted - turned.shape[axis]
            edges = [(0, 0)] * 3
            edges[axis] = (max(0, missing) // 2, max(0, missing) - max(0, missing) // 2)
            start = max(0, -missing) // 2
            turned = np.pad(turned, edges, mode="edge").take(range(start, start + wanted), axis)
        return turned

    return apply


def _other_contrast(data: Array) -> Array:
    top = _top(data)
    return np.asarray(top * np.interp(data / top, *CONTRAST))


def _brightened(data: Array) -> Array:
    return np.asarray(_top(data) * np.sqrt(data.clip(0) / _top(data)))


def _zeroed(axis: int) -> Callable[[Array], Array]:
    def apply(data: Array) -> Array:
        result = np.moveaxis(data.copy(), axis, 0)
        result[: len(result) // 2] = 0
        return np.moveaxis(result, 0, axis)

    return apply


def _noisy(data: Array) -> Array:
    rng = np.random.default_rng(0)
    real, imaginary = rng.normal(0.0, NOISE * _top(data), (2, *data.shape))
    return np.asarray(np.hypot(data + real, imaginary))


def _brain_only(data: Array) -> Array:
    from scipy import ndimage

    head = ndimage.binary_fill_holes(ndimage.gaussian_filter(data, 2.0) > 0.5 * data.mean())
    depth = ndimage.distance_transform_edt(np.pad(head, 1))[1:-1, 1:-1, 1:-1]
    return np.where(depth > SKULL, data, 0.0)


DISTORTIONS = (
    Distortion("z_score", "mean 0, standard deviation 1", lambda data: (data - data.mean()) / data.std()),
    Distortion("offset", "1000 is added", lambda data: data + OFFSET),
    Distortion("inverted", "black becomes white", lambda data: data.max() - data),
    Distortion("mask", "1 above the mean, 0 elsewhere", lambda data: np.where(data > data.mean(), 1.0, 0.0)),
    Distortion("blurred", "by a Gaussian of 2 mm (standard deviation)", _blurred),
    Distortion("downsampled", "to voxels of 4 mm, and repeated", _downsampled),
    Distortion("rotated_coronal", "by 90 degrees about the anterior axis", _rotated(0, 2)),
    Distortion("rotated_axial", "by 90 degrees about the superior axis", _rotated(0, 1)),
    Distortion("rotated_sagittal", "by 90 degrees about the axis from left to right", _rotated(1, 2)),
    Distortion("upside_down", "the top of the head is at the bottom", lambda data: data[:, :, ::-1]),
    Distortion("other_contrast", "fluid is bright, white matter dark", _other_contrast),
    Distortion("brightened", "the square root of the intensities", _brightened),
    Distortion("half_left", "the left half is 0", _zeroed(0)),
    Distortion("half_bottom", "the lower half is 0", _zeroed(2)),
    Distortion("noise", "Rician noise of a tenth of the brightest voxels", _noisy),
    Distortion("brain_only", "the outer 16 mm of the head are 0", _brain_only),
)
