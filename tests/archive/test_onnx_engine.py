"""`classify` with an export in the place of a model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

pytest.importorskip("onnxruntime")

from fastflow.archive.classify import classify, plan
from fastflow.archive.journal import Journal
from fastflow.archive.results import read_results
from fastflow.cli.main import app
from fastflow.data.preprocess import Preprocess, to_unit_range
from fastflow.data.slices import load_image
from fastflow.errors import ExportError, RunStoppedError
from fastflow.runtime.scorer import OnnxScorer
from tests.export.handmade import CLASSES, PREPROCESS, expected, write_export


@pytest.fixture(scope="module")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"))


def journal(folder: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every bit of a run's rows, but for the time they took."""
    rows = Journal.open(folder / "journal.jsonl").read()
    return [(key, {name: value for name, value in row.items() if name != "seconds"}) for key, row in rows]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [row for _, row in journal(folder)]


def test_rows_are_what_the_graph_says(scans: Path, export_folder: Path, tmp_path: Path) -> None:
    files = [scans / "flat/sub-000_T1w.nii.gz", scans / "striped/sub-103_T1w.nii.gz"]
    summary = classify(files, export_folder, tmp_path / "r", prior=[0.9, 0.1], engine="onnx", device="cpu")
    for row, file in zip(rows_of(tmp_path / "r"), files, strict=True):
        each = expected(to_unit_range(load_image(str(file), Preprocess.from_dict(PREPROCESS))))
        assert row["logp"] == pytest.approx(each.sum(axis=0).tolist(), abs=1e-4)
        logits = each.sum(axis=0) / 5.0 + np.log([0.9, 0.1])
        assert row["posterior"] == pytest.approx((np.exp(logits) / np.exp(logits).sum()).tolist(), abs=1e-5)
        assert row["predicted"] == CLASSES[int(logits.argmax())]
        best = each[:, int(logits.argmax())].mean()
        assert row["bits_per_dim"] == pytest.approx(-(best / 256 + np.log(2 / 255)) / np.log(2), abs=1e-5)
        assert (row["status"], row["typicality"]) == ("ok", None)
    assert summary.class_names == CLASSES


def test_the_folder_says_what_was_done(few_scans: Path, tmp_path: Path) -> None:
    folder = write_export(tmp_path / "export", precision="mixed", prior=[0.8, 0.2])
    classify([few_scans / "flat"], folder, tmp_path / "r", engine="onnx")
    run, summary = (json.loads((tmp_path / "r" / name).read_text()) for name in ("run.json", "summary.json"))
    assert run["model_hash"] == hashlib.sha256((folder / "export.json").read_bytes()).hexdigest()[:16]
    # As with a model, no prior is a uniform one; the precision is the export's.
    assert (run["prior"], run["precision"], run["temperature"], run["class_names"]) == (
        None,
        "mixed",
        5.0,
        list(CLASSES),
    )
    assert (summary["configuration"]["engine"], summary["configuration"]["device"]) == ("onnx", "cpu")
    assert set(summary["versions"]) == {"fastflow", "python", "numpy", "nibabel", "onnxruntime"}
    assert {row["model_hash"] for row in read_results(tmp_path / "r")} == {run["model_hash"]}


def test_a_run_that_was_stopped_goes_on_and_no_bit_depends_on_batches(
    few_scans: Path, export_folder: Path, tmp_path: Path
) -> None:
    inputs = [few_scans / "striped", tmp_path / "nowhere.nii", few_scans / "flat"]
    classify(inputs, export_folder, tmp_path / "whole", engine="onnx", batch_size=16)
    with pytest.raises(RunStoppedError, match=r"nowhere\.nii: there is no such file"):
        classify(inputs, export_folder, tmp_path / "r", engine="onnx", batch_size=7, on_error="fail")
    stopped = journal(tmp_path / "r")
    assert 0 < len(stopped) < 7
    summary = classify(inputs, export_folder, tmp_path / "r", engine="onnx", batch_size=7, resume=True)
    assert (summary.total, summary.new, summary.failed) == (7, 7 - len(stopped), 1)
    assert journal(tmp_path / "r")[: len(stopped)] == stopped
    assert journal(tmp_path / "r") == journal(tmp_path / "whole")


