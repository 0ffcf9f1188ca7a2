"""A training that is stopped at any step goes on to the bits of one that was not."""

import os
import signal
import threading

import pytest
import torch
from training_sets import config, make_set, new_model
from training_steps import assert_same

from fastflow.errors import ResumeError, TrainingInterrupted
from fastflow.training import objective as objectives
from fastflow.training.control import RunControl
from fastflow.training.state import has_state
from fastflow.training.trainer import train

TRAIN, VAL = make_set(8), make_set(4, seed=1)
# Two epochs of two steps, with all that a state can hold.
SETTINGS = {"epochs": 2, "objective": "pairwise", "ema": 0.5, "augment": "paper"}


class StoppedError(Exception):
    pass


def run(folder, settings=None, model=None, data=TRAIN, val=VAL, **options):
    model = model or new_model()
    history = train(model, data, val, settings or config(**SETTINGS), folder, **options)
    return model, [{k: v for k, v in record.items() if k != "seconds"} for record in history]


def stop_after(step, error=StoppedError):
    def on_step(report):
        if report.step == step:
            raise error

    return RunControl(save_steps=1, on_step=on_step)


def begin(folder, step=2, **options):
    """Leave a training whose state lies before the step that it is stopped at."""
    with pytest.raises(StoppedError):
        run(folder, control=stop_after(step), **options)


def rows(folder):
    """The rows of the log without the pace."""
    table = [line.split(",") for line in (folder / "steps.csv").read_text().splitlines()]
    return [row[:6] + row[7:] for row in table]


def assert_equal_runs(folder, found, whole_folder, whole):
    assert_same(found[0], whole[0])
    assert found[1] == whole[1] and rows(folder) == rows(whole_folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, (model, history)) of a training that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "m"
    return folder, run(folder)


@pytest.mark.parametrize(
    "step", [pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow)]
)
def test_it_goes_on_to_the_same_bits(tmp_path, whole, step):
    """The state lies within the first epoch, at its end, and within the last."""
    begin(tmp_path, step)
    torch.rand(3)
    found = run(tmp_path, resume=True)
    assert_equal_runs(tmp_path, found, *whole)
    assert not has_state(tmp_path) and [row[0] for row in rows(tmp_path)] == ["step", "1", "2", "3", "4"]
    with pytest.raises(ResumeError, match="holds a finished model"):
        run(tmp_path, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"objective": "likelihood", "sampler": "balanced"},
        {"objective": "hybrid", "select": "loss"},
        {"precision": "bf16-mixed"},
    ],
)
def test_other_settings_go_on_to_the_same_bits_too(tmp_path, changes):
    settings = config(**{**SETTINGS, **changes})
    alone = run(tmp_path / "whole", settings)
    begin(tmp_path / "m", 4, settings=settings)
    assert_equal_runs(tmp_path / "m", run(tmp_path / "m", settings, resume=True), tmp_path / "whole", alone)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_its_state_is_saved(tmp_path, whole, signum):
    def on_step(report):
        if report.step == 3:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with pytest.raises(
        TrainingInterrupted, match=r"stopped; the state of epoch 2, after 1 steps is in .*--res"
    ) as e:
        run(tmp_path, control=RunControl(on_step=on_step))
    assert e.value.signum == signum and isinstance(e.value, KeyboardInterrupt)
    assert signal.getsignal(signum) == before
    if signum == signal.SIGINT:
        assert_equal_runs(tmp_path, run(tmp_path, resume=True), *whole)


def test_a_second_signal_stops_at_once(tmp_path):
    def on_step(report):
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(
        TrainingInterrupted, match="stopped at once; the state of epoch 1, after 1 steps is in"
    ):
        run(tmp_path, control=RunControl(save_steps=1, on_step=on_step))


