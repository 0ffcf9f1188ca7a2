"""Scanners that a model knows, from training to the rows of every engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow import MagicFlow
from fastflow.archive.classify import classify
from fastflow.archive.results import read_results
from fastflow.archive.scanners import (
    describe_scanners,
    held_out_volumes,
    labelled_features,
    some_of_each_class,
)
from fastflow.archive.train import train_on_archive
from fastflow.data.manifest import Record
from fastflow.data.slices import SliceSet
from fastflow.errors import FastflowError, OutputFolderError
from fastflow.novelty import KEY, known_scanners
from fastflow.training.config import TrainConfig
from tests.conftest import CLASSES, write_scan

CONFIG = TrainConfig(epochs=1, batch_size=8, warmup_epochs=0, augment="none", seed=3)


@pytest.fixture(scope="module")
def model(scans: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 10 scans of training and 10 of validation."""
    records = [
        Record(str(path), path.parent.name, path.name, "val" if i % 2 else "train")
        for i, path in enumerate(sorted(scans.rglob("*.nii.gz")))
    ]
    folder = tmp_path_factory.mktemp("trained")
    train_on_archive(records, folder, "tiny", "center+-1", CONFIG)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """New scans, and the same with the grain of another scanner."""
    root = tmp_path_factory.mktemp("inputs")
    for k, label in enumerate(CLASSES):
        good = root / f"{label}-good.nii.gz"
        write_scan(good, label, 7000 + k)
        scan = nib.load(good)
        data = gaussian_filter(scan.get_fdata(), 1.0)
        nib.save(nib.Nifti1Image(data.astype(np.float32), scan.affine), root / f"{label}-other.nii.gz")
    return root


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    return {Path(row["path"]).stem.split(".")[0]: row for row in read_results(out)}


def test_rows_tell_scans_of_another_scanner(model: Path, inputs: Path, tmp_path: Path) -> None:
    known = known_scanners(MagicFlow.load(model).metadata)
    assert known is not None and known.slices == "center+-1" and len(known.validation) == 10
    classify([inputs], model, tmp_path / "plain")
    plain = rows_of(tmp_path / "plain")
    assert all("unknown_scanner" not in row["error_code"] for row in plain.values())
    for label in CLASSES:
        assert float(plain[f"{label}-other"]["scanner_p"]) == pytest.approx(1 / 11)
        assert float(plain[f"{label}-good"]["scanner_p"]) > 1 / 11
    classify([inputs], model, tmp_path / "limit", reject_below=0.1)
    flagged = {
        name for name, row in rows_of(tmp_path / "limit").items() if "unknown_scanner" in row["error_code"]
    }
    assert flagged == {f"{label}-other" for label in CLASSES}
    # A limit is one of the settings that a run keeps.
    with pytest.raises(OutputFolderError, match=r"reject_below was 0\.1"):
        classify([inputs], model, tmp_path / "limit", resume=True)


def test_other_slices_are_not_compared(model: Path, inputs: Path, tmp_path: Path) -> None:
    classify([inputs], model, tmp_path / "other", slices="center")
    assert {row["scanner_p"] for row in rows_of(tmp_path / "other").values()} == {""}
    with pytest.raises(ValueError, match="slices of training"):
        classify([inputs], model, tmp_path / "limit", slices="center", reject_below=0.1)
    with pytest.raises(ValueError, match="least p-value of 10"):
        classify([inputs], model, tmp_path / "limit", reject_below=0.05)
    assert not (tmp_path / "limit").exists()


def test_models_that_know_no_scanners(model_folder: Path, inputs: Path, tmp_path: Path) -> None:
    classify([inputs], model_folder, tmp_path / "r")
    assert {row["scanner_p"] for row in rows_of(tmp_path / "r").values()} == {""}
    with pytest.raises(ValueError, match="knows its scanners"):
        classify([inputs], model_folder, tmp_path / "limit", reject_below=0.1)
    model = MagicFlow.load(model_folder)
    model.metadata[KEY] = {"format": 7}
    model.save(tmp_path / "model")
    with pytest.raises(FastflowError, match="format 7"):
        classify([inputs], tmp_path / "model", tmp_path / "limit")


