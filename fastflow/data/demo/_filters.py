"""Separable linear filters of images on the demo's grids, as one matrix per axis."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastflow.data.anatomy import FloatArray


def apply_matrices(matrices: Sequence[FloatArray], image: FloatArray) -> FloatArray:
    """Apply one matrix along each axis of an image (X, Y, Z), as three matrix products."""
    image = np.tensordot(matrices[0], image, axes=(1, 0))
    image = np.matmul(matrices[1], image)
    return np.matmul(image, matrices[2].T)


def resize(image: FloatArray, shape: Sequence[int]) -> FloatArray:
    """Resample an image (X, Y, Z) to another shape by cubic splines; the axes' ends stay where they are."""
    return apply_matrices([_spline_matrix(n, m) for n, m in zip(image.shape, shape, strict=True)], image)


def _spline_matrix(inputs: int, outputs: int) -> FloatArray:
    """The (outputs, inputs) matrix that resamples an axis."""
    from scipy.interpolate import make_interp_spline

    where = np.linspace(0, inputs - 1, outputs)
    spline = make_interp_spline(np.arange(inputs), np.eye(inputs), k=3)
    return np.asarray(spline(where), dtype=np.float32)
