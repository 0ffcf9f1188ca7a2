"""The words and exit codes of `fastflow train` that is stopped, resumed and watched."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from fastflow.archive.model_folder import UNFINISHED
from fastflow.cli import _training_progress
from fastflow.cli.main import app
from fastflow.data.manifest import Record, index_folder, write_manifest
from fastflow.training.control import StepReport
from fastflow.training.step import TrainingStep

OPTIONS = ("--preset", "tiny", "--epochs", "2", "--warmup", "0", "--batch-size", "4", "--device", "cpu")


@pytest.fixture
def manifest(scans: Path, tmp_path: Path) -> Path:
    """4 files of each class to train on, and none to validate."""
    chosen = [r for i, r in enumerate(index_folder(scans)) if i % 10 < 4]
    write_manifest([Record(r.path, r.label, r.subject, "train") for r in chosen], tmp_path / "m.csv")
    return tmp_path / "m.csv"


def train(manifest: Path, *arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", str(manifest), *map(str, (*OPTIONS, *arguments))])


def words(result: Result) -> str:
    return " ".join(result.stderr.split())


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Send this process a signal in a step of the next training."""
    original, calls = TrainingStep.__call__, iter(range(1, 100))

    def call(self: TrainingStep, *batch: object) -> None:
        if next(calls) == step:
            os.kill(os.getpid(), signum)
        original(self, *batch)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingStep, "__call__", call)


def test_it_is_stopped_and_resumed(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    nothing = train(manifest, "--out", model, "--resume")
    assert nothing.exit_code == 2 and "no unfinished training, there is nothing to resume" in words(nothing)
    assert not model.exists()
    with monkeypatch.context() as patch:
        interrupt(patch, 3, signal.SIGINT)
        stopped = train(manifest, "--out", model)
    assert stopped.exit_code == 130, stopped.output
    assert "stopped; the state of epoch 2, after 1 steps is in" in words(stopped)
    assert "--resume" in words(stopped) and "epoch 1: learning_rate" in stopped.stderr
    refused = train(manifest, "--out", model)
    assert refused.exit_code == 2
    assert "holds an unfinished training (unfinished); go on with it (--resume), replace" in words(refused)
    other = train(manifest, "--out", model, "--resume", "--lr", "0.5")
    assert other.exit_code == 2 and "reading" not in other.stderr
    assert "learning_rate was 0.001 and is now 0.5. --allow-changes" in words(other)
    both = train(manifest, "--out", model, "--resume", "--overwrite")
    assert both.exit_code == 2 and "give one of them" in words(both)
    with monkeypatch.context() as patch:
        interrupt(patch, 1, signal.SIGTERM)
        stopped = train(manifest, "--out", model, "--resume")
    assert stopped.exit_code == 143 and "epoch 2, after 2 steps" in words(stopped)
    assert (model / UNFINISHED).exists()
    resumed = train(manifest, "--out", model, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert re.search(r"model: 2 epochs, learning_rate", resumed.stdout) and not (model / UNFINISHED).exists()
    assert [row.split(",")[0] for row in (model / "steps.csv").read_text().split()] == ["step", *"1234"]
    finished = train(manifest, "--out", model, "--resume")
    assert finished.exit_code == 2 and "holds a finished model, there is nothing to resume" in words(finished)


def test_event_files_need_their_package_before_anything_is_read(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("event files for TensorBoard need the package tensorboard")

    monkeypatch.setattr("fastflow.archive.train.check_tensorboard", missing)
    result = train(manifest, "--out", tmp_path / "model", "--tensorboard")
    assert result.exit_code == 2 and "need the package tensorboard" in words(result)
    assert not (tmp_path / "model").exists()


def test_the_figures_of_a_step_are_a_line() -> None:
    report = StepReport(5, 9, 1, 3, "likelihood", 1e-3, 1.5, 2.25, 2.0, 310.0, 0, None, 3661.2)
    assert _training_progress.figures(report) == "2 bits/dim, 310 images/s, 1:01:01 left"
    report = StepReport(5, 9, 1, 3, "likelihood", 1e-3, 1.5, 2.25, 2.3456, 310.0, 2, 0.91, 5.0)
    assert _training_progress.figures(report) == (
        "2.346 bits/dim, accuracy 0.91, 310 images/s, 2 skipped, 0:00:05 left"
    )


def test_a_terminal_has_one_bar_for_reading_and_training(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    console = Console(force_terminal=True, record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(_training_progress, "messages", console)
    report = StepReport(9, 9, 3, 3, "likelihood", 1e-3, 1.5, 2.25, 2.0, 310.0, 0, 0.9, 0.0)
    with _training_progress.training_bar() as bar:
        bar.reading(29, 29)
        bar.step(report)
    text = console.export_text()
    assert "reading volumes" in text and "29/29" in text
    assert "epoch 3/3, step 9/9" in text and "2 bits/dim, accuracy 0.9, 310 images/s, 0:00:00 left" in text
