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
from fastflow.training.config import TrainConfig
from fastflow.training.phases import parse_schedule


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
    schedule = "likelihood:0.5,hybrid:0.5:weight=0.1:ramp=0.5"
    result = train(
        *(tmp_path / "m.csv", "--out", tmp_path / "model"),
        "--schedule",
        schedule,
        "--select",
        "both",
        "--no-cache",
    )
    assert result.exit_code == 1, result.output
    assert "cache" not in result.output and not (tmp_path / ".fastflow-cache").exists()
    assert result.stdout.splitlines()[:5] == [
        "17 files found: 12 used, 5 left out (missing 1, no_label 1, split 'spare' 1, split 'test' 2)",
        "grid: 14 x 9 x 15 voxels of 2 x 2 x 2 mm",
        "train: 10 of 11 files can be used (flat 5 of 6, striped 5)",
        "val: 2 of 2 files can be used (flat 1, striped 1)",
        "likelihood 50 % of steps, 1 pass an image; hybrid 50 %, 2 passes",
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
    settings = json.loads((tmp_path / "model" / "config.json").read_text())["metadata"]["training"]
    kept, select = settings.pop("kept_epoch"), settings["select"]
    assert (kept, select) == (1, "both")
    assert TrainConfig.from_dict(settings).schedule == parse_schedule(schedule)
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


def test_a_second_training_reads_from_the_cache(records: list[Record], tmp_path: Path) -> None:
    write_manifest(records, tmp_path / "m.csv")
    model, cache = tmp_path / "models" / "a", tmp_path / "models" / ".fastflow-cache"
    first = train(tmp_path / "m.csv", "--out", model)
    assert first.exit_code == 0 and "0 of 12 files from the cache" in first.stderr
    before = (model / "config.json").read_bytes()
    # Of the two parts, the smaller one has the files of validation.
    small = min(cache.glob("*/*/images.u8"), key=lambda path: path.stat().st_size)
    small.write_bytes(b"")
    again = train(tmp_path / "m.csv", "--out", model, "--overwrite")
    assert again.exit_code == 0 and "10 of 12 files from the cache" in again.stderr
    assert "warning: " in again.stderr and "damaged and not used" in again.stderr
    assert "cache" not in again.stdout and (model / "config.json").read_bytes() == before


def test_a_cache_that_cannot_be(records: list[Record], tmp_path: Path) -> None:
    write_manifest(records, tmp_path / "m.csv")
    both = train(tmp_path / "m.csv", "--out", tmp_path / "a", "--cache", tmp_path / "c", "--no-cache")
    assert both.exit_code == 2 and "exclude each other" in both.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "run.json").touch()
    other = train(tmp_path / "m.csv", "--out", tmp_path / "a", "--cache", tmp_path / "full")
    assert other.exit_code == 2 and "holds other files, such as 'run.json'" in other.stderr.replace("\n", " ")
    assert not (tmp_path / "a").exists() and not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--schedule", "likelihood:0.5,hybrid:0.4"), "sum to 1, got 0.5 + 0.4 = 0.9"),
        (("--schedule", "likelihood:0.5,hybrid:0.5:rival=2"), "did you mean 'rivals'"),
        (("--schedule", "hybrid", "--objective", "hybrid"), "exclude each other"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = train(tmp_path / "m.csv", "--out", tmp_path / "model", *options)
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "model").exists()


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
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines][1:4] == ["grid", "train", "val"]
    assert len(set(lines)) == len(lines) and sum(line.startswith(f"{model}: ") for line in lines) == 1
    assert done.stderr.count("epoch 1") == 1
    assert len((model / "history.jsonl").read_text().splitlines()) == 1
    assert not (model / "unfinished").exists() and (model / "config.json").exists()
    if launcher == "--devices":
        again = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
        assert again.returncode == 2
        assert again.stderr.count("holds a finished model") == 1
