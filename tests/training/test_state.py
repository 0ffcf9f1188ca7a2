"""The state of a training as files, the fingerprint that is compared, and the state of a step."""

import dataclasses
import json
import os

import pytest
import torch
from training_sets import make_set
from training_steps import assert_same, batches, new_model, run_steps, settings

from fastflow.errors import ResumeError
from fastflow.training import state as state_module
from fastflow.training.control import RunControl
from fastflow.training.fingerprint import (
    architecture_fingerprint,
    data_fingerprint,
    preprocess_fingerprint,
    settings_fingerprint,
)
from fastflow.training.keeper import StateKeeper
from fastflow.training.state import (
    RunState,
    check_fingerprint,
    check_resumable,
    clear_unfinished_files,
    has_state,
    read_state,
    remove_state,
    write_fingerprint,
    write_state,
)
from fastflow.training.step import TrainingStep


def a_state(step=3, value=1.0):
    tensors = {
        "weights": torch.full((2, 3), value),
        "count": torch.tensor(7),
        "bytes": torch.arange(5).byte(),
    }
    return RunState(
        epoch=1,
        step=step,
        seconds=2.5,
        history=[{"epoch": 1, "b": 0.1, "a": float("nan")}],
        checkpoints={},
        changes=["epochs was 1 and is now 2"],
        tensors=tensors,
    )


def files_of(folder):
    return sorted(path.name for path in (folder / "state").iterdir())


def test_a_state_is_read_as_it_was_written(tmp_path):
    write_state(tmp_path, a_state())
    found, notes = read_state(tmp_path)
    for field in dataclasses.fields(RunState):
        if field.name not in ("tensors", "history"):
            assert getattr(found, field.name) == getattr(a_state(), field.name)
    # The order of keys is that of the lines of history.jsonl.
    assert repr(found.history) == repr(a_state().history)
    assert found.tensors.keys() == a_state().tensors.keys()
    assert all(torch.equal(value, found.tensors[name]) for name, value in a_state().tensors.items())
    assert notes["torch"] == torch.__version__ and found.where() == "epoch 2, after 3 steps"


def test_a_new_state_takes_the_place_of_the_old_one_and_nothing_else_is_left(tmp_path):
    write_fingerprint(tmp_path, {"settings": {}})
    write_state(tmp_path, a_state())
    write_state(tmp_path, a_state(step=4, value=2.0))
    names = files_of(tmp_path)
    assert len(names) == 3 and {"fingerprint.json", "state.json"} < set(names)
    assert read_state(tmp_path)[0].step == 4
    remove_state(tmp_path)
    assert not (tmp_path / "state").exists() and not has_state(tmp_path)


@pytest.mark.parametrize("at", [0, 1])
def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch, at):
    write_state(tmp_path, a_state())
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(target)
        if len(calls) > at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            write_state(tmp_path, a_state(step=9, value=2.0))
    found, _ = read_state(tmp_path)
    assert found.step == 3 and float(found.tensors["weights"][0, 0]) == 1.0
    write_state(tmp_path, a_state(step=5))
    assert len(files_of(tmp_path)) == 2