def test_handlers_of_others_and_other_threads_are_left_alone(tmp_path):
    def own(signum, frame):
        raise AssertionError

    seen, before = [], signal.signal(signal.SIGTERM, own)
    control = RunControl(on_step=lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    settings = config(epochs=1)
    try:
        run(tmp_path, settings, control=control)
        thread = threading.Thread(target=run, args=(tmp_path, settings), kwargs={"control": control})
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [own] * 4


def test_what_differs_is_named_before_the_first_step(tmp_path):
    begin(tmp_path)
    state = (tmp_path / "state" / "state.json").read_bytes()
    seen = []

    def refuse(message, settings=None, allow_changes=False, **options):
        control = RunControl(resume=True, allow_changes=allow_changes, on_step=seen.append)
        with pytest.raises(ResumeError, match=message):
            run(tmp_path, settings, control=control, **options)

    refuse("batch_size was 8 and is now 4", config(**{**SETTINGS, "batch_size": 4}))
    refuse("learning_rate was .*--allow-changes", config(**{**SETTINGS, "learning_rate": 1e-3}))
    refuse("seed was 0 and is now 1", config(**SETTINGS, seed=1), allow_changes=True)
    refuse("dropout was 0.3 and is now 0.1", model=new_model(dropout=0.1))
    refuse("slices or labels of 8 of 8 volumes of 'train' differ", data=make_set(8, seed=5))
    refuse("a set 'val' was given and is now not", val=None)
    assert not seen and (tmp_path / "state" / "state.json").read_bytes() == state
    with pytest.raises(ResumeError, match="no unfinished training"):
        run(tmp_path / "nowhere", resume=True)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.slow
def test_settings_may_change_on_demand_and_the_model_says_so(tmp_path):
    begin(tmp_path)
    settings = config(**{**SETTINGS, "learning_rate": 1e-3})
    control = RunControl(resume=True, allow_changes=True)
    model, history = run(tmp_path, settings, control=control)
    said = model.metadata["training"]
    assert said["changes"] == ["from epoch 1, after 1 steps: learning_rate was 0.003 and is now 0.001"]
    assert said["learning_rate"] == 1e-3 and len(history) == 2


@pytest.mark.slow
def test_a_checkpoint_that_is_younger_than_the_state_is_made_again(tmp_path, whole):
    """A kill between the checkpoint of an epoch and its state leaves that."""

    def stop(record):
        raise StoppedError

    begin(tmp_path, 3)
    state = (tmp_path / "state" / "state.json").read_bytes()
    saved = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}
    assert b'"epoch": 1, "step": 0' in state
    with pytest.raises(StoppedError):
        run(tmp_path, resume=True, progress=stop)
    for path in (tmp_path / "state").iterdir():
        path.unlink()
    for name, content in saved.items():
        (tmp_path / "state" / name).write_bytes(content)
    assert_equal_runs(tmp_path, run(tmp_path, resume=True), *whole)


def test_a_checkpoint_that_is_missing_is_named(tmp_path):
    begin(tmp_path, 3)
    (tmp_path / "checkpoints" / "loss" / "config.json").unlink()
    with pytest.raises(ResumeError, match="loss: the best epoch so far is missing"):
        run(tmp_path, resume=True)


def test_steps_that_are_not_finite_leave_the_last_good_state(tmp_path, monkeypatch):
    original, calls = objectives.likelihood_loss, []

    def likelihood_loss(flow, x, y):
        calls.append(None)
        loss, lp = original(flow, x, y)
        bad = len(calls) > 2
        return (loss * float("nan"), lp * float("nan")) if bad else (loss, lp)

    settings = config(epochs=2, batch_size=4, max_skipped=2)
    skipped = []
    control = RunControl(save_steps=1, on_step=lambda report: skipped.append(report.skipped))
    with monkeypatch.context() as patch:
        patch.setattr(objectives, "likelihood_loss", likelihood_loss)
        with pytest.raises(FloatingPointError) as error:
            run(tmp_path, settings, control=control)
    text = str(error.value)
    assert "the last good state, of epoch 1, after 2 steps, is in" in text and str(tmp_path / "state") in text
    assert "--resume --allow-changes" in text and "lower learning_rate" in text and skipped == [0, 0, 1]
    # It may give up later, or go on with a lower rate.
    model, history = run(tmp_path, config(epochs=2, batch_size=4, max_skipped=5), resume=True)
    assert len(history) == 2 and model.initialized


def test_the_skipped_steps_of_the_whole_training_are_counted(tmp_path, monkeypatch):
    original, calls, seen = objectives.likelihood_loss, [], []

    def likelihood_loss(flow, x, y):
        calls.append(None)
        loss, lp = original(flow, x, y)
        return (loss * float("nan"), lp) if len(calls) in (1, 4) else (loss, lp)

    monkeypatch.setattr(objectives, "likelihood_loss", likelihood_loss)
    _, history = run(tmp_path, config(epochs=2), control=RunControl(on_step=seen.append))
    assert [(r["skipped_steps"], r["skipped_steps_so_far"]) for r in history] == [(1, 1), (1, 2)]
    assert [report.skipped for report in seen] == [1, 1, 1, 2]
    assert [row[-1] for row in rows(tmp_path)] == ["skipped", "1", "1", "1", "2"]
    assert [row[5] for row in rows(tmp_path)][1::3] == ["nan", "nan"]


def test_a_report_says_where_a_training_is(tmp_path):
    seen = []
    _, history = run(tmp_path, control=RunControl(on_step=seen.append))
    assert [(r.step, r.steps, r.epoch, r.epochs) for r in seen] == [
        *((1, 4, 1, 2), (2, 4, 1, 2), (3, 4, 2, 2), (4, 4, 2, 2)),
    ]
    assert [r.accuracy for r in seen] == [None, None, *[history[0]["val_accuracy"]] * 2]
    assert seen[1].mean_bits_per_dim == pytest.approx(history[0]["train_bits_per_dim"], abs=1e-12)
    mean = (seen[0].bits_per_dim + seen[1].bits_per_dim) / 2
    assert mean == pytest.approx(seen[1].mean_bits_per_dim, abs=1e-9)
    assert {r.phase for r in seen} == {"pairwise"} and seen[0].learning_rate == history[0]["learning_rate"]
    assert all(r.images_per_second > 0 for r in seen) and seen[-1].seconds_left == 0 < seen[0].seconds_left
