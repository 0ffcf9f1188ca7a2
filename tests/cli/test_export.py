"""`fastflow export` and `fastflow verify` as a user calls them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from fastflow.export import onnx as exporter
from typer.testing import CliRunner, Result

from fastflow.cli.main import app


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def copied(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that were traced before: tracing is slow, and tested elsewhere."""
    import onnx_ir as ir

    names = {"ScoreGraph": "score", "SampleGraph": "sample", "LatentGraph": "latent", "AttributionGraph": "attribution"}
    monkeypatch.setattr(
        exporter, "trace", lambda graph, functions, opset: ir.load(exported / f"{names[type(graph).__name__]}.onnx")
    )


def test_verify_tells_errors_and_passes(exported, model_folder, scans):
    result = invoke("verify", exported, "--model", model_folder, "--images", scans, "--slices", 5)
    assert result.exit_code == 0, result.output
    assert "5 slices (given)" in result.stdout and "limit 0.02" in result.stdout
    for name in ("score", "sample", "latent", "attribution", "PyTorch float32"):
        assert f"  {name}\t" in result.stdout


def test_verify_fails_beyond_its_limit(exported, model_folder):
    result = invoke("verify", exported, "--model", model_folder, "--limit", "1e-9")
    assert result.exit_code == 1
    assert "1e-09 are accepted" in result.stderr
    assert "log odds error" in result.stdout


@pytest.mark.usefixtures("copied")
def test_export_writes_sizes_and_errors(model_folder, tmp_path, scans):
    result = invoke("export", model_folder, "--out", tmp_path / "d", "--images", scans, "--slices", 3, "--prior", "0.4,0.6")
    assert result.exit_code == 0, result.output
    assert "runtime.pyz\t" in result.stdout and "the checkpoint has" in result.stdout
    assert "3 slices (given)" in result.stdout
    assert json.loads((tmp_path / "d" / "export.json").read_text())["prior"] == [0.4, 0.6]
    again = invoke("export", model_folder, "--out", tmp_path / "d")
    assert again.exit_code == 2 and "holds an earlier export" in again.stderr


@pytest.mark.usefixtures("copied")
def test_export_writes_a_model_repository_too(model_folder, tmp_path):
    arguments = ("export", model_folder, "--out", tmp_path / "d", "--graphs", "score", "--no-check")
    result = invoke(*arguments, "--triton-server", tmp_path / "repository")
    assert result.exit_code == 0, result.output
    assert "were not compared" in result.stderr
    assert (tmp_path / "repository" / "magic_flow_score" / "1" / "model.onnx").exists()


@pytest.mark.usefixtures("copied")
def test_a_place_that_is_taken_is_told_before_anything_is_written(model_folder, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for arguments in (("--out", taken), ("--out", tmp_path / "d", "--triton-server", taken)):
        result = invoke("export", model_folder, *arguments, "--no-check")
        assert result.exit_code == 2 and "holds other files, such as 'notes.txt'" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--opset", "17"), "opset must be 21, got 17"),
        (
            ("--graphs", "score,decoder"),
            "graphs must be some of score, sample, latent, attribution, each once, got",
        ),
        (("--prior", "a,b"), "prior must be numbers separated by commas"),
        (("--precision", "half"), "half"),
        (("--images", "nowhere"), "nowhere"),
    ],
)
def test_bad_options(model_folder, tmp_path, arguments, words):
    result = invoke("export", model_folder, "--out", tmp_path / "d", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_none(exported, model_folder, tmp_path):
    result = invoke("export", tmp_path / "nowhere", "--out", tmp_path / "d")
    assert result.exit_code == 2 and "is not a model folder" in result.stderr
    result = invoke("verify", tmp_path / "nowhere", "--model", model_folder)
    assert result.exit_code == 2 and "is not an export folder" in result.stderr
    result = invoke("verify", exported, "--model", tmp_path / "nowhere")
    assert result.exit_code == 2 and "is not a model folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_tampered_weights(exported, model_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    with open(copy / "weights.data", "r+b") as stream:
        stream.write(b"\x01")
    result = invoke("verify", copy, "--model", model_folder)
    assert result.exit_code == 2 and "weights.data has sha256" in result.stderr


def test_what_is_not_installed_is_told(model_folder, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest))
    for command in (("export", model_folder, "--out", tmp_path / "d"), ("verify", tmp_path)):
        result = invoke(*command)
        assert result.exit_code == 1
        assert "pip install 'fastflow[export-cpu]', or 'fastflow[export]'" in result.stderr.replace("\n", " ")
