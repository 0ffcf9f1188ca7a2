from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastflow.archive.locks import LOCK, locked
from fastflow.archive.model_folder import UNFINISHED, can_resume, model_folder
from fastflow.errors import OutputFolderError, ResumeError


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK}


def fill(work: Path, digit: str, checkpoints: bool = True) -> None:
    """The files of a finished training."""
    weights = f"model-{digit * 16}.safetensors"
    (work / "history.jsonl").write_text('{"epoch": 1}\n')
    (work / weights).write_text(digit)
    (work / "config.json").write_text(json.dumps({"weights": weights}))
    if checkpoints:
        (work / "checkpoints" / "loss").mkdir(parents=True)


def train_once(folder: Path, digit: str = "1", **options: bool) -> None:
    with model_folder(folder, **options) as work:
        fill(work, digit)


def stop_after_an_epoch(folder: Path, digit: str, **options: bool) -> None:
    with pytest.raises(KeyboardInterrupt), model_folder(folder, **options) as work:  # noqa: PT012
        fill(work, digit)
        raise KeyboardInterrupt


def weights_of(folder: Path) -> str:
    return (folder / json.loads((folder / "config.json").read_text())["weights"]).read_text()


def test_a_finished_training_takes_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "model"
    with model_folder(folder) as work:
        assert work == folder / UNFINISHED
        fill(work, "1")
        assert names(folder) == {UNFINISHED}
    assert names(folder) == {"checkpoints", "config.json", "history.jsonl", f"model-{'1' * 16}.safetensors"}


def test_a_finished_model_is_replaced_only_on_demand_and_only_by_a_finished_one(tmp_path: Path) -> None:
    train_once(tmp_path / "m", "1")
    folder = tmp_path / "m"
    (folder / "notes.txt").write_text("mine")
    with (
        pytest.raises(OutputFolderError, match="holds a finished model; replace it \\(--overwrite\\)"),
        model_folder(folder),
    ):
        pass
    stop_after_an_epoch(folder, "2", overwrite=True)
    assert weights_of(folder) == "1" and (folder / "checkpoints").exists()
    with model_folder(folder, overwrite=True) as work:
        assert names(work) == set()
        fill(work, "3", checkpoints=False)
    assert names(folder) == {"config.json", "history.jsonl", f"model-{'3' * 16}.safetensors", "notes.txt"}
    assert weights_of(folder) == "3"


@pytest.mark.parametrize("moves", [0, 1, 2, 3])
def test_a_stop_while_files_are_moved_leaves_the_earlier_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    train_once(tmp_path, "1")
    replace, done = os.replace, []

    def stop_after_some(source: Path, target: Path) -> None:
        if Path(source).parent.name == UNFINISHED and not Path(source).name.startswith("."):
            done.append(target)
            if len(done) > moves:
                raise OSError("stopped")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_after_some)
        with pytest.raises(OSError, match="stopped"):
            train_once(tmp_path, "2", overwrite=True)
    assert weights_of(tmp_path) == "1"
    # The finished one is not lost either.
    assert (tmp_path / UNFINISHED / "config.json").exists()
    train_once(tmp_path, "3", overwrite=True)
    assert weights_of(tmp_path) == "3" and len(names(tmp_path)) == 4


def test_a_training_that_failed_before_its_first_epoch_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), model_folder(tmp_path / "m"):
        raise RuntimeError
    assert not (tmp_path / "m").exists()
    train_once(tmp_path / "m", "1")
    with pytest.raises(RuntimeError), model_folder(tmp_path / "m", overwrite=True):
        raise RuntimeError
    assert weights_of(tmp_path / "m") == "1" and UNFINISHED not in names(tmp_path / "m")


def test_epochs_of_a_training_that_was_stopped_are_kept_until_told_otherwise(tmp_path: Path) -> None:
    stop_after_an_epoch(tmp_path / "m", "1")
    with (
        pytest.raises(OutputFolderError, match=r"holds an unfinished training \(unfinished\)"),
        model_folder(tmp_path / "m"),
    ):
        pass
    assert (tmp_path / "m" / UNFINISHED / "history.jsonl").exists()
    train_once(tmp_path / "m", "2", overwrite=True)
    assert weights_of(tmp_path / "m") == "2"


@pytest.mark.parametrize("name", ["checkpoints", "history.jsonl"])
def test_an_unfinished_training_of_an_earlier_version_is_refused(tmp_path: Path, name: str) -> None:
    train_once(tmp_path, "1")
    for other in names(tmp_path) - {"checkpoints", "history.jsonl"}:
        (tmp_path / other).unlink()
    with pytest.raises(OutputFolderError, match=rf"holds an unfinished training \(.*{name}"):
        train_once(tmp_path)
    train_once(tmp_path, "2", overwrite=True)
    assert weights_of(tmp_path) == "2"


