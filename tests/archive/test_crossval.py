from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fastflow.archive import crossval
from fastflow.archive.crossval import CrossvalOptions, FoldTraining, cross_validate
from fastflow.archive.crossval_plan import Round, plan_rounds
from fastflow.archive.crossval_summary import over_folds
from fastflow.archive.locks import locked
from fastflow.archive.train import Trained
from fastflow.data.inventory import Inventory
from fastflow.data.manifest import Record, index_folder, read_manifest
from fastflow.data.slice_cache import SliceCache
from fastflow.errors import ManifestError, OutputFolderError
from fastflow.training.config import TrainConfig

TRAINING = FoldTraining("tiny", config=TrainConfig(epochs=1, batch_size=4, warmup_epochs=0))


def test_several_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="devices is 2 on num_nodes 1, but a cross-validation trains on one"):
        FoldTraining("tiny", config=TrainConfig(devices=2))
    assert FoldTraining("tiny", config=TrainConfig(devices=1, accumulate=2)).config.accumulate == 2


@pytest.fixture
def records(scans: Path) -> list[Record]:
    """Five files of each class for folds, of which one is kept out."""
    return [
        Record(record.path, record.label, record.subject, "new_site" if i % 10 == 4 else "train")
        for i, record in enumerate(index_folder(scans))
        if i % 10 < 5
    ]


@pytest.fixture
def trained(model_folder: Path, monkeypatch: pytest.MonkeyPatch, matrix: None) -> list[str]:
    """Trainings take an untrained model, scored by a matrix; gives the folders that were trained."""
    names: list[str] = []

    def train(files: Sequence[Record], folder: Path, *arguments: Any, **options: Any) -> Trained:
        shutil.copytree(model_folder, folder, dirs_exist_ok=True)
        names.append(folder.name)
        return Trained(None, [], [], Inventory())  # type: ignore[arg-type]

    monkeypatch.setattr(crossval, "train_on_archive", train)
    # The pages of the evaluations take longer than all else.
    monkeypatch.setattr("fastflow.archive.evaluation_files.write_evaluation", lambda path, document: None)
    return names


def run(
    records: Sequence[Record], out: Path, training: FoldTraining = TRAINING, **options: Any
) -> dict[str, Any]:
    options = {"folds": 3, "keep_out": ("new_site",), "resamples": 5, "baselines": False} | options
    return cross_validate(records, out, training, CrossvalOptions(**options)).document


