from __future__ import annotations

from pathlib import Path

from fastflow.archive.plan import plan


def test_a_plan_reads_nothing(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    found = plan([scans, tmp_path / "gone.nii"], model_folder, slices="3,4")
    assert (found.total, found.missing, found.kinds) == (21, 1, {".nii": 1, ".nii.gz": 20})
    assert found.bytes == sum(path.stat().st_size for path in scans.rglob("*.nii.gz"))
    assert (found.class_names, found.slices) == (("flat", "striped"), "3,4")
    assert len(found.first) == 5