def test_a_run_that_was_killed_while_reading_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "m" / UNFINISHED).mkdir(parents=True)
    (tmp_path / "m" / UNFINISHED / "inventory.json").write_text("{}")
    (tmp_path / "m" / LOCK).touch()
    train_once(tmp_path / "m")
    assert weights_of(tmp_path / "m") == "1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", "{}", "holds the results of a classification"),
        ("export.json", "{}", "holds an export"),
        ("config.json", '{"model_type": "bert"}', "config.json: has the name of a model's file"),
        ("config.json", "no JSON", "config.json: has the name of a model's file"),
        ("history.jsonl", "a diary", "history.jsonl: has the name of a model's file"),
        ("checkpoints/step-1/weights.bin", "", "checkpoints: has the name of a model's file"),
        ("checkpoints", "a list", "checkpoints: has the name of a model's file"),
        ("steps.csv", "one, two", "steps.csv: has the name of a model's file"),
        ("tensorboard/notes.txt", "", "tensorboard: has the name of a model's file"),
        ("unfinished/novel.txt", "", "unfinished: has the name of a model's file"),
    ],
)
def test_files_of_others_are_never_replaced(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / "m" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    for overwrite in (False, True):
        with pytest.raises(OutputFolderError, match=message):
            train_once(tmp_path / "m", overwrite=overwrite)
    assert path.read_text() == content
    assert not (tmp_path / "m" / LOCK).exists()


def test_a_folder_of_other_files_is_written_into_on_demand(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"holds other files, such as 'log\.txt'"):
        train_once(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    train_once(tmp_path, overwrite=True)
    assert (tmp_path / "log.txt").read_text() == "mine" and weights_of(tmp_path) == "1"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "m").write_text("")
    with pytest.raises(OutputFolderError, match="must be a folder, it is a file"):
        train_once(tmp_path / "m")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_is_at_work_keeps_others_out(tmp_path: Path, overwrite: bool) -> None:
    with model_folder(tmp_path / "m") as work:
        fill(work, "1")
        with pytest.raises(OutputFolderError, match="another run is writing here"):
            train_once(tmp_path / "m", "2", overwrite=overwrite)
    assert weights_of(tmp_path / "m") == "1"


def test_without_a_lock_nothing_is_kept_out(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with locked(folder):
        train_once(folder, lock=False)
    assert weights_of(folder) == "1"


def test_a_full_disk_is_found_before_the_body_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    ran = []
    with pytest.raises(OSError, match="No space left on device"), model_folder(tmp_path / "m"):
        ran.append(True)
    assert not ran and not (tmp_path / "m").exists()


# -- a training that is resumed ------------------------------------------------------------------------------


STEPS_HEADER = "step,epoch,learning_rate,phase,loss,bits_per_dim,images_per_second,skipped\n"


def stop_with_a_state(folder: Path, **options: bool) -> None:
    """Stop a training within its first epoch, after a state was saved."""
    with pytest.raises(KeyboardInterrupt), model_folder(folder, **options) as work:  # noqa: PT012
        (work / "state").mkdir()
        (work / "state" / "state.json").write_text("{}")
        raise KeyboardInterrupt


def test_a_training_with_a_state_is_gone_on_with_or_replaced_on_demand(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    for where in (folder, tmp_path):
        with pytest.raises(ResumeError, match="no unfinished training, there is nothing to resume"):
            train_once(where, resume=True)
    assert not folder.exists()
    stop_with_a_state(folder)
    with pytest.raises(
        OutputFolderError, match=r"unfinished training .*; go on with it \(--resume\), replace"
    ):
        train_once(folder)
    with model_folder(folder, resume=True) as work:
        assert names(work) == {"state"} and can_resume(folder)
        fill(work, "1")
        (work / "steps.csv").write_text(STEPS_HEADER)
    assert names(folder) == {
        *("checkpoints", "config.json", "history.jsonl", "steps.csv", f"model-{'1' * 16}.safetensors")
    }
    with pytest.raises(ResumeError, match="holds a finished model, there is nothing to resume"):
        train_once(folder, resume=True)


def test_a_training_without_a_state_cannot_be_resumed(tmp_path: Path) -> None:
    stop_after_an_epoch(tmp_path / "m", "1")
    with pytest.raises(ResumeError, match="stopped before a state was saved"):
        train_once(tmp_path / "m", resume=True)
    assert (tmp_path / "m" / UNFINISHED / "history.jsonl").exists()


@pytest.mark.parametrize("moves", range(5))
def test_moves_that_were_stopped_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moves: int
) -> None:
    train_once(tmp_path, "1")
    (tmp_path / "steps.csv").write_text(STEPS_HEADER)
    replace, done = os.replace, []

    def stop_after_some(source: Path, target: Path) -> None:
        if Path(source).parent.name == UNFINISHED and not Path(source).name.startswith("."):
            done.append(target)
            if len(done) > moves:
                raise OSError("stopped")
        replace(source, target)

    stop_with_a_state(tmp_path, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", stop_after_some)
        if moves < 4:
            with pytest.raises(OSError, match="stopped"), model_folder(tmp_path, resume=True) as work:
                fill(work, "2")
            assert weights_of(tmp_path) == "1"
    with model_folder(tmp_path, resume=True) as work:
        if moves == 4:
            fill(work, "2")
    assert weights_of(tmp_path) == "2"
    assert names(tmp_path) == {"checkpoints", "config.json", "history.jsonl", f"model-{'2' * 16}.safetensors"}
