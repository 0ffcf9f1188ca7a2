"""`fastflow export` and `fastflow verify` as a user calls them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fastflow.export import onnx as exporter
from typer.testing import CliRunner, Result

from fastflow.cli.main import app

# A small model and its export.
SMALL = Path(__file__).parents[1] / "fixtures" / "v0"
MODEL, EXPORT = SMALL / "model", SMALL / "export"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five volumes that fit the small model. Do not write into it."""
    folder, random = tmp_path_factory.mktemp("scans"), np.random.default_rng(0)
    for i in range(5):
        volume = random.normal(120.0, 30.0, (7, 5, 7)).clip(0).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.diag([2.0, 2.0, 2.0, 1.0])), folder / f"scan{i}.nii.gz")
    return folder


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make tracing give graphs that were traced before: it is slow, and tested elsewhere."""
    import onnx_ir as ir

    names = {
        "ScoreGraph": "score",
        "SampleGraph": "sample",
        "LatentGraph": "latent",
        "AttributionGraph": "attribution",
    }
    monkeypatch.setattr(
        exporter,
        "trace",
        lambda graph, functions, opset: ir.load(EXPORT / f"{names[type(graph).__name__]}.onnx"),
    )


def test_verify_tells_errors_and_passes(scans):
    result = invoke("verify", EXPORT, "--model", MODEL, "--images", scans, "--slices", 5)
    assert result.exit_code == 0, result.output
    assert "5 slices (given)" in result.stdout and "limit 0.02" in result.stdout
    for name in ("score", "sample", "latent", "attribution", "PyTorch float32"):
        assert f"  {name}\t" in result.stdout


def test_verify_fails_beyond_its_limit():
    result = invoke("verify", EXPORT, "--model", MODEL, "--limit", "1e-9")
    assert result.exit_code == 1
    assert "1e-09 are accepted" in result.stderr
    assert "log odds error" in result.stdout


@pytest.mark.usefixtures("copied")
def test_export_writes_sizes_and_errors(tmp_path, scans):
    result = invoke(
        "export",
        MODEL,
        "--out",
        tmp_path / "d",
        "--images",
        scans,
        "--slices",
        3,
        "--prior",
        "0.4,0.6",
    )
    assert result.exit_code == 0, result.output
    assert "runtime.pyz\t" in result.stdout and "the checkpoint has" in result.stdout
    assert "3 slices (given)" in result.stdout
    assert json.loads((tmp_path / "d" / "export.json").read_text())["prior"] == [0.4, 0.6]
    again = invoke("export", MODEL, "--out", tmp_path / "d")
    assert again.exit_code == 2 and "holds an earlier export" in again.stderr


@pytest.mark.usefixtures("copied")
def test_export_writes_a_model_repository_too(tmp_path):
    arguments = ("export", MODEL, "--out", tmp_path / "d", "--graphs", "score", "--no-check")
    result = invoke(*arguments, "--triton-server", tmp_path / "repository")
    assert result.exit_code == 0, result.output
    assert "were not compared" in result.stderr
    assert (tmp_path / "repository" / "magic_flow_score" / "1" / "model.onnx").exists()


@pytest.mark.usefixtures("copied")
def test_a_place_that_is_taken_is_told_before_anything_is_written(tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    for arguments in (("--out", taken), ("--out", tmp_path / "d", "--triton-server", taken)):
        result = invoke("export", MODEL, *arguments, "--no-check")
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
def test_bad_options(tmp_path, arguments, words):
    result = invoke("export", MODEL, "--out", tmp_path / "d", *arguments)
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_are_none(tmp_path):
    result = invoke("export", tmp_path / "nowhere", "--out", tmp_path / "d")
    assert result.exit_code == 2 and "is not a model folder" in result.stderr
    result = invoke("verify", tmp_path / "nowhere", "--model", MODEL)
    assert result.exit_code == 2 and "is not an export folder" in result.stderr
    result = invoke("verify", EXPORT, "--model", tmp_path / "nowhere")
    assert result.exit_code == 2 and "is not a model folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_tampered_weights(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(EXPORT, copy)
    with open(copy / "weights.data", "r+b") as stream:
        stream.write(b"\x01")
    result = invoke("verify", copy, "--model", MODEL)
    assert result.exit_code == 2 and "weights.data has sha256" in result.stderr


def test_what_is_not_installed_is_told(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    for command in (("export", MODEL, "--out", tmp_path / "d"), ("verify", tmp_path)):
        result = invoke(*command)
        assert result.exit_code == 1
        assert "pip install 'fastflow[export-cpu]', or 'fastflow[export]'" in result.stderr.replace("\n", " ")