def slice_set(count: int, seed: int = 0) -> SliceSet:
    """Volumes of two slices, classes in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (2 * count, 1, 16, 16), dtype=np.uint8)
    volumes = np.repeat(np.arange(count), 2)
    names = tuple(f"sub-{i}" for i in range(count))
    return SliceSet(images, volumes % 2, volumes, names, names, CLASSES)


def test_features_under_the_true_label_are_those_of_scoring(model_folder: Path) -> None:
    model, data = MagicFlow.load(model_folder).eval(), slice_set(5)
    features, labels = labelled_features(model, data)
    volumes = held_out_volumes(model, data)
    np.testing.assert_array_equal(labels, volumes.labels)
    np.testing.assert_allclose(features, volumes.under(labels), rtol=0, atol=1e-5)
    assert volumes.features.shape == (5, 2, 2 * len(model.config.latent_shapes) + 6)


def test_nothing_is_kept_without_enough_volumes(model_folder: Path) -> None:
    model = MagicFlow.load(model_folder).eval()
    for sets in ({"train": slice_set(8)}, {"train": slice_set(8), "val": slice_set(7, 1)}):
        model.metadata[KEY] = "of an earlier training"
        describe_scanners(model, sets)
        assert KEY not in model.metadata
    describe_scanners(model, {"train": slice_set(8), "val": slice_set(8, 1)})
    assert known_scanners(model.metadata) is not None


def test_large_classes_are_thinned_out_evenly() -> None:
    few = some_of_each_class(slice_set(20), 3)
    assert few.subjects == ("sub-0", "sub-6", "sub-12", "sub-1", "sub-7", "sub-13")
    data = slice_set(6)
    assert some_of_each_class(data, 3) is data


@pytest.mark.slow
def test_exports_and_their_program_give_the_same_p_values(model: Path, inputs: Path, tmp_path: Path) -> None:
    from fastflow.export.onnx import export_onnx
    from fastflow.export.triton_server import write_model_repository

    from fastflow.runtime.scorer import OnnxScorer

    export_onnx(model, tmp_path / "deploy", graphs=("score",))
    document = json.loads((tmp_path / "deploy" / "export.json").read_text())
    assert document["parity"]["graphs"]["score"]["correlation_error"] < 1e-4
    classify([inputs], model, tmp_path / "model")
    classify([inputs], tmp_path / "deploy", tmp_path / "export", engine="onnx", reject_below=0.1)
    wanted, got = rows_of(tmp_path / "model"), rows_of(tmp_path / "export")
    assert {n: row["scanner_p"] for n, row in got.items()} == {
        n: row["scanner_p"] for n, row in wanted.items()
    }
    prediction = OnnxScorer(tmp_path / "deploy").classify_volume(
        inputs / "flat-other.nii.gz", reject_below=0.1
    )
    assert prediction.scanner_p == pytest.approx(1 / 11) and "unknown_scanner" in dict(prediction.flags)
    # The program of the folder has all modules that it needs, and no SciPy.
    program = [
        sys.executable,
        "-c",
        "import sys, runpy; sys.modules['scipy'] = None; sys.argv[0] = sys.argv[1];"
        "del sys.argv[1]; runpy.run_path(sys.argv[0], run_name='__main__')",
        "runtime.pyz",
    ]
    done = subprocess.run(
        [*program, str(inputs / "flat-other.nii.gz"), "--json", "--reject-below", "0.1"],
        cwd=tmp_path / "deploy",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["scanner_p"] == pytest.approx(1 / 11)
    repository = write_model_repository(tmp_path / "deploy", tmp_path / "served")
    text = (repository / "magic_flow_score" / "config.pbtxt").read_text()
    assert text.count("label_filename") == 1 and '"correlations"' in text
