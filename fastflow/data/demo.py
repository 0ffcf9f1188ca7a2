"""The demo archive: simulated scanners on real anatomy.

Four real heads become hundreds of subjects: a random diffeomorphic deformation each, and for most a mixture of two heads, warped
part of the way towards each other. Each subject is scanned once, by one of seven simulated scanners: the signal equation of its
sequence per tissue, times the residual texture of the real images, then bias field, point spread, ringing, ghosts and Rician
noise. The scanners' contrasts are close together and every parameter varies from scan to scan; what tells the scanners apart is
mostly spatial (point spread, ringing, grain of the noise, shape of the bias field), which an intensity histogram does not see.

Sources: tissue constants and sequence parameters are typical published values (1.5 T and 3 T; public BIDS sidecars); the
signal equation of MPRAGE, Bernstein et al., Handbook of MRI Pulse Sequences, 2004; Rician noise, Gudbjartsson & Patz, 1995.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from fastflow._files import write_bytes, write_text
from fastflow.data import anatomy
from fastflow.data.anatomy import AFFINE, GRID, FloatArray
from fastflow.data.manifest import Record, write_manifest

# aomic_0042 comes from the same study as aomic_0017 and shares its field of view, so that a model has seen its kind of
# background: the unseen head then tests anatomy, not padding.
UNSEEN_HEAD = "aomic_0042"
TRAINING_HEADS = tuple(name for name in anatomy.HEADS if name != UNSEEN_HEAD)
MIXED = 0.7
COARSE = tuple(-(-n // 2) for n in GRID)

# Seconds; order of `anatomy.TISSUES`. T1 at each field strength, T2*, proton density.
T1 = {1.5: (1.10, 0.56, 4.28, 0.40, 0.75), 3.0: (1.33, 0.83, 4.16, 0.50, 0.95)}
T2_STAR = (0.055, 0.050, 0.50, 0.005, 0.030)
DENSITY = (0.84, 0.72, 1.00, 0.10, 0.75)


@dataclasses.dataclass(frozen=True)
class Scanner:
    """A simulated scanner; lengths in 2 mm voxels, signals relative to white matter, ranges as (low, high) drawn per scan.

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
        g_factor: how much stronger the noise is in the middle than at the edge along those axes (parallel imaging).
        bias: strength of the smooth intensity drift.
        bias_axis: direction in which it brightens (right, anterior, superior).
        bias_centre: brightening of the middle of the head (dielectric effect at high field; negative: a surface coil's opposite).
        ghost: amplitude of the half-field ghost along the superior axis.
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


NOISE = (0.035, 0.055)
BIAS = (0.12, 0.22)
# Fictional names. Aster and Borea are nearly alike: one sequence, one contrast; the noise differs a little in grain and place.
SCANNERS = (
    Scanner(
        name="Aster",
        field=3.0,
        repetition_time=2.3,
        echo_time=0.0029,
        inversion_time=0.9,
        flip_angle=9.0,
        sharpness=(1.0, 1.0, 1.0),
        taper=0.4,
        noise=NOISE,
        noise_window=(1.0, 1.0, 1.0),
        g_factor=(0.0, 0.0, 0.0),
        bias=BIAS,
        bias_axis=(0.2, 0.2, 1.0),
        bias_centre=0.0,
        ghost=(0.0, 0.004),
    ),
    Scanner(
        name="Borea",
        field=3.0,
        repetition_time=2.3,
        echo_time=0.003,
        inversion_time=0.9,
        flip_angle=9.0,
        sharpness=(0.92, 1.0, 1.0),
        taper=0.4,
        noise=NOISE,
        noise_window=(0.85, 1.0, 1.0),
        g_factor=(0.5, 0.0, 0.0),
        bias=BIAS,
        bias_axis=(0.2, 0.2, 1.0),
        bias_centre=0.0,
        ghost=(0.0, 0.004),
    ),
    Scanner(
        name="Cirrus",
        field=3.0,
        repetition_time=2.2,
        echo_time=0.0033,
        inversion_time=0.89,
        flip_angle=8.0,
        sharpness=(1.0, 1.0, 0.78),
        taper=0.1,
        noise=NOISE,
        noise_window=(1.0, 1.0, 0.78),
        g_factor=(0.0, 0.0, 0.7),
        bias=BIAS,
        bias_axis=(0.1, 0.4, -0.9),
        bias_centre=0.0,
        ghost=(0.0, 0.01),
    ),
    Scanner(
        name="Dorado",
        field=3.0,
        repetition_time=2.2,
        echo_time=0.0024,
        inversion_time=0.9,
        flip_angle=9.0,
        sharpness=(0.75, 0.9, 1.0),
        taper=0.1,
        noise=NOISE,
        noise_window=(0.75, 0.9, 1.0),
        g_factor=(0.0, 0.0, 0.0),
        bias=BIAS,
        bias_axis=(1.0, 0.3, 0.1),
        bias_centre=0.0,
        ghost=(0.0, 0.01),
    ),
    Scanner(
        name="Eridan",
        field=3.0,
        repetition_time=2.4,
        echo_time=0.0036,
        inversion_time=0.93,
        flip_angle=8.0,
        sharpness=(0.8, 0.8, 0.8),
        taper=0.8,
        noise=NOISE,
        noise_window=(0.8, 0.8, 0.8),
        g_factor=(0.7, 0.0, 0.7),
        bias=BIAS,
        bias_axis=(-0.8, 0.3, 0.5),
        bias_centre=0.0,
        ghost=(0.0, 0.01),
    ),
    Scanner(
        name="Fornax",
        field=1.5,
        repetition_time=2.4,
        echo_time=0.004,
        inversion_time=0.93,
        flip_angle=9.0,
        sharpness=(0.72, 0.85, 0.72),
        taper=0.1,
        noise=NOISE,
        noise_window=(1.0, 1.0, 1.0),
        g_factor=(0.0, 0.0, 0.0),
        bias=BIAS,
        bias_axis=(0.3, 0.3, 0.3),
        bias_centre=-0.3,
        ghost=(0.0, 0.01),
    ),
    Scanner(
        name="Gemini",
        field=3.0,
        repetition_time=2.3,
        echo_time=0.003,
        inversion_time=0.91,
        flip_angle=9.0,
        sharpness=(0.95, 0.95, 0.9),
        taper=0.6,
        noise=NOISE,
        noise_window=(0.6, 0.8, 0.6),
        g_factor=(0.3, 0.0, 0.3),
        bias=BIAS,
        bias_axis=(0.1, 0.8, 0.2),
        bias_centre=0.3,
        ghost=(0.02, 0.05),
    ),
)

# Scans per scanner, most to fewest: the imbalance of a study with one large site and several small ones.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "demo": {
        "train": (84, 56, 42, 34, 28, 22, 14),
        "val": (14, 10, 8, 7, 6, 6, 5),
        "test": (28, 20, 16, 13, 12, 10, 9),
        "unseen_head": (14, 11, 10, 9, 8, 8, 8),
    },
    "tiny": {"train": (3, 2, 2, 2, 2, 2, 2), "val": (1,) * 7, "test": (1,) * 7, "unseen_head": (1,) * 7},
}