def test_each_fold_is_a_model_with_its_own_test(
    records: list[Record], tmp_path: Path, trained: list[str]
) -> None:
    document = run(records, tmp_path)
    assert trained == ["fold-0", "fold-1", "fold-2"]
    tests = []
    for i in range(3):
        listed = read_manifest(tmp_path / "folds" / f"fold-{i}.csv")
        tests += [record.path for record in listed if record.split == "test"]
        assert sum(record.split == "new_site" for record in listed) == 2
        evaluation = json.loads((tmp_path / "evaluations" / f"fold-{i}" / "metrics.json").read_text())
        assert set(evaluation["sets"]) == {"test", "new_site"}
    assert sorted(tests) == sorted(record.path for record in records if record.split == "train")
    one = document["sets"]["test"]
    assert sum(one["volumes"]) == 8 == sum(map(sum, one["decisions"]["argmax"]["confusion"]))
    assert document["sets"]["new_site"]["volumes"] == [2, 2, 2]
    with (tmp_path / "crossval.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["set"] == "test"]
    assert [row["fold"] for row in rows] == ["0", "1", "2", "mean", "deviation"]
    values = one["decisions"]["argmax"]["figures"]["accuracy"]["values"]
    assert float(rows[3]["accuracy"]) == pytest.approx(sum(values) / 3)
    assert "fold-2" in (tmp_path / "report.html").read_text()


def test_finished_folds_are_kept_and_unfinished_ones_trained(
    records: list[Record], tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = crossval.train_on_archive

    def stop_at_the_third(files: Any, folder: Path, *arguments: Any, **options: Any) -> Trained:
        if folder.name == "fold-2":
            raise KeyboardInterrupt
        return train(files, folder, *arguments, **options)

    monkeypatch.setattr(crossval, "train_on_archive", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(records, tmp_path)
    monkeypatch.setattr(crossval, "train_on_archive", train)
    with pytest.raises(OutputFolderError, match="holds an earlier cross-validation; go on with it"):
        run(records, tmp_path)
    first = tmp_path / "evaluations" / "fold-0" / "metrics.json"
    before = first.stat().st_mtime_ns
    resumed = run(records, tmp_path, resume=True)
    assert trained == ["fold-0", "fold-1", "fold-2"] and first.stat().st_mtime_ns == before
    whole = run(records, tmp_path, overwrite=True)
    assert len(trained) == 6
    assert {k: v for k, v in resumed.items() if k != "finished"} == {
        k: v for k, v in whole.items() if k != "finished"
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed was 0 and is now 1"),
        ({"folds": 4}, "folds was 3 and is now 4"),
        ({"resamples": 6}, "resamples was 5 and is now 6"),
        (
            {"training": FoldTraining("tiny", config=TrainConfig(epochs=2, batch_size=4, warmup_epochs=0))},
            "training.config.epochs was 1 and is now 2",
        ),
    ],
)
def test_only_the_same_cross_validation_goes_on(
    change: dict[str, Any], message: str, records: list[Record], tmp_path: Path
) -> None:
    plan = plan_rounds(records, 3, 0, (), ("new_site",))
    identity = {
        "format": 1,
        **plan.identity,
        "training": TRAINING.to_dict(),
        "baselines": False,
        "resamples": 5,
    }
    (tmp_path / "plan.json").write_text(json.dumps(identity))
    with pytest.raises(OutputFolderError, match=message):
        run(records, tmp_path, resume=True, **change)


def test_other_files_or_another_model_are_noticed(
    records: list[Record], tmp_path: Path, trained: list[str]
) -> None:
    run(records, tmp_path)
    with pytest.raises(OutputFolderError, match="files was 10 and is now 9"):
        run(records[1:], tmp_path, resume=True)
    config = tmp_path / "fold-1" / "config.json"
    document = json.loads(config.read_text())
    config.write_text(json.dumps(document, indent=3))
    with pytest.raises(OutputFolderError, match="fold-1: is another model than the one evaluated"):
        run(records, tmp_path, resume=True)
    document["metadata"]["training"] = {"seed": 7, "epochs": 1}
    config.write_text(json.dumps(document))
    with pytest.raises(OutputFolderError, match="fold-1: was trained with seed 7"):
        run(records, tmp_path, resume=True)
    with locked(tmp_path), pytest.raises(OutputFolderError, match="another run is writing here"):
        run(records, tmp_path, overwrite=True)


def test_seeds_train_each_fold_again() -> None:
    files = [Record(f"{k}{i}.nii", k, f"sub-{k}{i}") for k in "ab" for i in range(4)]
    plan = plan_rounds(files, 3, 0, (4, 5))
    assert [(r.name, r.fold, r.seed) for r in plan.trainings[:4]] == [
        ("fold-0-seed-4", 0, 4),
        ("fold-1-seed-4", 1, 4),
        ("fold-2-seed-4", 2, 4),
        ("fold-0-seed-5", 0, 5),
    ]
    values = dict(zip(plan.trainings, [0.1, 0.2, 0.6, 0.3, 0.4, 0.8], strict=True))
    got = over_folds(values)
    # Means of folds are 0.2, 0.3, 0.7, of seeds 0.3 and 0.5.
    assert got["mean"] == pytest.approx(0.4)
    assert got["deviation"] == pytest.approx(((0.04 + 0.01 + 0.09) / 2) ** 0.5)
    assert got["deviation_over_seeds"] == pytest.approx(0.02**0.5)
    assert over_folds({Round("fold-0", 0, 0, ()): None})["mean"] is None


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ([("c", "sub-c", None)], {}, "3 folds need 3 subjects of each class, but some have fewer: c 1"),
        ([], {"keep_out": ("new_sight",)}, "no file is in the split 'new_sight'; the splits are"),
        ([("c", "sub-c", "new")], {"keep_out": ("new",)}, "'c' of .* occurs in what is kept out only"),
        ([("a", "sub-a0", "new")], {"keep_out": ("new",)}, "subject 'sub-a0' is kept out"),
        ([], {"keep_out": ("train",)}, "no labelled file is left"),
    ],
)
def test_bad_input_is_named_before_the_first_step(
    extra: list[Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    files = [Record(f"{k}{i}.nii", k, f"sub-{k}{i}", "train") for k in "ab" for i in range(4)]
    files += [Record(f"x{i}.nii", *values) for i, values in enumerate(extra)]
    with pytest.raises(ManifestError, match=message):
        run(files, tmp_path / "out", **{"keep_out": (), **options})
    assert not (tmp_path / "out").exists()


def test_a_split_that_is_kept_out_never_has_the_name_of_a_part() -> None:
    files = [
        Record(f"{k}{i}.nii", k, f"sub-{k}{i}", "test" if i > 3 else None) for k in "ab" for i in range(6)
    ]
    plan = plan_rounds(files, 3, 0, (), ("testing",))
    assert plan.kept == ("kept_test",)
    assert {r.split for r in plan.rounds[0]} == {"train", "val", "test", "kept_test"}


def test_a_fold_that_was_stopped_goes_on_and_all_share_the_cache(
    records: list[Record], tmp_path: Path, trained: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train, asked = crossval.train_on_archive, {}

    def watched(files: Any, folder: Path, *arguments: Any, **options: Any) -> Trained:
        asked[folder.name] = options
        return train(files, folder, *arguments, **options)

    monkeypatch.setattr(crossval, "train_on_archive", watched)
    monkeypatch.setattr(crossval, "can_resume", lambda folder: folder.name == "fold-1")
    cache = SliceCache(tmp_path / "cache")
    run(records, tmp_path / "out", cache=cache, save_seconds=7.0)
    assert [each["resume"] for each in asked.values()] == [False, True, False]
    assert [each["overwrite"] for each in asked.values()] == [True, False, True]
    assert all(each["reading"].cache is cache and each["save_seconds"] == 7.0 for each in asked.values())
