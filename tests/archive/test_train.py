from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastflow import MagicFlow
from fastflow.archive.classify import classify
from fastflow.archive.train import preprocess_like, read_records, recipe, train_on_archive
from fastflow.data.manifest import Record, index_folder, split_by_subject
from fastflow.errors import ManifestError
from fastflow.training.trainer import TrainConfig

CONFIG = TrainConfig(epochs=2, batch_size=4, warmup_epochs=0, augment="none", seed=3)


def records_of(scans: Path) -> list[Record]:
    """Six of ten for each class: 6 volumes to train on, 2 for validation, 4 to test."""
    records = [r for i, r in enumerate(index_folder(scans)) if i % 10 < 6]
    return split_by_subject(records, {"train": 0.5, "val": 0.17, "test": 0.33})


def test_model_folder_classifies_what_it_was_trained_on(scans: Path, tmp_path: Path) -> None:
    records = records_of(scans)
    broken = Record(str(tmp_path / "broken.nii.gz"), "flat", "sub-broken", "train")
    unknown = Record(str(tmp_path / "unlabelled.nii.gz"), None, "sub-unknown", "train")
    read, epochs = [], []
    trained = train_on_archive(
        [broken, unknown, *records],
        tmp_path / "model",
        "tiny",
        "center+-1",
        CONFIG,
        {"dequantize": "uniform"},
        reading=lambda done, total: read.append((done, total)),
        progress=epochs.append,
    )
    assert [error.code for error in trained.errors] == ["missing"]
    assert read[-1] == (9, 9)
    assert epochs == trained.history
    assert len(epochs) == 2
    model = MagicFlow.load(tmp_path / "model")
    assert model.config.class_names == ("flat", "striped")
    assert model.config.dequantize == "uniform"
    assert model.temperature == trained.model.temperature != 1.0
    assert model.metadata["preprocess"]["grid"] == [14, 9, 15]
    files = sorted((scans / "flat").iterdir())[:2]
    assert classify(files, tmp_path / "model", tmp_path / "r").failed == 0


@pytest.mark.slow
def test_reversible_training_is_training(scans: Path, tmp_path: Path) -> None:
    normal, other = (
        train_on_archive(
            records_of(scans),
            tmp_path / str(reversible),
            "tiny",
            config=CONFIG,
            flow_changes={"reversible": reversible},
        )
        for reversible in (False, True)
    )
    assert MagicFlow.load(tmp_path / "True").config.reversible
    for a, b in zip(normal.history, other.history, strict=True):
        assert a.keys() == b.keys()
        assert b["train_bits_per_dim"] == pytest.approx(a["train_bits_per_dim"], rel=1e-3)


def test_test_split_is_not_looked_at(scans: Path, tmp_path: Path) -> None:
    records = [
        r if r.split != "test" else dataclasses.replace(r, path="/nowhere.nii") for r in records_of(scans)
    ]
    assert (
        train_on_archive(records, tmp_path, "tiny", config=dataclasses.replace(CONFIG, epochs=1)).errors == []
    )


def test_without_validation_there_is_no_calibration(scans: Path, tmp_path: Path) -> None:
    records = [r for r in records_of(scans) if r.split == "train"]
    assert (
        train_on_archive(
            records, tmp_path, "tiny", config=dataclasses.replace(CONFIG, epochs=1)
        ).model.temperature
        == 1.0
    )


def test_archives_that_cannot_train(scans: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no labelled entry has the split 'train'"):
        train_on_archive(
            [dataclasses.replace(r, split=None) for r in records_of(scans)], tmp_path, "tiny", config=CONFIG
        )
    gone = [dataclasses.replace(r, path=f"/nowhere/{i}.nii") for i, r in enumerate(records_of(scans))]
    with pytest.raises(ManifestError, match="none of the 6 training files can be used; the first: /nowhere"):
        train_on_archive(gone, tmp_path, "tiny", config=CONFIG)
    extra = [*records_of(scans), Record("x.nii", "dotted", "sub-x", "val")]
    with pytest.raises(ValueError, match="label 'dotted'"):
        train_on_archive(extra, tmp_path, "tiny", config=CONFIG)
    with pytest.raises(ValueError, match="preset must be one of"):
        train_on_archive(records_of(scans), tmp_path, "huge", config=CONFIG)


def test_first_readable_volume_sets_the_grid(scans: Path) -> None:
    records = [Record("a.png", "x", "s"), Record("/nowhere.nii", "x", "s"), *records_of(scans)]
    preprocess = preprocess_like(records, (16, 16), "center")
    assert (preprocess.spacing, preprocess.grid) == ((2.0, 2.0, 2.0), (14, 9, 15))
    assert preprocess_like(records[:1], (16, 16), "center").grid is None


def test_recipes() -> None:
    assert recipe("small", "generation", epochs=3) == TrainConfig.paper("generation", epochs=3)
    assert recipe("demo", "classification", seed=2) == TrainConfig.demo(seed=2)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        recipe("small", "classification", learning_rate=-1.0)


def test_records_come_from_folders_and_manifests(scans: Path, tmp_path: Path) -> None:
    assert len(read_records(scans)) == 20
    with pytest.raises(ManifestError, match="no such manifest"):
        read_records(tmp_path / "m.csv")
