from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflow import MagicFlow
from fastflow.archive import explain as module
from fastflow.archive.explain import explain, explain_inputs, explain_slice
from fastflow.archive.locks import locked
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image
from fastflow.errors import OutputFolderError


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
    assert names == {
        *("sub-001_T1w.png", "sub-001_T1w.npz", "sub-001_T1w-2.png", "sub-001_T1w-2.npz"),
        *("explanations.csv", "inventory.json"),
    }
    with np.load(tmp_path / "out/sub-001_T1w.npz") as stored:
        total = stored["attribution"].sum() + stored["constant"]
        assert total == pytest.approx(stored["log_probs"][stored["label"]], rel=1e-5)
        assert stored["class_names"].tolist() == ["flat", "striped"]
    with Image.open(tmp_path / "out/sub-001_T1w.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_limit(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    done = explain_inputs([scans], model_folder, tmp_path, limit=1)
    assert len(list(tmp_path.glob("*.png"))) == 1
    assert done.inventory.line() == "20 files found: 1 used, 19 left out (limit 19)"


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and says nothing of whose a file is."""
    monkeypatch.setattr(module, "attribution_figure", lambda explanations, names: None)
    monkeypatch.setattr(module, "png", lambda figure: b"picture")


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "explanations.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def equally_named(scans: Path, root: Path) -> list[Path]:
    """Three scans, of which two have the same name, and one that of the second with a number."""
    files = [root / "a/scan.nii.gz", root / "b/scan.nii.gz", root / "c/scan-2.nii.gz"]
    for file, number in zip(files, ("000", "001", "002"), strict=True):
        file.parent.mkdir(parents=True)
        shutil.copy(scans / f"flat/sub-{number}_T1w.nii.gz", file)
    return files


@pytest.mark.usefixtures("no_drawing")
def test_equally_named_scans_have_files_of_their_own(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    files = equally_named(scans, tmp_path / "in")
    done = explain_inputs([tmp_path / "in", tmp_path / "gone.nii"], model_folder, tmp_path / "out")
    rows = table(tmp_path / "out")
    names = {row["input"]: row["name"] for row in rows}
    assert names == {
        **dict(zip(map(str, files), ("scan", "scan-3", "scan-2"), strict=True)),
        str(tmp_path / "gone.nii"): "gone",
    }
    model = MagicFlow.load(model_folder)
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    for file in files:
        with np.load(tmp_path / f"out/{names[str(file)]}.npz") as stored:
            assert (stored["image"] == load_image(str(file), preprocess)[1].max(axis=0)).all()
            predicted = ("flat", "striped")[stored["log_probs"].argmax()]
        row = next(row for row in rows if row["input"] == str(file))
        assert (row["status"], row["predicted"], row["error_code"]) == ("ok", predicted, "")
    assert (rows[-1]["status"], rows[-1]["error_code"]) == ("error", "missing")
    assert rows[-1]["error_message"] == done.errors[0].message
    assert done.inventory.line() == "4 files found: 3 used, 1 left out (missing 1)"
    assert json.loads((tmp_path / "out/inventory.json").read_text()) == done.inventory.to_dict()
    again = explain_inputs(
        [tmp_path / "in", tmp_path / "gone.nii"], model_folder, tmp_path / "out", overwrite=True
    )
    assert [row["name"] for row in again.rows] == [row["name"] for row in rows]


@pytest.mark.usefixtures("no_drawing")
def test_labels_of_a_manifest_stand_in_the_table(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    file = scans / "striped/sub-103_T1w.nii.gz"
    (tmp_path / "m.csv").write_text(f"path,label\n{file},striped\n{file},dotted\n")
    explain([tmp_path / "m.csv"], model_folder, tmp_path / "out")
    assert [row["label"] for row in table(tmp_path / "out")] == ["striped", "dotted"]


@pytest.mark.usefixtures("no_drawing")
def test_only_earlier_explanations_are_replaced(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    first, second = scans / "flat/sub-000_T1w.nii.gz", scans / "flat/sub-001_T1w.nii.gz"
    out = tmp_path / "out"
    explain([first], model_folder, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(
        OutputFolderError, match=r"holds earlier explanations; replace them \(--overwrite\) or"
    ):
        explain([second], model_folder, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "notes.txt").write_text("mine")
    explain([second], model_folder, out, overwrite=True)
    names = {"sub-001_T1w.png", "sub-001_T1w.npz", "explanations.csv", "inventory.json", "notes.txt"}
    assert {path.name for path in out.iterdir()} == names
    # A file of somebody else stays, also where its name is wanted.
    (out / "sub-000_T1w.png").write_text("mine")
    with pytest.raises(
        OutputFolderError, match=r"holds other files, such as 'sub-000_T1w\.png', which would"
    ):
        explain([first], model_folder, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {*names, "sub-000_T1w.png"}
    for overwrite in (False, True):
        with pytest.raises(OutputFolderError, match="holds other files, such as 'flat'; explanations need a"):
            explain([first], model_folder, scans, overwrite=overwrite)


@pytest.mark.usefixtures("no_drawing")
def test_the_folder_is_tried_before_a_volume_is_read(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*arguments: Any) -> Any:
        raise AssertionError("no volume may be read")

    def write(*arguments: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("fastflow.archive.explain.iterate_measured", read)
    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match=f"No space left on device; free some space.*'{tmp_path}/out'"):
        explain([scans], model_folder, tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setattr("fastflow.archive.explain.iterate_measured", read)
    with locked(tmp_path / "out"), pytest.raises(OutputFolderError, match="another run is writing here"):
        explain([scans], model_folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("no_drawing")
def test_a_disk_that_fills_up_leaves_a_table(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = module.write_bytes, []

    def write(path: Path, content: bytes) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        original(path, content)

    monkeypatch.setattr(module, "write_bytes", write)
    with pytest.raises(
        OSError, match="No space left on device; 1 of 10 inputs are explained, and their files"
    ):
        explain([scans / "flat"], model_folder, tmp_path / "out")
    assert [row["status"] for row in table(tmp_path / "out")] == ["ok"] + ["pending"] * 9
    monkeypatch.undo()
    # The table says whose the files are, so that they can be replaced.
    explain([scans / "flat"], model_folder, tmp_path / "out", limit=1, overwrite=True)
    assert len(list((tmp_path / "out").iterdir())) == 4
