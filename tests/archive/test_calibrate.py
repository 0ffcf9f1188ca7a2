"""Calibration of a model that is there, and the commands that decide by its read-out."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from fastflow import MagicFlow
from fastflow.archive.calibrate import calibrate_model, calibration_lines, drawn
from fastflow.archive.classify import classify
from fastflow.archive.explain import explain_inputs
from fastflow.archive.results import read_results
from fastflow.cli.main import app
from fastflow.data.manifest import Record, index_folder, split_by_subject, write_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image
from fastflow.decision import posterior
from fastflow.errors import ManifestError, OutputFolderError, ReadoutError
from fastflow.models.scoring import score_slices
from fastflow.readout import readout_of


@pytest.fixture(scope="module")
def records(scans: Path) -> list[Record]:
    return split_by_subject(index_folder(scans), {"train": 0.5, "val": 0.3, "test": 0.2})


@pytest.fixture(scope="module")
def calibrated(model_folder: Path, records: list[Record], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a read-out. Do not write into it."""
    folder = tmp_path_factory.mktemp("calibrated") / "model"
    shutil.copytree(model_folder, folder)
    calibrate_model(folder, records, overwrite=True, device="cpu")
    return folder


def test_calibration_is_kept_with_the_model(model_folder: Path, calibrated: Path) -> None:
    before, after = MagicFlow.load(model_folder), MagicFlow.load(calibrated)
    for one, other in zip(before.parameters(), after.parameters(), strict=True):
        assert bool((one == other).all())
    report = after.metadata["calibration"]
    assert (report["volumes"], report["training_volumes"], report["subjects"]) == (6, 10, 6)
    assert report["no_readout"] is None
    for name in ("argmax", "temperature", "gaussian"):
        assert set(report[name]) == {"balanced_accuracy", "ece", "nll"}
    readout = readout_of(after.metadata, ("flat", "striped"))
    assert readout is not None
    assert readout.slices == after.metadata["preprocess"]["slices"] and readout.slice_counts == (3, 3)
    assert sum(readout.volumes) == 16
    lines = calibration_lines(after.metadata)
    assert len(lines) == 4 and "Gaussian read-out" in lines[3]
    assert calibration_lines({}) == []


def test_rows_hold_the_decision_of_the_readout_and_the_argmax(
    scans: Path, calibrated: Path, tmp_path: Path
) -> None:
    files = [str(scans / "flat/sub-000_T1w.nii.gz"), str(scans / "striped/sub-103_T1w.nii.gz")]
    plain, by_readout = tmp_path / "argmax", tmp_path / "gaussian"
    classify(files, calibrated, plain, device="cpu")
    classify(files, calibrated, by_readout, device="cpu", readout="gaussian", prior=[0.7, 0.3])
    model = MagicFlow.load(calibrated)
    readout = readout_of(model.metadata, ("flat", "striped"))
    assert readout is not None
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    for file, row, other in zip(files, read_results(by_readout), read_results(plain), strict=True):
        log_probs = score_slices(model, load_image(file, preprocess))
        want = posterior(readout.discriminants(log_probs.mean(axis=0)), readout.temperature, [0.7, 0.3])
        np.testing.assert_allclose(
            [float(row["posterior_flat"]), float(row["posterior_striped"])], want, atol=1e-6
        )
        assert row["predicted"] == ("flat", "striped")[int(want.argmax())]
        tempered = log_probs.sum(axis=0) / model.temperature + np.log([0.7, 0.3])
        assert row["argmax"] == ("flat", "striped")[int(tempered.argmax())]
        assert row["readout"] == "gaussian"
        assert float(row["temperature"]) == pytest.approx(readout.temperature)
        assert (other["readout"], other["argmax"]) == ("argmax", other["predicted"])
        assert (row["logp_flat"], row["typicality"]) == (other["logp_flat"], other["typicality"])
    with pytest.raises(OutputFolderError, match="because readout was 'argmax' and is now 'gaussian'"):
        classify(files, calibrated, plain, device="cpu", readout="gaussian", resume=True)
    identity = json.loads((plain / "run.json").read_text())
    del identity["readout"]
    # An earlier version wrote no read-out down, and decided by argmax.
    (plain / "run.json").write_text(json.dumps(identity))
    assert classify(files, calibrated, plain, device="cpu", resume=True).new == 0


