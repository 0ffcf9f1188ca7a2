"""Scans that were prepared otherwise than those of training, from training to the rows of every engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from fastflow import MagicFlow
from fastflow.archive.classify import classify
from fastflow.archive.explain import explain_inputs
from fastflow.archive.results import read_results
from fastflow.archive.rows import images_of
from fastflow.archive.train import train_on_archive
from fastflow.data.manifest import Record
from fastflow.errors import FastflowError, VolumeError
from fastflow.training.config import TrainConfig
from tests.conftest import CLASSES, write_scan

CONFIG = TrainConfig(epochs=1, batch_size=8, warmup_epochs=0, augment="none", seed=3)


@pytest.fixture(scope="module")
def model(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 16 scans of training and 4 of validation."""
    files = sorted(scans.rglob("*.nii.gz"))
    records = [
        Record(str(path), path.parent.name, path.name, "val" if i % 10 >= 8 else "train")
        for i, path in enumerate(files)
    ]
    folder = tmp_path_factory.mktemp("trained")
    train_on_archive(records, folder, "tiny", "center+-1", CONFIG)
    return folder


DISTORTED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "z_score": lambda data: (data - data.mean()) / data.std(),
    "offset": lambda data: data + 1000,
    "inverted": lambda data: data.max() - data,
    "mask": lambda data: (data > data.mean()).astype(float),
    "half": lambda data: data * (np.arange(data.shape[0]) > 7)[:, None, None],
    "turned": lambda data: data[:, :, ::-1],
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New scans of both classes, and distorted copies."""
    root = tmp_path_factory.mktemp("inputs")
    for k, label in enumerate(CLASSES):
        for seed in range(4):
            write_scan(root / "good" / f"{label}{seed}.nii.gz", label, 5000 + 100 * k + seed)
        good = nib.load(root / "good" / f"{label}0.nii.gz")
        for name, distort in DISTORTED.items():
            path = root / "distorted" / f"{label}-{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(distort(good.get_fdata()).astype(np.float32), good.affine), path)
    return root


def rows_of(inputs: Path, model: Path, out: Path, **options: Any) -> dict[str, dict[str, str]]:
    classify([inputs], model, out, **options)
    return {Path(row["path"]).stem.split(".")[0]: row for row in read_results(out)}


def test_good_scans_are_like_those_of_training_and_distorted_ones_are_not(
    inputs: Path, model: Path, tmp_path: Path
) -> None:
    good = rows_of(inputs / "good", model, tmp_path / "good")
    assert [row["error_code"] for row in good.values() if "unlike_training" in row["error_code"]] == []
    for name, row in rows_of(inputs / "distorted", model, tmp_path / "distorted").items():
        assert row["status"] == "flagged" and "unlike_training" in row["error_code"], name
        assert "unlike the training images: " in row["error_message"]
        # It has a prediction all the same.
        assert row["predicted"] in CLASSES
    assert "share of voxels below 0" in row_of_z_score(tmp_path)["error_message"]


def row_of_z_score(folder: Path) -> dict[str, str]:
    return next(row for row in read_results(folder / "distorted") if "flat-z_score" in row["path"])


def test_exports_flag_the_same_scans(inputs: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from fastflow.runtime.scorer import OnnxScorer
    from tests.export.handmade import write_export

    metadata = json.loads((model / "config.json").read_text())["metadata"]
    folder = write_export(tmp_path / "export", images=metadata["images"])
    rows = rows_of(inputs, model, tmp_path / "rows")
    by_export = rows_of(inputs, folder, tmp_path / "by_export", engine="onnx")
    scorer = OnnxScorer(folder, "cpu", threads=1)
    for path in sorted(inputs.rglob("*.nii.gz")):
        name = path.name.split(".")[0]
        flags = [message for code, message in scorer.classify_volume(path).flags if code == "unlike_training"]
        assert bool(flags) == ("unlike_training" in rows[name]["error_code"]) == (path.parent.name != "good")
        assert by_export[name]["error_message"] == "; ".join(flags)


def test_explanations_say_so(inputs: Path, model: Path, tmp_path: Path) -> None:
    found = explain_inputs(
        [inputs / "distorted" / "flat-offset.nii.gz", inputs / "good" / "flat0.nii.gz"],
        model,
        tmp_path / "out",
    )
    distorted, good = found.rows
    assert (distorted["status"], distorted["error_code"]) == ("flagged", "unlike_training")
    assert distorted["error_message"].startswith("unlike the training images: ")
    assert good["status"] == "ok" and found.inventory.used == 2


def test_a_model_without_statistics_flags_nothing(inputs: Path, model: Path, tmp_path: Path) -> None:
    older = MagicFlow.load(model)
    del older.metadata["images"]
    older.metadata["validation"] = {"slices": "center+-1", "log_prob": [-1e9, 1e9]}
    older.save(tmp_path / "older")
    rows = rows_of(inputs, tmp_path / "older", tmp_path / "rows")
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_statistics_of_another_version_are_named(model: Path) -> None:
    newer = MagicFlow.load(model)
    newer.metadata["images"] = {"format": 2}
    with pytest.raises(FastflowError, match="format 2, this version of fastflow reads format 1: update"):
        images_of(newer)


def test_validation_values_come_with_the_range_that_is_accepted(model: Path) -> None:
    validation = MagicFlow.load(model).metadata["validation"]
    values, (low, high) = validation["log_prob"], validation["accepted"]
    assert len(values) == 4
    margin = 5 / 4 * (values[-1] - values[0])
    assert (low, high) == pytest.approx((values[0] - margin, values[-1] + margin), abs=0.01)


# -- blank images --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PNG files with one grey level or one pixel, and a volume whose contrast is in other slices."""
    from PIL import Image

    root = tmp_path_factory.mktemp("blank")
    for name, level in (("black", 0), ("grey", 128), ("white", 255)):
        Image.fromarray(np.full((15, 14), level, dtype=np.uint8)).save(root / f"{name}.png")
    pixel = np.zeros((15, 14), dtype=np.uint8)
    pixel[7, 7] = 255
    Image.fromarray(pixel).save(root / "one_pixel.png")
    data = np.zeros((14, 9, 15))
    data[:, :3] = np.random.default_rng(0).normal(100, 20, (14, 3, 15))
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), root / "elsewhere.nii.gz")
    return root


def test_blank_images_are_error_rows(blank: Path, model: Path, tmp_path: Path) -> None:
    rows = rows_of(blank, model, tmp_path / "rows")
    assert set(rows) == {"black", "grey", "white", "one_pixel", "elsewhere"}
    for row in rows.values():
        assert (row["status"], row["error_code"], row["predicted"]) == ("error", "blank", "")
    assert "slice 3 along the anterior axis is blank" in rows["elsewhere"]["error_message"]
    assert "the image is blank: 1 of its 210 pixels" in rows["one_pixel"]["error_message"]


def test_blank_images_are_left_out_of_training(blank: Path, scans: Path, tmp_path: Path) -> None:
    records = [
        Record(str(path), "flat" if i % 2 else "striped", path.name, "train")
        for i, path in enumerate(sorted(blank.iterdir()))
    ]
    records += [
        Record(str(path), path.parent.name, path.name, "train")
        for path in sorted(scans.rglob("*01_*.nii.gz"))
    ]
    errors: list[VolumeError] = train_on_archive(
        records, tmp_path, "tiny", "center+-1", CONFIG, {"dequantize": "uniform"}
    ).errors
    assert sorted(error.code for error in errors) == ["blank"] * 5
