"""Logs of steps: what a row holds, and what is cut off where a training goes on."""

import builtins

import pytest

from fastflow.training.control import StepReport
from fastflow.training.logs import COLUMNS, EventLog, StepLog, check_tensorboard, is_event_file


def report(step, loss=1.5):
    return StepReport(step, 9, 1, 3, "likelihood", 1e-3, loss, 2.25, 2.0, 310.0, 1, None, 60.0)


def test_rows_are_in_the_file_at_once_and_later_ones_are_cut_off(tmp_path):
    path = tmp_path / "steps.csv"
    log = StepLog(path, 0)
    for step in (1, 2, 3):
        log.write(report(step))
    lines = path.read_text().splitlines()
    assert lines == [",".join(COLUMNS), *(f"{i},1,0.001,likelihood,1.5,2.25,310,1" for i in (1, 2, 3))]
    log.close()
    with path.open("a") as stream:
        stream.write("4,1,0.0")
    log = StepLog(path, 2)
    log.write(report(3, loss=9.0))
    log.close()
    assert path.read_text().splitlines() == [*lines[:3], "3,1,0.001,likelihood,9,2.25,310,1"]
    StepLog(path, 0).close()
    assert path.read_text().splitlines() == lines[:1]


def test_a_torn_row_is_cut_off(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text(",".join(COLUMNS) + "\n1,1,0.001,likelihood,1.5,2.25,310,1\n2,1,0.001,like")
    StepLog(path, 7).close()
    assert len(path.read_text().splitlines()) == 2


def test_a_missing_package_is_named(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **options):
        if name == "torch.utils.tensorboard":
            raise ImportError("No module named 'tensorboard'")
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r"need the package tensorboard .*fastflow\[tensorboard\]"):
        check_tensorboard()


@pytest.mark.slow
def test_event_files_hold_steps_and_epochs(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = EventLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(report(step, loss=float(step)))
    log.write_epoch({"epoch": 1, "val_accuracy": 0.5}, 3)
    log.close()
    log = EventLog(tmp_path, 2)
    log.write(report(3, loss=9.0))
    log.close()
    found = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in found.Scalars("step/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 9.0),
    ]
    assert [(event.step, event.value) for event in found.Scalars("epoch/val_accuracy")] in ([(3, 0.5)], [])
    assert all(is_event_file(path.name) for path in tmp_path.iterdir())