@dataclasses.dataclass(frozen=True)
class Scan:
    """One scan to be made: who, by what, from which random stream."""

    subject: str
    scanner: int
    split: str
    seed: tuple[int, int]


# -- subjects -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Subject:
    """A derived anatomy: one or two heads with weights, each with the displacement that brings it there.

    Attributes:
        heads: names.
        weights: share of each head's signal.
        displacements: (3, 91, 109, 91) each, in 2 mm voxels.
    """

    heads: tuple[str, ...]
    weights: tuple[float, ...]
    displacements: tuple[FloatArray, ...]


def random_velocity(rng: Generator) -> FloatArray:
    """A smooth random velocity field on the 4 mm grid, (3, 46, 55, 46) in its voxels: 32, 16 and 10 mm structure."""
    velocity = np.zeros((3, *COARSE), dtype=np.float32)
    for nodes, amplitude in ((5, 0.55), (9, 0.32), (15, 0.16)):
        field = rng.standard_normal((3, nodes, nodes, nodes), dtype=np.float32) * np.float32(amplitude)
        velocity += np.stack([_resize(part, COARSE) for part in field])
    return velocity


def draw_subject(rng: Generator, heads: Sequence[str]) -> Subject:
    """Draw an anatomy from `heads`: one of them deformed, or two of them met part of the way and deformed together."""
    inner = anatomy.exponentiate(random_velocity(rng))
    if len(heads) == 1 or rng.random() > MIXED:
        return Subject((str(rng.choice(heads)),), (1.0,), (_to_fine(inner),))
    first, second = (str(name) for name in rng.choice(heads, 2, replace=False))
    t = float(rng.random())
    paths = [(first, second, t), (second, first, 1.0 - t)]
    outer = [anatomy.exponentiate(np.float32(share) * anatomy.load_velocity(a, b)) for a, b, share in paths]
    # First the random deformation of the subject, then the way from the subject back to each head.
    displacements = tuple(_to_fine(inner + anatomy.warp(field, inner)) for field in outer)
    return Subject((first, second), (1.0 - t, t), displacements)


