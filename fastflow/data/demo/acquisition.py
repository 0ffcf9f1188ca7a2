"""A simulated scanner's way from an ideal image to magnitudes.

It adds a bias field, point spread, ringing, ghosts and Rician noise.

Source of the noise: Gudbjartsson & Patz, 1995.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.random import Generator

from fastflow.data.anatomy import GRID, FloatArray, warp
from fastflow.data.demo._filters import apply_matrices, resize
from fastflow.data.demo.scanners import Scanner

STRETCH_VARIATION = 0.003


def bias_field(scanner: Scanner, rng: Generator) -> FloatArray:
    """A smooth positive field of mean about 1 (91, 109, 91) that drifts mostly along the scanner's axis."""
    strength = rng.uniform(*scanner.bias)
    axis = np.asarray(scanner.bias_axis) + 0.15 * rng.standard_normal(3)
    drift = sum(np.float32(w) * ramp for w, ramp in zip(axis / np.linalg.norm(axis), _ramps(), strict=True))
    centre = scanner.bias_centre + 0.05 * rng.standard_normal()
    bulge = np.float32(0.5) - sum(np.square(ramp) for ramp in _ramps())
    nodes = resize(rng.standard_normal((4, 4, 4), dtype=np.float32), GRID)
    return np.exp(np.float32(strength) * (drift + np.float32(0.35) * nodes) + np.float32(centre) * bulge)


@functools.cache
def _ramps() -> tuple[FloatArray, ...]:
    """Coordinates from -1 to 1 along each axis, shaped to broadcast over the grid."""
    ramps = [np.linspace(-1.0, 1.0, n, dtype=np.float32) for n in GRID]
    return tuple(ramp.reshape([-1 if i == j else 1 for j in range(3)]) for i, ramp in enumerate(ramps))


def distort(scanner: Scanner, image: FloatArray, rng: Generator) -> FloatArray:
    """The geometry of a scanner: an image (91, 109, 91) stretched along the axes and distorted radially.

    Stretches vary by 0.3 % from scan to scan. A scanner without distortion returns the image as it is, and
    draws nothing.
    """
    if scanner.distortion == (0.0, 0.0) and scanner.stretch == (1.0, 1.0, 1.0):
        return image
    radial = np.float32(rng.uniform(*scanner.distortion))
    stretch = np.asarray(scanner.stretch) * np.exp(STRETCH_VARIATION * rng.standard_normal(3))
    squared = sum(np.square(ramp) for ramp in _ramps())
    # An image larger than the head shows, at each voxel, a place nearer to the centre.
    displacement = [
        np.float32((n - 1) / 2.0) * ramp * (np.float32(1.0 / s - 1.0) - radial * squared)
        for ramp, n, s in zip(_ramps(), GRID, stretch, strict=True)
    ]
    return warp(image, np.stack([np.broadcast_to(part, GRID) for part in displacement]))


def g_factor_map(scanner: Scanner) -> FloatArray:
    """Relative strength of the noise, broadcastable over the grid.

    Its mean square is 1, so that a histogram cannot see it.
    """
    profile = np.float32(1.0) + sum(
        np.float32(g) * np.exp(-np.square(ramp / np.float32(0.45)))
        for g, ramp in zip(scanner.g_factor, _ramps(), strict=True)
    )
    return np.asarray(profile / np.sqrt(np.mean(np.broadcast_to(np.square(profile), GRID))), dtype=np.float32)


def window_matrix(length: int, share: float, taper: float, ghost: float = 0.0) -> FloatArray:
    """A k-space window along one axis as a (length, length) matrix.

    Args:
        length: voxels.
        share: of k-space that is kept; at 1 nothing is cut and nothing rolls off.
        taper: 0 ends the window abruptly, which rings; 1 rolls it off all the way.
        ghost: amplitude of a copy shifted by half the field of view.
    """
    frequency = np.abs(np.fft.fftfreq(length)) * 2.0
    edge = share * (1.0 + 0.5 * taper)
    start = share * (1.0 - taper)
    window = np.where((frequency <= start) | (share >= 1.0), 1.0, 0.0)
    rolling = (frequency > start) & (frequency < edge) & (share < 1.0)
    window[rolling] = 0.5 * (1.0 + np.cos(np.pi * (frequency[rolling] - start) / max(edge - start, 1e-9)))
    response = np.fft.ifft(window).real
    columns = [np.roll(response, shift) for shift in range(length)]
    matrix = np.stack(columns, axis=1)
    return (matrix + ghost * np.roll(matrix, length // 2, axis=0)).astype(np.float32)


def acquire(scanner: Scanner, image: FloatArray, rng: Generator) -> FloatArray:
    """Scan an ideal image (91, 109, 91): point spread, ringing, ghost and Rician noise.

    Returns:
        (91, 109, 91) magnitudes.
    """

    def vary(share: float) -> float:
        return float(np.clip(share + scanner.jitter * rng.standard_normal(), 0.3, 1.0)) if share < 1 else 1.0

    ghosts = (0.0, 0.0, float(rng.uniform(*scanner.ghost)))
    taper = float(np.clip(scanner.taper + 0.05 * rng.standard_normal(), 0.0, 1.0))
    point_spread = [
        window_matrix(n, vary(s), taper, g) for n, s, g in zip(GRID, scanner.sharpness, ghosts, strict=True)
    ]
    grain = [window_matrix(n, vary(s), 0.3) for n, s in zip(GRID, scanner.noise_window, strict=True)]
    # The grain must not change the strength of the noise, which a histogram would see.
    gain = rng.uniform(*scanner.noise) / np.prod([np.sqrt((m**2).sum(axis=1).mean()) for m in grain])
    strength = np.float32(gain) * g_factor_map(scanner)
    real, imaginary = (
        strength * apply_matrices(grain, rng.standard_normal(GRID, dtype=np.float32)) for _ in range(2)
    )
    return np.hypot(apply_matrices(point_spread, image) + real, imaginary)