def test_images_that_go_one_by_one_are_not_filled_up_to_a_batch(
    scans: Path, export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = OnnxScorer.score

    def score(scorer: OnnxScorer, images: np.ndarray) -> np.ndarray:
        seen.append(len(images))
        return real(scorer, images)

    monkeypatch.setattr(OnnxScorer, "score", score)
    files = sorted(scans.rglob("*.nii.gz"))[:3]
    classify(files, export_folder, tmp_path / "r", engine="onnx", batch_size=7)
    assert seen == [6, 3]
    # On CUDA the place in a pass may matter, and with it whatever else is in the batch.
    seen.clear()
    monkeypatch.setattr("fastflow.runtime.scorer.BUCKETS", {"cpu": (1, 4)})
    classify(files, export_folder, tmp_path / "filled", engine="onnx", batch_size=7)
    assert seen == [7, 7]


def test_typicality_comes_from_the_export(scans: Path, tmp_path: Path) -> None:
    values = np.linspace(0.0, 1.0, 999).tolist()
    folder = write_export(tmp_path / "export", validation={"slices": "center+-1", "log_prob": values})
    files = sorted(scans.rglob("*.nii.gz"))[:2]
    assert classify(files, folder, tmp_path / "r", engine="onnx").codes == {"atypical": 2}
    classify(files, folder, tmp_path / "other", engine="onnx", slices="4")
    assert [row["typicality"] for row in rows_of(tmp_path / "other")] == [None, None]


def test_what_does_not_fit_is_told_before_a_folder_is_made(
    scans: Path, export_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    def run(folder: Path, **options: Any) -> None:
        classify([scans], folder, tmp_path / "r", engine="onnx", **options)

    with pytest.raises(ExportError, match=r"is not an export folder: no export\.json in it"):
        run(model_folder)
    with pytest.raises(
        ValueError,
        match=r"precision 'mixed' was asked for, but .* was exported in float32: export the model with",
    ):
        run(export_folder, precision="mixed")
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        run(export_folder, device="tpu")
    with pytest.raises(ValueError, match="'cuda' were asked for, but this ONNX Runtime offers"):
        run(export_folder, device="cuda")
    with pytest.raises(ValueError, match="prior must be 2 probabilities"):
        run(export_folder, prior=[1.0])
    with pytest.raises(ExportError, match="does not say how images are prepared"):
        run(write_export(tmp_path / "bare", preprocess=None))
    damaged = write_export(tmp_path / "damaged")
    (damaged / "weights.data").write_bytes(b"\0" * 2048)
    with pytest.raises(ExportError, match=r"weights\.data has sha256"):
        run(damaged)
    assert not (tmp_path / "r").exists()


def test_an_engine_that_gives_up_stops_the_run(
    few_scans: Path, export_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(scorer: OnnxScorer, images: np.ndarray) -> np.ndarray:
        raise RuntimeError("ONNX Runtime cannot score 7 images: node failed")

    monkeypatch.setattr(OnnxScorer, "run", fail)
    with pytest.raises(RunStoppedError, match=r"node failed\. The rows so far are kept; --resume goes on"):
        classify([few_scans], export_folder, tmp_path / "r", engine="onnx")
    assert json.loads((tmp_path / "r/summary.json").read_text())["state"] == "stopped"


def test_a_plan_reads_the_export(scans: Path, export_folder: Path, model_folder: Path) -> None:
    found = plan([scans], export_folder, engine="onnx")
    assert (found.total, found.class_names, found.slices) == (20, CLASSES, "center+-1")
    with pytest.raises(ExportError, match="is not an export folder"):
        plan([scans], model_folder, engine="onnx")


def test_the_command(few_scans: Path, export_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "classify",
        str(few_scans),
        "-m",
        str(export_folder),
        "-o",
        str(tmp_path / "r"),
        "--engine",
        "onnx",
    ]
    planned = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert planned.exit_code == 0 and "classes flat, striped; slices center+-1" in planned.stdout
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "6 inputs, 6 classified, 0 failed" in result.stdout
    refused = CliRunner().invoke(app, [*arguments, "--precision", "mixed", "--overwrite"])
    assert refused.exit_code == 2 and "was exported in float32" in " ".join(refused.stderr.split())


# Its workers, which are spawned, refuse too.
WITHOUT_TORCH = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ImportError("blocked: " + name)

sys.meta_path.insert(0, Refuse())
from fastflow.cli.main import run

if __name__ == "__main__":
    for command in json.loads(sys.argv[1]):
        sys.argv[1:] = command
        try:
            run()
        except SystemExit as end:
            print("exit code", end.code)
"""


def test_it_does_not_need_torch(scans: Path, export_folder: Path, tmp_path: Path) -> None:
    script = tmp_path / "without.py"
    script.write_text(WITHOUT_TORCH)
    command = ["classify", scans / "flat", "-m", export_folder, "-o", tmp_path / "r", "--workers", "1"]
    commands = [[*map(str, command), *options] for options in (["--engine", "onnx"], ["--overwrite"])]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(commands)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.count("exit code 0") == 1, done.stderr
    assert len(rows_of(tmp_path / "r")) == 10
    # The second command asks for a model.
    assert done.returncode != 0 or "exit code 1" in done.stdout
    assert "blocked: torch" in done.stderr


@pytest.mark.slow
def test_rows_agree_with_those_of_the_model(
    scans: Path, model_folder: Path, exported: Path, tmp_path: Path
) -> None:
    classify([scans], model_folder, tmp_path / "torch", prior=[0.6, 0.4])
    classify([scans], exported, tmp_path / "onnx", prior=[0.6, 0.4], engine="onnx")
    pairs = list(zip(rows_of(tmp_path / "torch"), rows_of(tmp_path / "onnx"), strict=True))
    assert len(pairs) == 20
    for model, export in pairs:
        # Nats, of which float32 has about seven digits.
        assert export.pop("logp") == pytest.approx(model.pop("logp"), rel=1e-6, abs=1e-2)
        assert export.pop("posterior") == pytest.approx(model.pop("posterior"), abs=1e-3)
        assert export.pop("margin") == pytest.approx(model.pop("margin"), abs=1e-2)
        assert export.pop("bits_per_dim") == pytest.approx(model.pop("bits_per_dim"), abs=1e-4)
        assert export == model