def _interpolation(inputs: int, outputs: int, cubic: bool) -> FloatArray:
    """(outputs, inputs) matrix that resamples an axis, ends on ends."""
    from scipy.interpolate import make_interp_spline

    where = np.linspace(0, inputs - 1, outputs)
    return np.asarray(make_interp_spline(np.arange(inputs), np.eye(inputs), k=3 if cubic else 1)(where), dtype=np.float32)


def _apply(matrices: Sequence[FloatArray], image: FloatArray) -> FloatArray:
    """Apply one matrix along each axis: any separable linear filter as three matrix products."""
    image = np.tensordot(matrices[0], image, axes=(1, 0))
    image = np.matmul(matrices[1], image)
    return np.matmul(image, matrices[2].T)


def _resize(image: FloatArray, shape: Sequence[int]) -> FloatArray:
    return _apply([_interpolation(n, m, True) for n, m in zip(image.shape, shape, strict=True)], image)


def _to_fine(displacement: FloatArray) -> FloatArray:
    """From the 4 mm grid, in its voxels, to the 2 mm grid, in its voxels."""
    matrices = []
    for inputs, outputs in zip(COARSE, GRID, strict=True):
        # Coarse voxel i covers the fine voxels 2i and 2i + 1.
        where = np.clip((np.arange(outputs) - 0.5) / 2.0, 0, inputs - 1)
        low = np.minimum(where.astype(int), inputs - 2)
        matrix = np.zeros((outputs, inputs), dtype=np.float32)
        matrix[np.arange(outputs), low] = 1.0 - (where - low)
        matrix[np.arange(outputs), low + 1] = where - low
        matrices.append(matrix)
    return np.stack([np.float32(2.0) * _apply(matrices, part) for part in displacement])


# -- scanners -------------------------------------------------------------------------------------------------------------


def tissue_signals(scanner: Scanner, rng: Generator) -> FloatArray:
    """Signal of each tissue (5,), white matter at 1, for sequence parameters and tissue constants that vary by a few percent."""

    def vary(value: float | Sequence[float], spread: float = 0.04) -> NDArray[np.float64]:
        return np.asarray(np.asarray(value) * np.exp(spread * rng.standard_normal(np.shape(value))))

    t1, t2, density = vary(T1[scanner.field], 0.05), vary(T2_STAR, 0.05), vary(DENSITY, 0.03)
    repetition, echo = vary(scanner.repetition_time), vary(scanner.echo_time)
    inversion = vary(scanner.inversion_time)
    recovery = np.abs(1.0 - 2.0 * np.exp(-inversion / t1) + np.exp(-repetition / t1)) / (1.0 + np.exp(-repetition / t1))
    signal = density * recovery * np.exp(-echo / t2)
    return np.asarray(signal / signal[1], dtype=np.float32)