def test_other_slices_are_refused_or_told(scans: Path, calibrated: Path, tmp_path: Path) -> None:
    file = scans / "flat/sub-000_T1w.nii.gz"
    with pytest.raises(ReadoutError, match=r"fitted to slices 'center\+-1', not to 'center'"):
        classify([file], calibrated, tmp_path / "a", device="cpu", readout="gaussian", slices="center")
    with pytest.warns(UserWarning, match="the temperature was fitted to sums over"):
        classify([file], calibrated, tmp_path / "b", device="cpu", slices="center")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        classify([file], calibrated, tmp_path / "c", device="cpu")


def test_a_model_without_a_readout_says_how_to_get_one(
    scans: Path, model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ReadoutError, match="the model has no read-out; fit one with `fastflow calibrate"):
        classify([scans / "flat"], model_folder, tmp_path / "r", device="cpu", readout="gaussian")
    with pytest.raises(ValueError, match="readout must be one of argmax, gaussian, got 'lda'"):
        classify([scans / "flat"], model_folder, tmp_path / "r", device="cpu", readout="lda")
    assert not (tmp_path / "r").exists()


def test_explanations_follow_the_readout(scans: Path, calibrated: Path, tmp_path: Path) -> None:
    file = scans / "striped/sub-103_T1w.nii.gz"
    (row,) = explain_inputs([file], calibrated, tmp_path / "e", device="cpu", readout="gaussian").rows
    model = MagicFlow.load(calibrated)
    readout = readout_of(model.metadata, ("flat", "striped"))
    assert readout is not None
    pixels = load_image(str(file), Preprocess.from_dict(model.metadata["preprocess"]))[1:2]
    log_probs = score_slices(model, pixels)[0]
    label = int(readout.discriminants(log_probs).argmax())
    assert (row["predicted"], row["readout"]) == (("flat", "striped")[label], "gaussian")
    assert row["argmax"] == ("flat", "striped")[int(log_probs.argmax())]
    assert "readout_slices" in row["error_code"] and row["status"] == "flagged"
    with np.load(tmp_path / "e" / f"{row['name']}.npz") as arrays:
        assert int(arrays["label"]) == label


def test_few_subjects_leave_a_reason(model_folder: Path, records: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    few = [next(r for r in records if r.split == "val" and r.label == name) for name in ("flat", "striped")]
    model, errors = calibrate_model(folder, few, volumes=0, overwrite=True, device="cpu")
    assert not errors and "readout" not in model.metadata
    assert "has volumes of 1 subjects" in model.metadata["calibration"]["no_readout"]
    assert "has volumes of 1 subjects" in calibration_lines(model.metadata)[-1]
    with pytest.raises(ReadoutError, match="no read-out: class 'flat' has volumes of 1 subjects"):
        classify([few[0].path], folder, tmp_path / "r", device="cpu", readout="gaussian")


def test_bad_input_is_told_and_the_model_stays(
    model_folder: Path, records: list[Record], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    before = (folder / "config.json").read_bytes()
    with pytest.raises(OutputFolderError, match="--overwrite"):
        calibrate_model(folder, records, device="cpu")
    for changed, message in (
        ([r for r in records if r.split != "val"], "no labelled entry has the split 'val'"),
        ([dataclasses.replace(r, label="dotted") for r in records], "the model knows flat, striped"),
        ([dataclasses.replace(r, subject="s") for r in records], "subject 's' is in the splits"),
        ([dataclasses.replace(r, path=r.path + "x") for r in records], "none of the 6 validation files"),
    ):
        with pytest.raises(ManifestError, match=message):
            calibrate_model(folder, changed, overwrite=True, device="cpu")
    assert (folder / "config.json").read_bytes() == before


def test_command(model_folder: Path, records: list[Record], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    write_manifest(records, tmp_path / "m.csv")
    run = CliRunner().invoke
    arguments = ["calibrate", str(folder), str(tmp_path / "m.csv"), "--device", "cpu"]
    assert run(app, arguments).exit_code == 2
    done = run(app, [*arguments, "--overwrite", "--slices", "center"])
    assert done.exit_code == 0, done.output
    assert "Gaussian read-out" in done.stdout
    assert MagicFlow.load(folder).metadata["readout"]["slices"] == "center"


def test_training_volumes_are_drawn_by_the_seed() -> None:
    labels = np.array([0] * 9 + [1] * 3 + [-1])
    chosen = drawn(labels, 4, 0)
    assert np.bincount(labels[chosen]).tolist() == [4, 3]
    assert np.array_equal(chosen, drawn(labels, 4, 0)) and np.array_equal(chosen, np.sort(chosen))
    assert not np.array_equal(chosen, drawn(labels, 4, 1))
    assert len(drawn(np.zeros(0, dtype=np.int64), 4, 0)) == 0
