from __future__ import annotations

from pathlib import Path

from fastflow.archive.plan import plan


def test_a_plan_reads_nothing(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    found = plan([scans, tmp_path / "gone.nii"], model_folder, slices="3,4")
    assert (found.total, found.missing, found.kinds) == (21, 1, {".nii": 1, ".nii.gz": 20})
    assert found.bytes == sum(path.stat().st_size for path in scans.rglob("*.nii.gz"))
    assert (found.class_names, found.slices) == (("flat", "striped"), "3,4")
    assert len(found.first) == 5


def test_endings_and_what_is_left_out_are_counted(tmp_path: Path, model_folder: Path) -> None:
    for name in ("a.NII.GZ", "b.nii.gz", "c.PNG", "d.dcm", "e.txt"):
        (tmp_path / name).touch()
    found = plan([tmp_path], model_folder)
    assert found.kinds == {".nii.gz": 2, ".png": 1}
    assert found.inventory.line() == "4 files found: 3 used, 1 left out (.dcm 1)"
