"""The simulated scanners: their settings, and the signal that each tissue has in their images.

The settings stand in ``assets/scanners.json``. The names are fictional. The contrasts are close together and
every parameter varies from scan to scan. What tells the scanners apart is mostly spatial (point spread,
ringing, grain of the noise, shape of the bias field), and an intensity histogram does not see it. Aster and
Borea are nearly alike: they share sequence and contrast, and their noise differs a little in grain and place.

Sources: tissue constants and sequence parameters are typical published values (1.5 T and 3 T; public BIDS
sidecars); the signal equation of MPRAGE is that of Bernstein et al., Handbook of MRI Pulse Sequences, 2004.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fastflow.data.anatomy import FloatArray, asset_path

# The constants follow the order of `anatomy.TISSUES`: T1 in seconds at each field strength in tesla,
# T2* in seconds, proton density.
T1 = {1.5: (1.10, 0.56, 4.28, 0.40, 0.75), 3.0: (1.33, 0.83, 4.16, 0.50, 0.95)}
T2_STAR = (0.055, 0.050, 0.50, 0.005, 0.030)
DENSITY = (0.84, 0.72, 1.00, 0.10, 0.75)


@dataclasses.dataclass(frozen=True)
class Scanner:
    """A simulated scanner.

    Lengths are in 2 mm voxels, signals relative to white matter, ranges (low, high) of a draw per scan.

    Attributes:
        name: class name.
        field: tesla.
        repetition_time: seconds.
        echo_time: seconds.
        inversion_time: seconds.
        flip_angle: degrees; written into the sidecar, the signal equation neglects it.
        sharpness: share of k-space that is measured along (right, anterior, superior); below 1 blurs.
        taper: how softly the k-space window ends, 0 to 1; a hard end rings (Gibbs).
        noise: standard deviation of the complex noise.
        noise_window: share of k-space that the noise fills along the same axes; below 1 its grain is coarse.
        g_factor: how much stronger the noise is in the middle than at the edge along those axes (parallel
            imaging).
        bias: strength of the smooth intensity drift.
        bias_axis: direction in which it brightens (right, anterior, superior).
        bias_centre: brightening of the middle of the head (dielectric effect at high field); negative as
            under a surface coil.
        ghost: amplitude of the half-field ghost along the superior axis.
        jitter: standard deviation, from scan to scan, of the shares of k-space below 1.
        distortion: radial distortion (gradient non-linearity): share by which a point at a face of the grid
            lies too far out; negative pulls it in.
        stretch: length of the head in the image over its true length along (right, anterior, superior), as of
            gradients that are calibrated a little wrong.
    """

    name: str
    field: float
    repetition_time: float
    echo_time: float
    inversion_time: float
    flip_angle: float
    sharpness: tuple[float, float, float]
    taper: float
    noise: tuple[float, float]
    noise_window: tuple[float, float, float]
    g_factor: tuple[float, float, float]
    bias: tuple[float, float]
    bias_axis: tuple[float, float, float]
    bias_centre: float
    ghost: tuple[float, float]
    jitter: float = 0.02
    distortion: tuple[float, float] = (0.0, 0.0)
    stretch: tuple[float, float, float] = (1.0, 1.0, 1.0)


def load_scanners(name: str) -> tuple[Scanner, ...]:
    """The scanners of a table among the assets, such as ``"scanners.json"``."""
    table = json.loads(asset_path(name).read_text(encoding="utf-8"))

    def scanner(row: dict[str, Any]) -> Scanner:
        values: dict[str, Any] = table["shared"] | row
        for name, value in values.items():
            values[name] = tuple(value) if isinstance(value, list) else value
        return Scanner(**values)

    return tuple(scanner(row) for row in table["scanners"])


SCANNERS = load_scanners("scanners.json")


def tissue_signals(scanner: Scanner, rng: Generator) -> FloatArray:
    """Signal of each tissue (5,), white matter at 1; sequence and tissues vary by a few percent."""

    def vary(value: float | Sequence[float], sigma: float = 0.04) -> NDArray[np.float64]:
        return np.asarray(np.asarray(value) * np.exp(sigma * rng.standard_normal(np.shape(value))))

    t1, t2, density = vary(T1[scanner.field], 0.05), vary(T2_STAR, 0.05), vary(DENSITY, 0.03)
    repetition, echo = vary(scanner.repetition_time), vary(scanner.echo_time)
    inversion = vary(scanner.inversion_time)
    recovery = np.abs(1.0 - 2.0 * np.exp(-inversion / t1) + np.exp(-repetition / t1)) / (
        1.0 + np.exp(-repetition / t1)
    )
    signal = density * recovery * np.exp(-echo / t2)
    return np.asarray(signal / signal[1], dtype=np.float32)
