"""Which inputs a resumed run takes for done, and which folders it goes on with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastflow import MagicFlow
from fastflow.archive.classify import classify
from fastflow.cli.main import app
from fastflow.errors import CheckpointError, ManifestError, OutputFolderError
from tests.archive import quick
from tests.archive.interrupted import FEW, few, rows_of, run

pytestmark = pytest.mark.usefixtures("matrix")


def test_files_that_change_come_and_go(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    run(source, model_folder, out)
    names = sorted(path.name for path in source.iterdir())
    shutil.copy(source / names[1], source / names[0])
    (source / names[5]).unlink()
    shutil.copy(source / names[1], source / "sub-zzz.nii.gz")
    summary = run(source, model_folder, out, resume=True)
    assert (summary.new, summary.total) == (2, FEW)
    run(source, model_folder, tmp_path / "whole")
    by_path = {row["path"]: row for row in rows_of(out)}
    assert by_path == {row["path"]: row for row in rows_of(tmp_path / "whole")}
    assert len(rows_of(out)) == FEW


def test_failed_ones_are_tried_again(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    bad = [
        row["path"] for row in (run(source, model_folder, out), rows_of(out))[1] if row["status"] == "error"
    ]
    assert len(bad) == 1
    good = next(path for path in sorted(source.iterdir()) if path.name not in bad)
    assert run(source, model_folder, out, resume=True).new == 0
    summary = run(source, model_folder, out, retry_failed=True)
    assert (summary.new, summary.failed, summary.total) == (1, 1, FEW)
    shutil.copy(good, source / bad[0])
    summary = run(source, model_folder, out, retry_failed=True)
    assert (summary.new, summary.failed, summary.total) == (1, 0, FEW)
    assert [row["path"] for row in rows_of(out)].count(bad[0]) == 1


def test_inputs_given_twice_stay_two(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 3), tmp_path / "r"
    first = sorted(source.iterdir())[0]
    classify([source, first], model_folder, out)
    assert classify([source, first], model_folder, out, resume=True).new == 0
    assert len(rows_of(out)) == 4


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"prior": [0.9, 0.1]}, "prior"),
        ({"slices": "center"}, "preprocess"),
        ({"combine": "mean"}, "combine"),
        ({"id_from": "hash"}, "id_from"),
        ({"format": "parquet"}, "format"),
    ],
)
def test_other_settings_do_not_resume(
    archive: Path, model_folder: Path, tmp_path: Path, options: dict[str, Any], name: str
) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    run(source, model_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputFolderError, match=f"cannot be resumed, because {name} was .* and is now"):
        run(source, model_folder, out, resume=True, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    run(source, model_folder, out, overwrite=True, **options)
    assert len(rows_of(out)) == 2


def test_another_model_does_not_resume(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    run(source, model_folder, out)
    model = MagicFlow.load(model_folder)
    model.temperature = 7.0
    model.save(tmp_path / "model")
    with pytest.raises(OutputFolderError, match="because model_hash was"):
        run(source, tmp_path / "model", out, resume=True)


def test_folders_that_are_not_its_own_are_left_alone(
    archive: Path, model_folder: Path, tmp_path: Path
) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    for options in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(OutputFolderError, match=r"holds other files, such as 'thesis\.txt'"):
            run(source, model_folder, out, **options)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(OutputFolderError, match="must be a folder, it is a file"):
        run(source, model_folder, out / "thesis.txt")


def test_nothing_is_left_of_a_run_that_could_not_begin(
    archive: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflow.archive.classify.prepare", quick.prepare_once)
    (tmp_path / "empty").mkdir()
    broken = shutil.copytree(model_folder, tmp_path / "model")
    next(broken.glob("*.safetensors")).write_bytes(b"tampered")
    for source, model, error in [
        (archive, tmp_path / "none", CheckpointError),
        (archive, broken, CheckpointError),
        (tmp_path / "empty", model_folder, ManifestError),
        (tmp_path / "none.csv", model_folder, ManifestError),
    ]:
        with pytest.raises(error):
            run(source, model, tmp_path / "r")
        assert not (tmp_path / "r").exists()


def test_a_summary_is_there_whenever_a_run_was_finished(
    archive: Path, model_folder: Path, tmp_path: Path
) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    run(source, model_folder, out)
    (out / "summary.json").unlink()
    run(source, model_folder, out, resume=True)
    document = json.loads((out / "summary.json").read_text())
    assert (document["rows"], document["rows_of_this_run"]) == (2, 0)


def test_damage_ends_the_command_with_one_line(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 4), tmp_path / "r"
    arguments = ["classify", str(source), "--model", str(model_folder), "--out", str(out), "--resume"]
    assert CliRunner().invoke(app, arguments).exit_code in (0, 3)
    content = bytearray((out / "journal.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "journal.jsonl").write_bytes(content)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "is damaged" in result.stderr and result.stderr.count("\n") == 1


def test_an_empty_source_is_told_before_any_work(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    """Behind the work, it would be told at every resumption, and the inputs of a run cannot be changed."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(ManifestError, match="empty: no "):
        classify([archive, tmp_path / "empty"], model_folder, tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("content", ["[]", "[1]", "5", "null", "{", "[" * 100_000, ""])
def test_a_run_json_that_says_nothing(
    archive: Path, model_folder: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json").write_text(content)
    with pytest.raises(OutputFolderError, match=r"cannot be (read|resumed)"):
        run(archive, model_folder, tmp_path / "r", resume=True)


def test_a_name_that_no_file_system_has_costs_a_row(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    paths = [str(next(scans.rglob("*.nii.gz"))), "x\ud800.nii", "nul\0.nii"]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps({"path": path}) + "\n" for path in paths))
    for resume in (False, True):
        classify([tmp_path / "m.jsonl"], model_folder, tmp_path / "r", resume=resume)
        assert [row["error_code"] for row in rows_of(tmp_path / "r")] == ["", "unreadable", "unreadable"]
