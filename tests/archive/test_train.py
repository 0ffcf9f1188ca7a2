from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from fastflow import MagicFlow
from fastflow.archive import train as archive_train
from fastflow.archive.classify import classify
from fastflow.archive.results import read_results
from fastflow.archive.train import Trained, calibrate, preprocess_like, read_records, recipe, train_on_archive
from fastflow.archive.training_data import Reading, UsableFiles, choose, load_chosen
from fastflow.data.indexed_images import IndexedImages
from fastflow.data.listing import list_records
from fastflow.data.manifest import Record, index_folder, split_by_subject, write_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slice_cache import SliceCache
from fastflow.data.slices import load_slices
from fastflow.errors import ManifestError, OutputFolderError
from fastflow.training.trainer import TrainConfig

CONFIG = TrainConfig(epochs=2, batch_size=4, warmup_epochs=0, augment="none", seed=3)
ONCE = dataclasses.replace(CONFIG, epochs=1)


def records_of(scans: Path) -> list[Record]:
    """Six of ten for each class: 6 volumes to train on, 2 for validation, 4 to test."""
    records = [r for i, r in enumerate(index_folder(scans)) if i % 10 < 6]
    return split_by_subject(records, {"train": 0.5, "val": 0.17, "test": 0.33})


def train_once(records: Any, folder: Path, config: TrainConfig = ONCE, **options: Any) -> Trained:
    return train_on_archive(records, folder, "tiny", config=config, **options)


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
    assert trained.inventory.line() == (
        "14 files found: 8 used, 6 left out (missing 1, no_label 1, split 'test' 4)"
    )
    assert json.loads((tmp_path / "model" / "inventory.json").read_text()) == trained.inventory.to_dict()
    assert read[-1] == (9, 9)
    assert epochs == trained.history
    assert len(epochs) == 2
    model = MagicFlow.load(tmp_path / "model")
    assert model.config.class_names == ("flat", "striped")
    assert model.config.dequantize == "uniform"
    assert model.temperature == trained.model.temperature != 1.0
    assert model.metadata["preprocess"]["grid"] == [14, 9, 15]
    assert model.metadata["training_data"]["files"] == {
        "train": {"flat": 3, "striped": 3},
        "val": {"flat": 1, "striped": 1},
    }
    assert {path.name for path in (tmp_path / "model").iterdir()} - {".lock"} == {
        "config.json",
        "history.jsonl",
        "steps.csv",
        "checkpoints",
        "inventory.json",
        next((tmp_path / "model").glob("model-*")).name,
    }
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
    assert train_once(records, tmp_path).errors == []


def test_without_validation_there_is_no_calibration(scans: Path, tmp_path: Path) -> None:
    records = [r for r in records_of(scans) if r.split == "train"]
    assert train_once(records, tmp_path).model.temperature == 1.0


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


def test_most_volumes_set_the_grid_wherever_the_odd_one_stands(scans: Path, tmp_path: Path) -> None:
    odd = Record(str(tmp_path / "odd.nii"), "flat", "sub-odd", "train")
    nib.save(nib.Nifti1Image(np.ones((14, 8, 15), np.int16), np.eye(4)), odd.path)
    records = [Record("a.png", "x", "s"), odd, Record("/nowhere.nii", "x", "s"), *records_of(scans)]
    preprocess = preprocess_like(records, (16, 16), "center")
    assert (preprocess.spacing, preprocess.grid) == ((2.0, 2.0, 2.0), (14, 9, 15))
    assert preprocess_like(records[::-1], (16, 16), "center") == preprocess
    assert preprocess_like(records[:1], (16, 16), "center").grid is None
    trained = train_once([odd, *(r for r in records_of(scans) if r.split == "train")], tmp_path / "m")
    assert [(error.path, error.code) for error in trained.errors] == [(odd.path, "grid_mismatch")]
    assert trained.model.metadata["training_data"]["files"] == {"train": {"flat": 3, "striped": 3}}


def test_validation_volumes_have_no_vote_on_the_grid(scans: Path, tmp_path: Path) -> None:
    records = [r for r in records_of(scans) if r.split == "train"][:1]
    others = [Record(str(tmp_path / f"{i}.nii"), records[0].label, f"sub-v{i}", "val") for i in range(2)]
    for other in others:
        nib.save(nib.Nifti1Image(np.ones((14, 8, 15), np.int16), np.eye(4)), other.path)
    with pytest.raises(ManifestError, match=r"none of the 2 files of the split 'val' .*grid_mismatch 2"):
        train_once([*others, *records], tmp_path / "m")


def test_an_empty_class_stops_before_the_first_epoch(scans: Path, tmp_path: Path) -> None:
    lost = [Record(f"/nowhere/{i}.nii", "dotted", f"sub-{i}", "train") for i in range(3)]
    told: list[UsableFiles] = []
    epochs: list[Any] = []
    with pytest.raises(ManifestError, match="3 of 3 files of class 'dotted': missing 3"):
        train_once([*records_of(scans), *lost], tmp_path / "m", counted=told.append, progress=epochs.append)
    assert "train: 6 of 9 files can be used (dotted 0 of 3, flat 3, striped 3)" in told[0].lines()
    assert not epochs and not (tmp_path / "m").exists()


def test_another_spelling_of_validation_is_used_or_named(scans: Path, tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, split="validation" if r.split == "val" else r.split) for r in records_of(scans)
    ]
    write_manifest(records, tmp_path / "m.csv")
    told: list[UsableFiles] = []
    trained = train_once(list_records(tmp_path / "m.csv"), tmp_path / "m", counted=told.append)
    if "validation" in trained.model.metadata:
        assert told[0].lines()[-1] == "val: 2 of 2 files can be used (flat 1, striped 1)"
    else:
        assert "split 'validation' 2" in told[0].lines()[0]


