"""The words and exit codes of `fastflow train`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastflow.archive.locks import locked
from fastflow.cli.main import app
from fastflow.data.manifest import Record, index_folder, write_manifest
from fastflow.errors import ManifestError


def train(*arguments: object) -> Result:
    options = ("--preset", "tiny", "--epochs", "1", "--warmup", "0", "--batch-size", "8")
    return CliRunner().invoke(app, ["train", *map(str, arguments), *options])


@pytest.fixture
def records(scans: Path) -> list[Record]:
    """5 files of each class to train on, one of each for validation and for a test."""
    splits = ["train"] * 5 + ["val", "test"]
    return [
        Record(r.path, r.label, r.subject, splits[i % 10])
        for i, r in enumerate(index_folder(scans))
        if i % 10 < 7
    ]


def test_it_says_what_is_used_and_what_is_not(records: list[Record], tmp_path: Path) -> None:
    extra = [
        Record("/nowhere/a.nii", "flat", "sub-a", "train"),
        Record("/nowhere/b.nii", None, "sub-b", "train"),
        Record("/nowhere/c.nii", "flat", "sub-c", "spare"),
    ]
    write_manifest([*records, *extra], tmp_path / "m.csv")
    result = train(tmp_path / "m.csv", "--out", tmp_path / "model")
    assert result.exit_code == 1, result.output
    assert result.stdout.splitlines()[:4] == [
        "17 files found: 12 used, 5 left out (missing 1, no_label 1, split 'spare' 1, split 'test' 2)",
        "grid: 14 x 9 x 15 voxels of 2 x 2 x 2 mm",
        "train: 10 of 11 files can be used (flat 5 of 6, striped 5)",
        "val: 2 of 2 files can be used (flat 1, striped 1)",
    ]
    for text in (
        "left out: no_label 1",
        "left out: split 'spare' 1",
        "/nowhere/a.nii: there is no such file",
    ):
        assert f"warning: {text}" in result.stderr
    # A test split is no fault.
    assert "split 'test'" not in result.stderr
    inventory = json.loads((tmp_path / "model" / "inventory.json").read_text())
    assert inventory["found"] == inventory["used"] + sum(inventory["left_out"].values()) == 17


def test_a_class_without_files_ends_with_2_and_no_model(records: list[Record], tmp_path: Path) -> None:
    lost = [Record(f"/nowhere/{i}.nii", "dotted", f"sub-x{i}", "train") for i in range(2)]
    write_manifest([*records, *lost], tmp_path / "m.csv")
    result = train(tmp_path / "m.csv", "--out", tmp_path / "model")
    assert result.exit_code == 2
    assert "train: 10 of 12 files can be used (dotted 0 of 2, flat 5, striped 5)" in result.stdout
    assert "2 of 2 files of class 'dotted': missing 2" in result.stderr
    assert "epoch" not in result.stderr.replace("before the first epoch", "")
    assert not (tmp_path / "model").exists()


def test_a_model_is_replaced_only_on_demand(records: list[Record], tmp_path: Path) -> None:
    write_manifest([r for r in records if r.split == "train"], tmp_path / "m.csv")
    model = tmp_path / "model"
    assert train(tmp_path / "m.csv", "--out", model).exit_code == 0
    before = (model / "config.json").read_bytes()
    refused = train(tmp_path / "m.csv", "--out", model, "--seed", 1)
    assert refused.exit_code == 2 and "reading" not in refused.stderr
    assert f"{model}: holds a finished model; replace it (--overwrite)" in refused.stderr.replace("\n", " ")
    with locked(model):
        held = train(tmp_path / "m.csv", "--out", model, "--overwrite")
        assert held.exit_code == 2 and "another run is writing here" in held.stderr
        assert (model / "config.json").read_bytes() == before
        replaced = train(tmp_path / "m.csv", "--out", model, "--seed", 1, "--overwrite", "--no-lock")
        assert replaced.exit_code == 0, replaced.output
    assert json.loads((model / "config.json").read_text())["metadata"]["training"]["seed"] == 1


def test_the_column_of_the_class_can_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def list_nothing(source: Path, label: str | None) -> None:
        asked.append((source, label))
        raise ManifestError("nothing here")

    monkeypatch.setattr("fastflow.data.listing.list_records", list_nothing)
    result = train(tmp_path / "m.csv", "--label", "diagnosis", "--out", tmp_path / "model")
    assert result.exit_code == 2 and "nothing here" in result.stderr
    assert asked == [(tmp_path / "m.csv", "diagnosis")]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["--devices", "torchrun"])
def test_two_processes_write_one_model(records: list[Record], tmp_path: Path, launcher: str) -> None:
    write_manifest(records, tmp_path / "m.csv")
    model = tmp_path / "model"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    starts = {"torchrun": [*torchrun, "-m", "fastflow"], "--devices": ["-m", "fastflow"]}
    options = ["--preset", "tiny", "--epochs", "1", "--warmup", "0", "--batch-size", "4"]
    options += ["--devices", "2"] if launcher == "--devices" else []
    command = [*starts[launcher], "train", str(tmp_path / "m.csv"), "--out", str(model), *options]
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    # The first process alone speaks, and writes.
    assert [line.split(":")[0] for line in done.stdout.splitlines()][1:] == [
        "grid",
        "train",
        "val",
        str(model),
    ]
    assert done.stderr.count("epoch 1") == 1
    assert len((model / "history.jsonl").read_text().splitlines()) == 1
    assert not (model / "unfinished").exists() and (model / "config.json").exists()
    if launcher == "--devices":
        again = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert again.returncode == 2
        assert again.stderr.count("holds a finished model") == 1
