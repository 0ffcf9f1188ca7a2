from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflow import MagicFlow
from fastflow.archive.explain import explain, explain_slice
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image


@pytest.fixture(scope="module")
def model(model_folder: Path) -> MagicFlow:
    return MagicFlow.load(model_folder)


@pytest.fixture(scope="module")
def slice_(scans: Path, model: MagicFlow) -> np.ndarray:
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    return load_image(str(scans / "striped/sub-103_T1w.nii.gz"), preprocess)[1]


@pytest.mark.parametrize("label", [None, 0, 1])
def test_maps_sum_to_what_they_explain(slice_: np.ndarray, model: MagicFlow, label: int | None) -> None:
    explanation = explain_slice(model, slice_, label)
    log_probs = explanation.log_probs
    assert explanation.label == (log_probs.argmax() if label is None else label)
    assert explanation.rival == 1 - explanation.label
    total = explanation.attribution.sum() + explanation.constant
    assert total == pytest.approx(log_probs[explanation.label], rel=1e-5)
    difference = log_probs[explanation.label] - log_probs[explanation.rival]
    assert explanation.contrast.sum() == pytest.approx(difference, abs=1e-4 * abs(log_probs).max())
    assert explanation.attribution.shape == (16, 16)


def test_bad_arguments_are_named(
    slice_: np.ndarray, model: MagicFlow, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"image must be \(1, 16, 16\) uint8"):
        explain_slice(model, slice_[:, :8])
    with pytest.raises(ValueError, match="label must lie in 0 to 1, got 2"):
        explain_slice(model, slice_, 2)
    with pytest.raises(ValueError, match="label must be one of flat, striped, got 'dotted'"):
        explain([tmp_path / "x.nii"], model_folder, tmp_path, label="dotted")


def test_files_for_each_input(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    file = scans / "flat/sub-001_T1w.nii.gz"
    errors = explain([file, tmp_path / "gone.nii", file], model_folder, tmp_path / "out")
    assert [error.code for error in errors] == ["missing"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"sub-001_T1w.png", "sub-001_T1w.npz", "sub-001_T1w-2.png", "sub-001_T1w-2.npz"}
    with np.load(tmp_path / "out/sub-001_T1w.npz") as stored:
        total = stored["attribution"].sum() + stored["constant"]
        assert total == pytest.approx(stored["log_probs"][stored["label"]], rel=1e-5)
        assert stored["class_names"].tolist() == ["flat", "striped"]
    with Image.open(tmp_path / "out/sub-001_T1w.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_limit(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    explain([scans], model_folder, tmp_path, limit=1)
    assert len(list(tmp_path.glob("*.png"))) == 1