_textures: dict[str, FloatArray] = {}


def texture(name: str) -> FloatArray:
    """Residual texture of a real head: its T1w image over the image of its tissues' mean intensities, clipped, 1 in air."""
    if name not in _textures:
        head = anatomy.load_head(name)
        weight = head.fractions.sum(axis=(1, 2, 3))
        means = (head.fractions * head.t1).sum(axis=(1, 2, 3)) / weight
        expected = np.tensordot(means.astype(np.float32), head.fractions, axes=1)
        ratio = np.clip((head.t1 + 4.0) / (expected + 4.0), 0.4, 1.7)
        _textures[name] = np.where(expected > 1.0, ratio, np.float32(1.0)).astype(np.float32)
    return _textures[name]


def draw_signal(subject: Subject, signals: FloatArray) -> FloatArray:
    """The ideal image (91, 109, 91) of a subject: tissue signals times texture, each head brought to where it belongs."""
    image = np.zeros(GRID, dtype=np.float32)
    for name, weight, displacement in zip(subject.heads, subject.weights, subject.displacements, strict=True):
        ideal = np.tensordot(signals, anatomy.load_head(name).fractions, axes=1) * texture(name)
        image += np.float32(weight) * anatomy.warp(ideal, displacement)
    return image


def bias_field(scanner: Scanner, rng: Generator) -> FloatArray:
    """A smooth positive field of mean about 1 (91, 109, 91) that drifts mostly along the scanner's axis."""
    strength = rng.uniform(*scanner.bias)
    axis = np.asarray(scanner.bias_axis) + 0.15 * rng.standard_normal(3)
    drift = sum(np.float32(w) * ramp for w, ramp in zip(axis / np.linalg.norm(axis), _ramps(), strict=True))
    centre = scanner.bias_centre + 0.05 * rng.standard_normal()
    bulge = np.float32(0.5) - sum(np.square(ramp) for ramp in _ramps())
    nodes = _resize(rng.standard_normal((4, 4, 4), dtype=np.float32), GRID)
    return np.exp(np.float32(strength) * (drift + np.float32(0.35) * nodes) + np.float32(centre) * bulge)


@functools.cache
def _ramps() -> tuple[FloatArray, ...]:
    """Coordinates from -1 to 1 along each axis, shaped to broadcast over the grid."""
    ramps = [np.linspace(-1.0, 1.0, n, dtype=np.float32) for n in GRID]
    return tuple(ramp.reshape([-1 if i == j else 1 for j in range(3)]) for i, ramp in enumerate(ramps))


def g_factor_map(scanner: Scanner) -> FloatArray:
    """Relative strength of the noise, broadcastable over the grid, of mean square 1: a histogram must not see it."""
    profile = np.float32(1.0) + sum(
        np.float32(g) * np.exp(-np.square(ramp / np.float32(0.45))) for g, ramp in zip(scanner.g_factor, _ramps(), strict=True)
    )
    return np.asarray(profile / np.sqrt(np.mean(np.broadcast_to(np.square(profile), GRID))), dtype=np.float32)