@pytest.mark.parametrize("file", ["tensors", "document"])
def test_every_damaged_byte_is_found(tmp_path, file):
    write_state(tmp_path, a_state())
    path = next((tmp_path / "state").glob("tensors-*" if file == "tensors" else "state.json"))
    content = path.read_bytes()
    for at in range(0, len(content) - 1, max(1, len(content) // 40)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        with pytest.raises(ResumeError, match=rf"{path.name} (is damaged|has format|cannot|is no)"):
            read_state(tmp_path)
    path.write_bytes(content[:-9])
    with pytest.raises(ResumeError, match="is damaged"):
        read_state(tmp_path)
    path.unlink()
    with pytest.raises(ResumeError, match=r"is missing|cannot be read"):
        read_state(tmp_path)


def test_another_format_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(state_module, "FORMAT", 7)
    write_state(tmp_path, a_state())
    monkeypatch.undo()
    with pytest.raises(ResumeError, match=r"state.json has format 7, this version reads 1; .* train anew"):
        read_state(tmp_path)


def test_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(ResumeError, match="no unfinished training to resume; leave --resume"):
        check_resumable(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ResumeError, match="holds a finished model, there is nothing to resume"):
        check_resumable(tmp_path)


def test_files_that_were_being_written_are_cleared(tmp_path):
    (tmp_path / "checkpoints" / "loss").mkdir(parents=True)
    left = [tmp_path / f"{place}.x.0123abcd.fastflow-tmp" for place in ("", "checkpoints/loss/")]
    for path in left:
        path.touch()
    (tmp_path / ".hidden").touch()
    clear_unfinished_files(tmp_path)
    assert not any(path.exists() for path in left) and (tmp_path / ".hidden").exists()


# -- fingerprints --------------------------------------------------------------------------------------------


def fingerprint(config=None, model=None, sets=None):
    model = model or new_model()
    return {
        **settings_fingerprint(config or settings()),
        **architecture_fingerprint(model),
        **preprocess_fingerprint(model),
        **data_fingerprint(sets or {"train": make_set(4)}),
    }


def refusal(folder, **changes):
    with pytest.raises(ResumeError, match="cannot be resumed") as error:
        check_fingerprint(folder, fingerprint(**changes))
    return str(error.value)


def test_settings_and_architecture_that_differ_are_named_with_both_values(tmp_path):
    write_fingerprint(tmp_path, fingerprint())
    assert check_fingerprint(tmp_path, fingerprint(settings(max_skipped=3))) == []
    text = refusal(tmp_path, config=settings(batch_size=6, seed=4))
    assert "batch_size was 5 and is now 6; seed was 0 and is now 4" in text and "--overwrite" in text
    assert "dropout was 0.3 and is now 0.1" in refusal(tmp_path, model=new_model(dropout=0.1))
    other = new_model()
    with torch.no_grad():
        other.steps[0].coupling.mask[0, 0, 0] ^= True
    assert "masks_digest was" in refusal(tmp_path, model=other)
    other = new_model()
    other.metadata["preprocess"] = {"slices": "center"}
    assert "slices was not set and is now 'center'" in refusal(tmp_path, model=other)


def test_settings_of_the_optimizer_may_change_where_it_is_asked_for(tmp_path):
    write_fingerprint(tmp_path, fingerprint())
    changed = settings(learning_rate=1e-3, epochs=9)
    text = refusal(tmp_path, config=changed)
    assert "learning_rate was 0.003 and is now 0.001" in text and "--allow-changes" in text
    allowed = check_fingerprint(tmp_path, fingerprint(changed), allow_changes=True)
    assert allowed == ["epochs was 300 and is now 9", "learning_rate was 0.003 and is now 0.001"]
    with pytest.raises(ResumeError, match="seed was 0 and is now 1") as error:
        check_fingerprint(tmp_path, fingerprint(settings(epochs=9, seed=1)), allow_changes=True)
    assert "epochs was" not in str(error.value)


def test_data_that_differ_are_named(tmp_path):
    data = make_set(4)
    write_fingerprint(tmp_path, fingerprint(sets={"train": data}))
    # Where the files lie is no part of it.
    moved = dataclasses.replace(data, paths=tuple(f"/elsewhere/{path}" for path in data.paths))
    assert check_fingerprint(tmp_path, fingerprint(sets={"train": moved})) == []
    images = data.images.copy()
    images[5, 0, 0, 0] ^= 1
    text = refusal(tmp_path, sets={"train": dataclasses.replace(data, images=images)})
    assert "slices or labels of 1 of 4 volumes of 'train' differ; the first is 2.nii.gz (digest was" in text
    labels = data.labels.copy()
    labels[:2] = 1
    assert "the first is 0.nii.gz" in refusal(
        tmp_path, sets={"train": dataclasses.replace(data, labels=labels)}
    )
    text = refusal(tmp_path, sets={"train": data.subset([0, 1, 2])})
    assert "volumes of 'train' were 4 and are now 3 (gone: 3.nii.gz)" in text
    assert "a set 'val' was not given and is now given" in refusal(
        tmp_path, sets={"train": data, "val": data}
    )
    renamed = dataclasses.replace(data, class_names=("a", "b"))
    assert "the classes of 'train' were ['dark', 'bright']" in refusal(tmp_path, sets={"train": renamed})
    swapped = refusal(tmp_path, sets={"train": data.subset([1, 0, 2, 3])})
    assert "slices or labels of 2 of 4 volumes" in swapped


def test_a_setting_that_an_earlier_version_lacked_counts_as_its_default(tmp_path):
    earlier = fingerprint()
    del earlier["settings"]["contrast_weight"]
    write_fingerprint(tmp_path, earlier)
    assert check_fingerprint(tmp_path, fingerprint()) == []
    assert "contrast_weight was 1.0" in refusal(tmp_path, config=settings(contrast_weight=0.5))


def test_a_damaged_fingerprint_is_found(tmp_path):
    write_fingerprint(tmp_path, fingerprint())
    path = tmp_path / "state" / "fingerprint.json"
    document = json.loads(path.read_text())
    document["content"]["settings"]["seed"] = 5
    path.write_text(json.dumps(document))
    with pytest.raises(ResumeError, match=r"fingerprint.json is damaged"):
        check_fingerprint(tmp_path, fingerprint())


# -- the state of a step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capturable", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_step_goes_on_from_its_state(capturable):
    """Where reports are read late, one is pending between two steps, and goes on to be."""
    config = settings(objective="pairwise", ema=0.5)
    whole, data = new_model(), list(batches(4))
    alone = run_steps(whole, config, data, capturable=capturable)

    first, generator = new_model(), torch.Generator().manual_seed(3)
    torch.manual_seed(7)
    before = TrainingStep(first, config, generator, capturable=capturable)
    for batch in data[:2]:
        before(*batch)
    kept = {name: value.clone() for name, value in before.state_dict().items()}
    random = torch.get_rng_state()
    second = new_model()
    second.load_state_dict(first.state_dict())
    after = TrainingStep(second, config, generator, capturable=capturable)
    after.load_state_dict(kept)
    torch.set_rng_state(random)
    for batch in data[2:]:
        after(*batch)
    assert_same(second, whole)
    assert_same(after.average.model(), alone.average.model())
    assert torch.equal(after.negatives.losses, alone.negatives.losses)
    assert after.figures == alone.figures and after.figures.steps == (3 if capturable else 4)
    assert after.take_totals() == alone.take_totals()


def test_a_state_of_another_model_is_refused():
    before = run_steps(new_model(), settings(), batches(1))
    state = before.state_dict()
    name = next(name for name in state if name.startswith("optimizer.exp_avg.") and state[name].ndim)
    state[name] = state[name][:0]
    after = TrainingStep(new_model(), settings(), torch.Generator())
    with pytest.raises(ValueError, match=r"exp_avg of .* has shape"):
        after.load_state_dict(state)


# -- when it is saved ----------------------------------------------------------------------------------------


def test_states_are_saved_by_steps_and_seconds_and_take_little_of_the_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("fastflow.training.keeper.time.monotonic", lambda: now[0])
    by_steps = StateKeeper(tmp_path, RunControl(save_seconds=None, save_steps=2))
    assert [by_steps.due(), by_steps.due()] == [False, True]
    keeper = StateKeeper(tmp_path, RunControl(save_seconds=10.0))
    assert "no state had been saved" in keeper.what_stays() and "train anew" in keeper.after_failure()
    now[0] += 9.0
    assert not keeper.due()
    now[0] += 1.0
    assert keeper.due()

    def slow(folder, state):
        now[0] += 2.0

    monkeypatch.setattr("fastflow.training.keeper.write_state", slow)
    keeper.save(a_state())
    assert "epoch 2, after 3 steps" in keeper.what_stays()
    now[0] += 39.0
    assert not keeper.due()
    now[0] += 1.0
    assert keeper.due()


@pytest.mark.parametrize("changes", [{"save_seconds": -1.0}, {"save_steps": 0}, {"allow_changes": True}])
def test_control_out_of_range_is_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        RunControl(**changes)
