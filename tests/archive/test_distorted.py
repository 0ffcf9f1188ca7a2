from __future__ import annotations

from pathlib import Path

import pytest

from fastflow.archive import distorted
from fastflow.archive.distorted import classify_distorted
from fastflow.data.demo.distortions import Distortion
from fastflow.errors import VolumeError

CHANGES = (
    Distortion("none", "as it is", lambda data: data),
    Distortion("black", "nothing is left", lambda data: 0 * data),
    Distortion("half", "half is left", lambda data: data / 2),
)


@pytest.mark.parametrize("most", [200, 4])
def test_copies_are_counted_by_distortion(
    scans: Path, model_folder: Path, loaded_once: None, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(distorted, "MAX_COPIES", most)
    paths = sorted(scans.rglob("*.nii.gz"))[:2]
    told: list[tuple[int, int]] = []
    found = classify_distorted(
        paths, model_folder, 1, "cpu", CHANGES, progress=lambda done, total: told.append((done, total))
    )
    assert [(one.name, one.count, one.share) for one in found] == [
        ("none", 2, 0.0),
        ("black", 2, 1.0),
        ("half", 2, 0.0),
    ]
    assert (found[1].statuses, found[1].codes) == ({"error": 2}, {"constant": 2})
    assert told == ([(6, 6)] if most == 200 else [(4, 6), (6, 6)])


def test_scans_that_cannot_be_read_are_named(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="missing"):
        classify_distorted([tmp_path / "gone.nii"], model_folder)
    with pytest.raises(ValueError, match="paths must name at least one volume, got none"):
        classify_distorted([], model_folder)