def window_matrix(length: int, share: float, taper: float, ghost: float = 0.0) -> FloatArray:
    """A k-space window along one axis as a (length, length) matrix.

    Args:
        length: voxels.
        share: of k-space that is kept.
        taper: 0 ends the window abruptly, which rings; 1 rolls it off all the way.
        ghost: amplitude of a copy shifted by half the field of view.
    """
    frequency = np.abs(np.fft.fftfreq(length)) * 2.0
    edge = share * (1.0 + 0.5 * taper)
    start = share * (1.0 - taper)
    # A share of 1 is all of k-space: nothing is cut and nothing rolls off.
    window = np.where((frequency <= start) | (share >= 1.0), 1.0, 0.0)
    rolling = (frequency > start) & (frequency < edge) & (share < 1.0)
    window[rolling] = 0.5 * (1.0 + np.cos(np.pi * (frequency[rolling] - start) / max(edge - start, 1e-9)))
    response = np.fft.ifft(window).real
    columns = [np.roll(response, shift) for shift in range(length)]
    matrix = np.stack(columns, axis=1)
    return (matrix + ghost * np.roll(matrix, length // 2, axis=0)).astype(np.float32)


def acquire(scanner: Scanner, image: FloatArray, rng: Generator) -> FloatArray:
    """Scan an ideal image: point spread, ringing, ghost and Rician noise. Returns magnitudes (91, 109, 91)."""

    def vary(share: float) -> float:
        return float(np.clip(share + 0.02 * rng.standard_normal(), 0.3, 1.0)) if share < 1 else 1.0

    ghosts = (0.0, 0.0, float(rng.uniform(*scanner.ghost)))
    taper = float(np.clip(scanner.taper + 0.05 * rng.standard_normal(), 0.0, 1.0))
    spread = [window_matrix(n, vary(s), taper, g) for n, s, g in zip(GRID, scanner.sharpness, ghosts, strict=True)]
    grain = [window_matrix(n, vary(s), 0.3) for n, s in zip(GRID, scanner.noise_window, strict=True)]
    # The grain must not change the strength of the noise, which a histogram would see.
    gain = rng.uniform(*scanner.noise) / np.prod([np.sqrt((m**2).sum(axis=1).mean()) for m in grain])
    strength = np.float32(gain) * g_factor_map(scanner)
    real, imaginary = (strength * _apply(grain, rng.standard_normal(GRID, dtype=np.float32)) for _ in range(2))
    return np.hypot(_apply(spread, image) + real, imaginary)


# -- the archive ----------------------------------------------------------------------------------------------------------


def plan_archive(size: str | Mapping[str, Sequence[int]] = "demo", seed: int = 0) -> list[Scan]:
    """Every scan of an archive: each subject is scanned once, so no subject is in two splits.

    Args:
        size: a key of `SIZES`, or for each split the number of scans per scanner.
        seed: of all randomness.

    Raises:
        ValueError: the size is unknown, names a split that does not exist, or does not count every scanner.
    """
    if isinstance(size, str):
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}")
        size = SIZES[size]
    scans: list[Scan] = []
    for split, counts in size.items():
        # A misspelt unseen_head would quietly become a test on the training heads.
        if split not in SIZES["demo"]:
            raise ValueError(f"size: split must be one of {', '.join(SIZES['demo'])}, got {split!r}")
        if len(counts) != len(SCANNERS) or min(counts) < 0:
            raise ValueError(f"size[{split!r}] must list {len(SCANNERS)} scanners' counts from 0, got {tuple(counts)}")
        for scanner, count in enumerate(counts):
            scans += [Scan(f"sub-{len(scans) + i + 1:04d}", scanner, split, (seed, len(scans) + i)) for i in range(count)]
    return scans


def build_archive(
    folder: str | PathLike[str],
    seed: int = 0,
    size: str | Mapping[str, Sequence[int]] = "demo",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Write the archive: ``.nii.gz`` volumes with BIDS names and JSON sidecars, ``dataset_description.json``, ``manifest.csv``.

    Args:
        folder: where; created when missing.
        seed: equal seeds give equal bytes, whatever the number of workers.
        size: a key of `SIZES`, or for each split the number of scans per scanner.
        workers: processes.
        progress: called with the number of volumes done and their total.

    Returns:
        One record per volume; splits ``train``, ``val``, ``test`` (unseen subjects made from the training heads) and
        ``unseen_head`` (made from a head that no training subject has any part of).

    Raises:
        ValueError: the size is not understood.
    """
    folder = Path(folder)
    scans = plan_archive(size, seed)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier_archive(folder)
    _write_json(folder / "dataset_description.json", _description(seed))
    records: list[Record] = []
    jobs = [(scan, str(folder)) for scan in scans]
    context = multiprocessing.get_context("spawn")
    # One thread per process: several would only fight over the cores.
    with _single_threaded(), ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done, record in enumerate(pool.map(_make, jobs, chunksize=2), start=1):
            records.append(record)
            if progress is not None:
                progress(done, len(scans))
    write_manifest(records, folder / "manifest.csv")
    return records


def _remove_earlier_archive(folder: Path) -> None:
    """Clear subjects that an earlier run wrote, so that none is left outside the new manifest; other folders stay untouched."""
    description = folder / "dataset_description.json"
    if description.is_file() and "fastflow demo-data" in description.read_text(encoding="utf-8"):
        for subject in folder.glob("sub-[0-9][0-9][0-9][0-9]"):
            shutil.rmtree(subject)


class _single_threaded:
    """Children that start inside see one thread for their linear algebra."""

    NAMES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.NAMES}
        os.environ.update(dict.fromkeys(self.NAMES, "1"))

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_scan(scan: Scan) -> tuple[NDArray[np.int16], dict[str, Any]]:
    """The voxels (91, 109, 91) of one scan and its sidecar."""
    rng = np.random.default_rng(scan.seed)
    scanner = SCANNERS[scan.scanner]
    subject = draw_subject(rng, (UNSEEN_HEAD,) if scan.split == "unseen_head" else TRAINING_HEADS)
    ideal = draw_signal(subject, tissue_signals(scanner, rng)) * bias_field(scanner, rng)
    magnitudes = acquire(scanner, ideal, rng)
    gain = rng.uniform(350.0, 650.0)
    voxels = np.clip(np.rint(magnitudes * gain), 0, 32767).astype(np.int16)
    return voxels, _sidecar(scan, scanner, subject)


def _sidecar(scan: Scan, scanner: Scanner, subject: Subject) -> dict[str, Any]:
    return {
        "ConversionSoftware": "fastflow demo-data",
        "Manufacturer": "simulated",
        "ManufacturersModelName": scanner.name,
        "MagneticFieldStrength": scanner.field,
        "SequenceName": "MPRAGE",
        "RepetitionTime": scanner.repetition_time,
        "EchoTime": scanner.echo_time,
        "InversionTime": scanner.inversion_time,
        "FlipAngle": scanner.flip_angle,
        "Description": "simulated scanner on real anatomy",
        "Note": "sequence values are the scanner's nominal ones; each scan varies them by a few percent",
        "SourceHeads": {name: round(weight, 4) for name, weight in zip(subject.heads, subject.weights, strict=True)},
        "Seed": list(scan.seed),
    }


def _description(seed: int) -> dict[str, Any]:
    licences = (anatomy._asset("LICENCES.md")).read_text(encoding="utf-8")
    return {
        "Name": "Simulated scanners on real anatomy",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "fastflow demo-data"}],
        "License": "see the table of sources",
        "Sources": licences,
        "Seed": seed,
    }


def _make(job: tuple[Scan, str]) -> Record:
    scan, folder = job
    scanner = SCANNERS[scan.scanner].name
    voxels, sidecar = make_scan(scan)
    stem = Path(folder) / scan.subject / "anat" / f"{scan.subject}_acq-{scanner}_T1w"
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(stem.name + ".nii.gz")
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    # No time and no name in the gzip header: equal seeds must give equal bytes.
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    _write_json(stem.with_name(stem.name + ".json"), sidecar)
    return Record(str(path), scanner, scan.subject, scan.split)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")
