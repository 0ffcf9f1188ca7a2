"""Which distortions of scans a model notices: distorted copies are classified like any scan."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path

import nibabel as nib
import numpy as np

from fastflow.archive.classify import classify
from fastflow.archive.results import read_results
from fastflow.data.demo.distortions import DISTORTIONS, Distortion
from fastflow.data.volume import read_volume

# So many copies are on the disk at once, of about 4 MB each for volumes of 2 mm.
MAX_COPIES = 200


@dataclasses.dataclass(frozen=True)
class Noticed:
    """The statuses and codes that the copies of one distortion were given.

    Attributes:
        name: of the distortion.
        text: what was done.
        statuses: copies by status.
        codes: copies by code; one copy can have several.
    """

    name: str
    text: str
    statuses: Mapping[str, int]
    codes: Mapping[str, int]

    @property
    def count(self) -> int:
        """Number of copies."""
        return sum(self.statuses.values())

    @property
    def share(self) -> float:
        """The share of copies that are flagged or an error."""
        return 1.0 - self.statuses.get("ok", 0) / self.count


def classify_distorted(
    paths: Sequence[str | PathLike[str]],
    model_folder: str | PathLike[str],
    workers: int = 1,
    device: str = "auto",
    distortions: Sequence[Distortion] = DISTORTIONS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Noticed]:
    """Classify copies of volumes under each distortion.

    Copies are made in a temporary folder, at most 200 at a time.

    Args:
        paths: volumes that can be read.
        model_folder: the model.
        workers: processes that read.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        distortions: what is done to the volumes.
        progress: called with the number of copies that are classified and their total.

    Raises:
        VolumeError: a volume cannot be read.
        ValueError: there is no volume.
    """
    if not paths:
        raise ValueError("paths must name at least one volume, got none")
    found: list[Noticed] = []
    at_once = max(1, MAX_COPIES // len(paths))
    for first in range(0, len(distortions), at_once):
        part = distortions[first : first + at_once]
        with tempfile.TemporaryDirectory() as scratch:
            copies = Path(scratch) / "copies"
            _write_copies(paths, part, copies)
            results = Path(scratch) / "results"
            classify([copies], model_folder, results, batch_size=32, workers=workers, device=device)
            found += _count(part, read_results(results))
        if progress is not None:
            progress(len(paths) * len(found), len(paths) * len(distortions))
    return found


def _write_copies(
    paths: Sequence[str | PathLike[str]], distortions: Sequence[Distortion], folder: Path
) -> None:
    for distortion in distortions:
        (folder / distortion.name).mkdir(parents=True)
    for number, path in enumerate(paths):
        volume = read_volume(path)
        data = volume.data.astype(np.float64)
        for distortion in distortions:
            image = nib.Nifti1Image(
                distortion.apply(data).astype(np.float32), np.diag([*volume.spacing, 1.0])
            )
            nib.save(image, folder / distortion.name / f"{number:05d}.nii")


def _count(distortions: Sequence[Distortion], rows: Iterator[Mapping[str, str]]) -> list[Noticed]:
    statuses: dict[str, Counter[str]] = {distortion.name: Counter() for distortion in distortions}
    codes: dict[str, Counter[str]] = {distortion.name: Counter() for distortion in distortions}
    for row in rows:
        name = Path(row["path"]).parent.name
        statuses[name][row["status"]] += 1
        codes[name].update(code for code in (row["error_code"] or "").split(";") if code)
    return [Noticed(one.name, one.text, statuses[one.name], codes[one.name]) for one in distortions]
