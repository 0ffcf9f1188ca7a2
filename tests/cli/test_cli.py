from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import fastflow
from fastflow import workflow
from fastflow.archive.classify import Summary
from fastflow.archive.results import read_results
from fastflow.cli.main import app
from fastflow.data.manifest import index_folder, write_manifest
from fastflow.evaluation.classification import classification_metrics
from fastflow.evaluation.report import TestSet

COMMANDS = ("demo", "demo-data", "index", "train", "classify", "sample", "explain", "doctor")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fastflow {command}" in result.output


def test_help_lists_every_command_and_the_exit_codes() -> None:
    output = invoke("--help").output
    assert all(f" {command} " in output for command in COMMANDS)
    assert "Exit codes" in output


def test_version() -> None:
    assert invoke("--version").stdout == f"fastflow {fastflow.__version__}\n"


def test_doctor_names_versions_and_the_device() -> None:
    result = invoke("doctor")
    assert result.exit_code == 0
    for word in (
        "torch",
        "triton",
        "device",
        "backend",
        "op affine_coupling",
        "op norm_film_act",
        fastflow.__version__,
    ):
        assert word in result.stdout


def test_demo_prints_the_baseline_beside_every_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("flat", "striped")
    good = classification_metrics(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1]), 2, names)
    fair = classification_metrics(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 2, names)
    poor = classification_metrics(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0]), 2, names)

    def run_demo(out: Path, **options: Any) -> workflow.DemoResult:
        assert (out, options["seed"], options["device"]) == (tmp_path, 3, "cpu")
        options["notify"]("training", 1, 2)
        options["on_epoch"]({"epoch": 1, "train_bits_per_dim": 4.5})
        test = TestSet("Unseen subjects", good, poor, 3.25, grain=fair)
        counts = {"ok": 4, "flagged": 0, "error": 0}
        summary = Summary(
            "results", (), counts, {}, names, np.array([[3, 0], [0, 1]]), 4, 1.0, {"bound_by": None}
        )
        return workflow.DemoResult(tmp_path, {"seconds": 12.0}, (test,), summary)

    monkeypatch.setattr(workflow, "run_demo", run_demo)
    result = invoke("demo", "--out", tmp_path, "--seed", 3, "--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.replace("│", " ").splitlines()]
    assert ["Unseen", "subjects", "flow", "1.000", "1.000", "3.250"] in lines
    assert ["grain", "LDA", "0.833", "0.750"] in lines and ["histogram", "0.500", "0.750"] in lines
    assert ["flat", "1.000", "0.667", "1.000"] in lines and ["striped", "1.000", "1.000", "0.000"] in lines
    assert "Simulated scanners on real anatomy" in result.stdout
    assert "epoch 1: train_bits_per_dim 4.5" in result.stderr


def test_from_scans_to_pictures(scans: Path, tmp_path: Path) -> None:
    manifest, model, results = tmp_path / "m.csv", tmp_path / "model", tmp_path / "r"
    assert (
        "20 files of 20 subjects"
        in invoke("index", scans, "--out", manifest, "--val", 0.2, "--test", 0.2).stdout
    )
    trained = invoke(
        "train",
        manifest,
        "--out",
        model,
        "--preset",
        "tiny",
        "--epochs",
        2,
        "--warmup",
        0,
        "--lr",
        1e-3,
        "--condition-from-step",
        2,
    )
    assert trained.exit_code == 0, trained.output
    assert (
        json.loads((model / "config.json").read_text(encoding="utf-8"))["config"]["condition_from_step"] == 2
    )
    assert "val_accuracy" in trained.stdout
    assert trained.stderr.count("epoch ") == 2
    assert [json.loads(line)["epoch"] for line in (model / "history.jsonl").read_text().splitlines()] == [
        1,
        2,
    ]
    classified = invoke("classify", manifest, "--split", "test", "--model", model, "--out", results)
    assert classified.exit_code == 0, classified.output
    assert "4 inputs, 4 classified, 0 failed" in classified.stdout
    # A model that was trained here knows what is typical; one of two epochs may find anything else unlike it.
    assert all(row["status"] in ("ok", "flagged") and row["typicality"] for row in read_results(results))
    assert (
        invoke("sample", "--model", model, "--out", tmp_path / "s", "--count", 1, "--label", "flat").exit_code
        == 0
    )
    assert (tmp_path / "s/flat-1.png").exists()
    assert invoke("explain", manifest, "--model", model, "--out", tmp_path / "e", "--limit", 1).exit_code == 0
    assert len(list((tmp_path / "e").glob("*.png"))) == 1


def test_error_rows_exit_with_3_and_are_named(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    inputs = (scans / "flat/sub-000_T1w.nii.gz", tmp_path / "gone.nii")
    result = invoke("classify", *inputs, "--model", model_folder, "--out", tmp_path / "r")
    assert result.exit_code == 3
    assert "2 inputs, 1 classified, 1 failed" in result.stdout
    assert "gone.nii: there is no such file [missing]" in result.stderr
    again = invoke("classify", *inputs, "--model", model_folder, "--out", tmp_path / "r")
    assert again.exit_code == 2
    assert "holds an earlier run; go on with it (--resume) or replace it (--overwrite)" in again.stderr
    resumed = invoke("classify", *inputs, "--model", model_folder, "--out", tmp_path / "r", "--resume")
    assert resumed.exit_code == 3
    assert "2 of them were there before this run" in resumed.stdout
    stopped = invoke(
        "classify", *inputs, "--model", model_folder, "--out", tmp_path / "s", "--on-error", "fail"
    )
    assert stopped.exit_code == 1
    assert "--resume goes on" in stopped.stderr
    assert invoke("explain", *inputs, "--model", model_folder, "--out", tmp_path / "e").exit_code == 1


def test_classify_options_reach_the_run(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    write_manifest(index_folder(scans), tmp_path / "m.csv")
    options = (
        "--format",
        "parquet",
        "--id-from",
        "hash",
        "--slices",
        "3,4",
        "--combine",
        "mean",
        "--prior",
        "0.7,0.3",
    )
    manifest = ("--manifest", tmp_path / "m.csv", "--shard", "2/2", "--workers", 2, "--batch-size", 5)
    done = invoke(
        "classify", *manifest, *options, "--model", model_folder, "--out", tmp_path / "r", "--device", "cpu"
    )
    assert done.exit_code == 0, done.output
    folder = tmp_path / "r/shard-00002-of-00002"
    rows = list(read_results(folder))
    assert 0 < len(rows) < 20
    assert {len(row["path"]) for row in rows} == {32}
    assert {row["prior"] for row in rows} == {"0.7 0.3"}
    configuration = json.loads((folder / "summary.json").read_text())["configuration"]
    expected = {
        "combine": "mean",
        "format": "parquet",
        "shard": "2/2",
        "workers": 2,
        "batch_size": 5,
        "device": "cpu",
    }
    assert {name: configuration[name] for name in expected} == expected
    assert configuration["preprocess"]["slices"] == "3,4"


def test_explain_counts_and_replaces_only_when_asked(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    inputs = (scans / "flat/sub-000_T1w.nii.gz", tmp_path / "gone.nii")
    arguments = ("explain", *inputs, "--model", model_folder, "--out", tmp_path / "e")
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "2 files found: 1 used, 1 left out (missing 1)" in result.stdout
    assert f"{tmp_path / 'e/explanations.csv'} says which is whose" in result.stdout.replace("\n", " ")
    assert "gone.nii: there is no such file [missing]" in result.stderr
    again = invoke(*arguments)
    assert again.exit_code == 2 and "holds earlier explanations; replace them (--overwrite)" in again.stderr
    assert invoke(*arguments, "--overwrite", "--no-lock").exit_code == 1
    limited = invoke(*arguments, "--overwrite", "--limit", 1)
    assert limited.exit_code == 0
    assert "limit 1: " in limited.stderr and "1 left out (limit 1)" in limited.stdout


def test_sample_replaces_only_when_asked(model_folder: Path, tmp_path: Path) -> None:
    arguments = ("sample", "--model", model_folder, "--out", tmp_path / "s", "--count", 1)
    assert invoke(*arguments).exit_code == 0
    again = invoke(*arguments)
    assert again.exit_code == 2 and "holds earlier samples; replace them (--overwrite)" in again.stderr
    assert invoke(*arguments, "--overwrite", "--no-lock").exit_code == 0


def test_commands_name_a_file_system_without_locks(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    file = scans / "flat/sub-000_T1w.nii.gz"
    for command in (("classify", file), ("explain", file), ("sample",)):
        result = invoke(*command, "--model", model_folder, "--out", tmp_path / "out")
        assert result.exit_code == 2
        message = "this file system has no locks (No locks available); --no-lock goes on without one"
        assert message in result.stderr.replace("\n", " ")
        assert not (tmp_path / "out").exists()
    classified = invoke("classify", file, "--model", model_folder, "--out", tmp_path / "r", "--no-lock")
    assert classified.exit_code == 0, classified.output


def test_little_space_is_told_in_one_line(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = os.statvfs(tmp_path)
    blocks = 3_000_000 // state.f_frsize
    full = types.SimpleNamespace(f_bavail=blocks, f_frsize=state.f_frsize, f_blocks=state.f_blocks)
    monkeypatch.setattr(os, "statvfs", lambda folder: full)
    result = invoke("sample", "--model", model_folder, "--out", tmp_path / "s", "--count", 1)
    assert result.exit_code == 0
    assert result.stderr == f"warning: {tmp_path / 's'}: only 3.0 MB are free there\n"


def test_dry_run_writes_nothing(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    result = invoke("classify", scans, "--model", model_folder, "--out", tmp_path / "r", "--dry-run")
    assert result.exit_code == 0
    assert "20 inputs" in result.stdout
    assert "classes flat, striped; slices center+-1" in result.stdout
    assert not (tmp_path / "r").exists()


def test_no_cuda_is_an_error_and_not_a_cpu(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = invoke("classify", scans, "--model", model_folder, "--out", tmp_path / "r", "--device", "cuda")
    assert result.exit_code == 2
    assert "torch sees no CUDA device" in result.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("classify", "x.nii", "--model", "nowhere"), "nowhere is not a model folder"),
        (("train", "nowhere.csv"), "nowhere.csv: there is no such manifest"),
        (("index", "nowhere.csv"), "there is no such manifest"),
        (("index", "nowhere.csv", "--val", "0.9", "--test", "2"), "Invalid value"),
        (("sample", "--model", "nowhere"), "not a model folder"),
        (("classify",), "give INPUTS or --manifest"),
        (("classify", "x.nii", "--shard", "3/2"), "shard must be i/N with 1 <= i <= N, got 3/2"),
        (("train", "m.csv", "--preset", "huge"), "huge"),
        (("nonsense",), "nonsense"),
    ],
)
def test_bad_input_exits_with_2_and_one_clear_line(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("--debug", "sample", "--model", tmp_path)
    assert isinstance(result.exception, fastflow.errors.CheckpointError)


def test_failing_run_exits_with_1(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = invoke("sample", "--model", model_folder, "--out", tmp_path / "file" / "s")
    assert result.exit_code == 1
    assert "error:" in result.stderr


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).parent / "fastflow"
    done = subprocess.run([script, "index", "nowhere"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: nowhere: there is no such file or folder; a manifest ends in .csv, .tsv or .jsonl\n"
    )


@pytest.mark.slow
def test_from_demo_data_to_pictures(tmp_path: Path) -> None:
    archive, model = tmp_path / "archive", tmp_path / "model"
    built = invoke("demo-data", archive, "--size", "tiny", "--seed", 3)
    assert "15 train, 7 val, 7 test, 7 unseen_head" in built.stdout
    assert invoke("index", archive / "manifest.csv", "--out", tmp_path / "m.csv").exit_code == 0
    trained = invoke(
        "train", tmp_path / "m.csv", "--out", model, "--preset", "small", "--epochs", 1, "--warmup", 0
    )
    assert trained.exit_code == 0, trained.output
    classified = invoke(
        "classify", tmp_path / "m.csv", "--split", "unseen_head", "--model", model, "--out", tmp_path / "r"
    )
    assert "7 inputs, 7 classified, 0 failed" in classified.stdout
    assert invoke("sample", "--model", model, "--out", tmp_path / "s", "--count", 1).exit_code == 0
    assert (
        invoke(
            "explain", tmp_path / "m.csv", "--model", model, "--out", tmp_path / "e", "--limit", 1
        ).exit_code
        == 0
    )
