"""The demo archive on disk: a subject per scan, files with BIDS names, sidecars and a manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from fastflow._files import write_bytes, write_text
from fastflow.data.anatomy import AFFINE, asset_path
from fastflow.data.demo.acquisition import acquire, bias_field, distort
from fastflow.data.demo.scanners import SCANNERS, Scanner, tissue_signals
from fastflow.data.demo.subjects import TRAINING_HEADS, UNSEEN_HEAD, Subject, draw_signal, draw_subject
from fastflow.data.manifest import Record, write_manifest

# Scanners have most to fewest scans: the imbalance of a study with one large site and several small ones.
SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "demo": {
        "train": (84, 56, 42, 34, 28, 22, 14),
        "val": (14, 10, 8, 7, 6, 6, 5),
        "test": (28, 20, 16, 13, 12, 10, 9),
        "unseen_head": (14, 11, 10, 9, 8, 8, 8),
    },
    "tiny": {"train": (3, 2, 2, 2, 2, 2, 2), "val": (1,) * 7, "test": (1,) * 7, "unseen_head": (1,) * 7},
}
# Archives carry this name in their description; only such folders are cleared.
GENERATOR = "fastflow demo-data"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclasses.dataclass(frozen=True)
class Scan:
    """One scan to be made.

    Attributes:
        subject: BIDS name.
        scanner: index into the archive's scanners, `SCANNERS` for the demo.
        split: the archive's word for the set that it belongs to; ``unseen_head`` is made from the unseen head.
        seed: of the random stream that makes it.
        anatomy: seed of the subject's anatomy, which several scans may share; drawn from `seed` when None.
        session: BIDS name of the session; None where a subject is scanned once.
    """

    subject: str
    scanner: int
    split: str
    seed: tuple[int, ...]
    anatomy: tuple[int, ...] | None = None
    session: str | None = None


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
            raise ValueError(
                f"size[{split!r}] must list {len(SCANNERS)} scanners' counts from 0, got {tuple(counts)}"
            )
        for scanner, count in enumerate(counts):
            scans += [
                Scan(f"sub-{len(scans) + i + 1:04d}", scanner, split, (seed, len(scans) + i))
                for i in range(count)
            ]
    return scans


def build_archive(
    folder: str | PathLike[str],
    seed: int = 0,
    size: str | Mapping[str, Sequence[int]] = "demo",
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Write the archive: ``.nii.gz`` volumes, JSON sidecars, ``dataset_description.json``, ``manifest.csv``.

    Args:
        folder: where; created when missing.
        seed: equal seeds give equal bytes, whatever the number of workers.
        size: a key of `SIZES`, or for each split the number of scans per scanner.
        workers: processes.
        progress: called with the number of volumes done and their total.

    Returns:
        One record per volume; splits ``train``, ``val``, ``test`` (unseen subjects made from the training
        heads) and ``unseen_head`` (made from a head that no training subject has any part of).

    Raises:
        ValueError: the size is not understood.
    """
    return write_archive(folder, plan_archive(size, seed), SCANNERS, seed, workers, progress)


def write_archive(
    folder: str | PathLike[str],
    scans: Sequence[Scan],
    scanners: Sequence[Scanner],
    seed: int,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> list[Record]:
    """Make scans and write them, as `build_archive` does; see there."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_earlier_archive(folder)
    _write_json(folder / "dataset_description.json", _description(seed))
    records: list[Record] = []
    jobs = [(scan, scanners[scan.scanner], str(folder)) for scan in scans]
    context = multiprocessing.get_context("spawn")
    with _single_threaded(), ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done, record in enumerate(pool.map(_write_scan, jobs, chunksize=2), start=1):
            records.append(record)
            if progress is not None:
                progress(done, len(scans))
    write_manifest(records, folder / "manifest.csv")
    return records


def _remove_earlier_archive(folder: Path) -> None:
    """Clear the subjects of an earlier run, which the new manifest would not list; other folders stay."""
    description = folder / "dataset_description.json"
    if description.is_file() and GENERATOR in description.read_text(encoding="utf-8"):
        for subject in folder.glob("sub-[0-9][0-9][0-9][0-9]"):
            shutil.rmtree(subject)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Give processes that start inside one thread for linear algebra: several would fight over the cores."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def make_scan(scan: Scan, scanner: Scanner | None = None) -> tuple[NDArray[np.int16], dict[str, Any]]:
    """The voxels (91, 109, 91) of one scan and its sidecar.

    Args:
        scan: what to make.
        scanner: that makes it; the demo's scanner of that index when None.
    """
    rng = np.random.default_rng(scan.seed)
    scanner = scanner or SCANNERS[scan.scanner]
    anatomy = rng if scan.anatomy is None else np.random.default_rng(scan.anatomy)
    subject = draw_subject(anatomy, (UNSEEN_HEAD,) if scan.split == "unseen_head" else TRAINING_HEADS)
    signal = distort(scanner, draw_signal(subject, tissue_signals(scanner, rng)), rng)
    magnitudes = acquire(scanner, signal * bias_field(scanner, rng), rng)
    gain = rng.uniform(350.0, 650.0)
    voxels = np.clip(np.rint(magnitudes * gain), 0, 32767).astype(np.int16)
    return voxels, _sidecar(scan, scanner, subject)


def _sidecar(scan: Scan, scanner: Scanner, subject: Subject) -> dict[str, Any]:
    return {
        "ConversionSoftware": GENERATOR,
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
        "SourceHeads": {
            name: round(weight, 4) for name, weight in zip(subject.heads, subject.weights, strict=True)
        },
        "Seed": list(scan.seed),
    }


def _description(seed: int) -> dict[str, Any]:
    return {
        "Name": "Simulated scanners on real anatomy",
        "BIDSVersion": "1.10.0",
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": GENERATOR}],
        "License": "see the table of sources",
        "Sources": asset_path("LICENCES.md").read_text(encoding="utf-8"),
        "Seed": seed,
    }


def _write_scan(job: tuple[Scan, Scanner, str]) -> Record:
    scan, scanner, folder = job
    voxels, sidecar = make_scan(scan, scanner)
    place, name = Path(folder) / scan.subject, scan.subject
    if scan.session is not None:
        place, name = place / scan.session, f"{name}_{scan.session}"
    stem = place / "anat" / f"{name}_acq-{scanner.name}_T1w"
    stem.parent.mkdir(parents=True, exist_ok=True)
    path = stem.with_name(stem.name + ".nii.gz")
    image = nib.Nifti1Image(voxels, AFFINE)
    image.header.set_xyzt_units("mm", "sec")
    # Equal seeds must give equal bytes, so the gzip header holds no time and no name.
    write_bytes(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
    _write_json(stem.with_name(stem.name + ".json"), sidecar)
    return Record(str(path), scanner.name, scan.subject, scan.split)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=1) + "\n")
