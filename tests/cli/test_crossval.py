"""The commands `evaluate` and `crossval` from end to end."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastflow.cli.main import app
from fastflow.data.manifest import Record, index_folder, write_manifest


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["evaluate", "crossval"])
def test_help_explains_itself(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"Example: fastflow {command}" in result.output


def test_wrong_usage_ends_with_2(model_folder: Path, tmp_path: Path) -> None:
    lost = invoke("evaluate", model_folder, "--out", tmp_path / "e")
    assert lost.exit_code == 2 and "MANIFEST is needed beside the model" in lost.stderr.replace("\n", " ")
    (tmp_path / "m.csv").write_text("path,label\na.nii,x\n")
    result = invoke("crossval", tmp_path / "m.csv", "--out", tmp_path / "c", "--seeds", "1,b")
    assert result.exit_code == 2 and "seeds must be whole numbers" in result.stderr
    few = invoke("crossval", tmp_path / "m.csv", "--out", tmp_path / "c")
    assert few.exit_code == 2 and "5 folds need 5 subjects of each class" in few.stderr
    assert not (tmp_path / "c").exists() and not (tmp_path / "e").exists()


@pytest.mark.slow
def test_folds_are_trained_and_can_be_evaluated_again(scans: Path, tmp_path: Path) -> None:
    files = [r for i, r in enumerate(index_folder(scans)) if i % 10 < 5]
    files = [Record(r.path, r.label, r.subject, "away" if i % 5 == 4 else None) for i, r in enumerate(files)]
    write_manifest(files, tmp_path / "m.csv")
    options = ("--preset", "tiny", "--epochs", 1, "--warmup", 0, "--batch-size", 8, "--resamples", 20)
    cv = tmp_path / "cv"
    done = invoke("crossval", tmp_path / "m.csv", "--out", cv, "--folds", 3, "--keep-out", "away", *options)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "test: 8 volumes, 3 models" and "away: 6 volumes, 3 models" in lines
    rows = {line.split(":")[0].strip(): line for line in lines[1 : lines.index("away: 6 volumes, 3 models")]}
    # Three training volumes are too few for the discriminant analysis of the grain.
    assert {"argmax", "histogram", "thumbnail"} <= set(rows)
    assert "balanced accuracy 1.000 +- 0.000" in rows["histogram"]
    again = invoke(
        *("evaluate", cv / "evaluations" / "fold-1" / "results" / "away", cv / "folds" / "fold-1.csv"),
        *("--resamples", 20, "--out", tmp_path / "again"),
    )
    assert again.exit_code == 0, again.output
    assert again.stdout.startswith("away: 2 volumes of 2 subjects\n  argmax: accuracy ")
