from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner, Result

from fastflow.cli.main import app
from tests.data.places import describe, touch


def index(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["index", *map(str, arguments)])


def test_what_was_found_is_printed(tmp_path: Path) -> None:
    root = touch(tmp_path / "d", "Training/A/1.nii", "Training/B/2.NII", "valid/A/3.nii", "valid/B/4.img")
    result = index(root, "--out", tmp_path / "m.csv")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{tmp_path / 'm.csv'}: 3 files of 3 subjects",
        "  class  train  val",
        "  A          1    1",
        "  B          1    0",
        "4 files found: 3 used, 1 left out (.img 1)",
    ]
    assert (
        f".img 1 (half of a .hdr/.img pair: convert it to .nii.gz): {root / 'valid/B/4.img'}" in result.stderr
    )
    assert "the class 'B' has files in train only, none in val" in result.stderr
    again = index(root, "--out", tmp_path / "m.csv", "--resplit")
    assert (again.exit_code, again.stdout) == (2, "") and "--overwrite" in again.stderr
    assert index(root, "--out", tmp_path / "m.csv", "--resplit", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "m.csv.inventory.json").read_text())["left_out"] == {".img": 1}


def test_a_dataset_asks_for_its_label(tmp_path: Path) -> None:
    root = touch(describe(tmp_path / "ds"), *(f"sub-{i}/anat/sub-{i}_T1w.nii" for i in range(4)))
    (root / "participants.tsv").write_text("participant_id\tdx\nsub-0\tAD\nsub-1\tCN\nsub-2\tn/a\n")
    asked = index(root, "--out", tmp_path / "m.csv")
    assert (asked.exit_code, asked.stdout) == (2, "")
    assert "--label" in asked.stderr and "participants.tsv has dx" in asked.stderr
    found = index(root, "--out", tmp_path / "m.csv", "--label", "DX", "--val", 0, "--test", 0)
    assert found.exit_code == 0
    assert "4 files found: 2 used, 2 left out (no_label 2)" in found.stdout
    unlabelled = index(root, "--out", tmp_path / "n.csv", "--label", "none")
    assert "(no label)" in unlabelled.stdout and "none left out" in unlabelled.stdout


def test_nothing_to_use_is_an_error(tmp_path: Path) -> None:
    result = index(touch(tmp_path / "d", "A/a.dcm"), "--out", tmp_path / "m.csv")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "left out were .dcm 1" in result.stderr
    assert not (tmp_path / "m.csv").exists()