def test_two_trainings_in_one_folder_cannot_mix(scans: Path, tmp_path: Path) -> None:
    records, refused = records_of(scans), []
    alone = train_once(records, tmp_path / "alone", CONFIG)

    def start_another(epoch: dict[str, float]) -> None:
        with pytest.raises(OutputFolderError, match="another run is writing here") as error:
            train_once(records, tmp_path / "m", overwrite=True)
        refused.append(error)

    first = train_once(records, tmp_path / "m", CONFIG, progress=start_another)
    assert len(refused) == 2
    saved = MagicFlow.load(tmp_path / "m").state_dict()
    for name, value in alone.model.state_dict().items():
        assert torch.equal(value, first.model.state_dict()[name]) and torch.equal(value, saved[name])


def test_a_finished_model_stays_until_the_next_is_finished(scans: Path, tmp_path: Path) -> None:
    records, read = [r for r in records_of(scans) if r.split == "train"], []
    train_once(records, tmp_path / "m")
    before = (tmp_path / "m" / "config.json").read_bytes()
    with pytest.raises(OutputFolderError, match="holds a finished model"):
        train_once(records, tmp_path / "m", reading=lambda done, total: read.append(done))
    assert not read

    def stop(epoch: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_once(records, tmp_path / "m", progress=stop, overwrite=True)
    assert (tmp_path / "m" / "config.json").read_bytes() == before
    assert MagicFlow.load(tmp_path / "m").initialized
    assert (tmp_path / "m" / "unfinished" / "history.jsonl").exists()
    train_once(records, tmp_path / "m", dataclasses.replace(ONCE, seed=4), overwrite=True)
    assert MagicFlow.load(tmp_path / "m").metadata["training"]["seed"] == 4
    assert not (tmp_path / "m" / "unfinished").exists()


def test_one_class_with_validation_is_a_density_model(scans: Path, tmp_path: Path) -> None:
    records = [r for r in records_of(scans) if r.label == "flat"]
    # An objective that sets classes apart has nothing to do, nor has a choice by accuracy.
    config = dataclasses.replace(CONFIG, objective="pairwise", select="accuracy")
    trained = train_once(records, tmp_path / "m", config)
    model = MagicFlow.load(tmp_path / "m")
    assert model.temperature == 1.0
    assert len(model.metadata["validation"]["log_prob"]) == 1
    assert model.metadata["training"]["select"] == "loss"
    losses = [record["val_bits_per_dim"] for record in trained.history]
    assert model.metadata["training"]["kept_epoch"] == 1 + int(np.argmin(losses))
    assert classify([r.path for r in records], tmp_path / "m", tmp_path / "r").failed == 0
    for row in read_results(tmp_path / "r"):
        assert (row["predicted"], row["posterior_flat"], row["margin"]) == ("flat", "1", "inf")
        assert row["typicality"]
    with pytest.raises(ManifestError, match="a model of one class needs its name as a label too"):
        train_once([dataclasses.replace(r, label=None) for r in records], tmp_path / "n")


def test_volumes_without_a_finite_likelihood_calibrate_nothing(
    scans: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MagicFlow.load(model_folder)
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    names = ("flat", "striped")
    records = [r for r in records_of(scans) if r.split == "val"]
    data, _ = load_slices(records, preprocess, names)
    scores = np.random.default_rng(0).normal(size=(len(data), 2))
    monkeypatch.setattr("fastflow.archive.calibrate.score_slices", lambda model, images: scores)
    scores[data.volumes == 1, 0] = np.nan
    with pytest.warns(UserWarning, match="1 of .* validation volumes, such as .*, have no finite log-lik"):
        calibrate(model, data)
    values = model.metadata["validation"]["log_prob"]
    assert len(values) == len(records) - 1 and np.isfinite([*values, model.temperature]).all()
    scores[:] = np.inf
    with pytest.raises(FloatingPointError, match="log-likelihoods are not finite"):
        calibrate(model, data)


def test_recipes() -> None:
    assert recipe("small", "generation", epochs=3) == TrainConfig.paper("generation", epochs=3)
    assert recipe("demo", "classification", seed=2) == TrainConfig.demo(seed=2)
    with pytest.raises(ValueError, match="learning_rate must be positive"):
        recipe("small", "classification", learning_rate=-1.0)


def test_records_come_from_folders_and_manifests(scans: Path, tmp_path: Path) -> None:
    assert len(read_records(scans)) == 20
    with pytest.raises(ManifestError, match="no such manifest"):
        read_records(tmp_path / "m.csv")


def test_a_cache_changes_no_bit_of_the_model(
    scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(ONCE, augment="shift", sampler="balanced")
    plain = train_once(records_of(scans), tmp_path / "plain", config)
    copied, copy = [], IndexedImages._copy
    monkeypatch.setattr(
        IndexedImages, "_copy", lambda self, part, row: copied.append(np.size(row)) or copy(self, part, row)
    )
    by_training: list[Any] = []
    monkeypatch.setattr(
        archive_train, "calibrate", lambda *given: by_training.extend(copied) or calibrate(*given)
    )
    preprocess = Preprocess(**plain.model.metadata["preprocess"])
    load_chosen(choose(records_of(scans)), preprocess, reading=Reading(cache=SliceCache(tmp_path / "cache")))
    cache = SliceCache(tmp_path / "cache")
    cached = train_once(records_of(scans), tmp_path / "cached", config, reading=Reading(cache=cache))
    assert (cache.reused, cache.asked) == (8, 8)
    for a, b in zip(plain.model.state_dict().values(), cached.model.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert cached.model.metadata == plain.model.metadata
    # A training copies a batch at a time; what scores its images afterwards has batches of its own.
    assert 0 < max(by_training) <= config.batch_size
