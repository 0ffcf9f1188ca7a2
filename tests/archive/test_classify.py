from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow import MagicFlow
from fastflow.archive import classify as module
from fastflow.archive.classify import classify, describe, format_csv, gather, margin, parse_prior
from fastflow.data.manifest import Record, index_folder, write_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image
from fastflow.errors import CheckpointError, FastflowError, ManifestError
from fastflow.models.scoring import LabelScorer, from_uint8


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_rows_are_what_the_model_says(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    files = [scans / "flat/sub-000_T1w.nii.gz", scans / "striped/sub-103_T1w.nii.gz"]
    summary = classify(files, model_folder, tmp_path / "r.csv", prior=[0.9, 0.1])
    model = MagicFlow.load(model_folder)
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    rows = read(tmp_path / "r.csv")
    assert [row["path"] for row in rows] == [str(file) for file in files]
    for row, file in zip(rows, files, strict=True):
        x = from_uint8(torch.from_numpy(load_image(str(file), preprocess)))
        assert len(x) == 3
        with torch.no_grad():
            log_probs = torch.stack([model.log_prob(x, torch.full((3,), k)).double().sum() for k in range(2)])
        logits = log_probs / 5.0 + torch.tensor([0.9, 0.1]).log()
        assert [float(row["logp_flat"]), float(row["logp_striped"])] == pytest.approx(log_probs.tolist(), rel=1e-5)
        posterior = torch.softmax(logits, 0)
        assert [float(row["posterior_flat"]), float(row["posterior_striped"])] == pytest.approx(posterior.tolist(), abs=1e-4)
        assert row["predicted"] == ("flat", "striped")[int(logits.argmax())]
        assert float(row["margin"]) == pytest.approx(float((logits[0] - logits[1]).abs()), abs=1e-3)
        assert (row["status"], row["label"], row["error_code"]) == ("ok", "", "")
    assert summary.failed == 0


def test_a_bad_file_costs_its_row_and_no_other(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    good = sorted(scans.rglob("*.nii.gz"))
    truncated, text = tmp_path / "truncated.nii.gz", tmp_path / "notes.txt"
    truncated.write_bytes(good[0].read_bytes()[:200])
    text.write_text("not a scan")
    bad = {1: tmp_path / "nowhere.nii", 4: truncated, 5: text}
    mixed = list(good)
    for position, path in bad.items():
        mixed.insert(position, path)
    classify(good, model_folder, tmp_path / "good.csv", batch_size=7)
    seen: list[tuple[int, int]] = []
    summary = classify(mixed, model_folder, tmp_path / "mixed.csv", batch_size=7, progress=lambda *done: seen.append(done))
    rows = read(tmp_path / "mixed.csv")
    assert [row["path"] for row in rows] == [str(path) for path in mixed]
    assert [row for row in rows if row["status"] == "ok"] == read(tmp_path / "good.csv")
    errors = {i: row["error_code"] for i, row in enumerate(rows) if row["status"] == "error"}
    assert errors == {1: "missing", 4: "truncated", 5: "unsupported_format"}
    assert all(rows[i]["error_message"] and not rows[i]["predicted"] and not rows[i]["logp_flat"] for i in bad)
    assert summary.failed == 3
    assert seen == [(i, len(mixed)) for i in range(1, len(mixed) + 1)]


def test_a_file_that_goes_bad_moves_no_other_in_its_batch(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits of a float32 score depend on the place in the batch; here all of it does."""

    def by_place(scorer: LabelScorer, images: np.ndarray, batch_size: int) -> np.ndarray:
        assert len(images) == batch_size
        return np.arange(len(images))[:, None] * [1.0, 2.0] + images.sum(axis=(1, 2, 3))[:, None]

    monkeypatch.setattr("fastflow.archive.classify.score_slices", by_place)
    files = [tmp_path / path.name for path in sorted(scans.rglob("*.nii.gz"))]
    for target, source in zip(files, sorted(scans.rglob("*.nii.gz")), strict=True):
        target.write_bytes(source.read_bytes())
    classify(files, model_folder, tmp_path / "before.csv", batch_size=7)
    files[2].write_bytes(b"no longer a scan")
    classify(files, model_folder, tmp_path / "after.csv", batch_size=7)
    before, after = read(tmp_path / "before.csv"), read(tmp_path / "after.csv")
    assert after[2]["status"] == "error"
    assert [row for i, row in enumerate(after) if i != 2] == [row for i, row in enumerate(before) if i != 2]


def test_workers_change_nothing(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    classify([scans], model_folder, tmp_path / "one.csv")
    classify([scans], model_folder, tmp_path / "two.csv", workers=2)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert len(read(tmp_path / "one.csv")) == 20


def test_likelihood_that_is_not_finite_is_an_error_row(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_volume_is_nan(scorer: LabelScorer, images: np.ndarray, batch_size: int) -> np.ndarray:
        scores = np.zeros((len(images), 2))
        scores[4] = np.nan
        return scores

    monkeypatch.setattr(module, "score_slices", second_volume_is_nan)
    files = sorted(scans.rglob("*.nii.gz"))[:3]
    classify(files, model_folder, tmp_path / "r.csv")
    assert [row["status"] + row["error_code"] for row in read(tmp_path / "r.csv")] == ["ok", "errorlikelihood", "ok"]


def test_engine_and_precision_reach_the_scorer(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Noted(module.LabelScorer):
        def __init__(self, model: MagicFlow, precision: str, engine: str) -> None:
            made.append((precision, engine))
            super().__init__(model)

    monkeypatch.setattr(module, "LabelScorer", Noted)
    files = sorted(scans.rglob("*.nii.gz"))[:2]
    classify(files, model_folder, tmp_path / "r.csv", precision="mixed", engine="compile")
    monkeypatch.undo()
    # One scorer for the whole run, and a choice that does not exist is told before anything is read.
    assert made == [("mixed", "compile")]
    with pytest.raises(ValueError, match="engine must be one of auto, eager, compile, cuda_graph, got 'fast'"):
        classify(files, model_folder, tmp_path / "no.csv", engine="fast")
    assert not (tmp_path / "no.csv").exists()


def test_manifest_with_labels_and_splits(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    records = [Record(r.path, r.label, r.subject, "test" if i % 2 else "train") for i, r in enumerate(index_folder(scans))]
    records.append(Record(str(tmp_path / "gone.nii"), "flat", "sub-x", "test"))
    write_manifest(records, tmp_path / "m.csv")
    summary = classify([tmp_path / "m.csv"], model_folder, tmp_path / "r.csv", split="test")
    rows = read(tmp_path / "r.csv")
    assert [row["label"] for row in rows] == [r.label for r in records if r.split == "test"]
    labels, predictions = summary.labelled()
    assert labels.tolist() == [0] * 5 + [1] * 5
    text = describe(summary)
    assert "11 inputs, 10 classified, 1 failed" in text
    assert f"accuracy {(labels == predictions).mean():.3f}" in text
    with pytest.raises(ManifestError, match="no entry is in the split 'tset'"):
        classify([tmp_path / "m.csv"], model_folder, tmp_path / "r.csv", split="tset")


def test_inputs_that_name_nothing(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nothing to classify"):
        gather([])
    with pytest.raises(ManifestError, match=r"no \.nii, \.nii\.gz or \.png file"):
        gather([tmp_path])
    with pytest.raises(CheckpointError, match="not a model folder"):
        classify([tmp_path / "a.nii"], tmp_path, tmp_path / "r.csv")
    assert not (tmp_path / "r.csv").exists()


def test_same_input_twice_has_two_rows(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    file = scans / "flat/sub-000_T1w.nii.gz"
    classify([file, scans / "flat", file], model_folder, tmp_path / "r.csv")
    rows = read(tmp_path / "r.csv")
    assert len(rows) == 12
    assert rows[0] == rows[-1]


def test_bad_settings_are_named(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.csv"
    for prior in ([0.5, 0.4], [1.0], [1.5, -0.5]):
        with pytest.raises(ValueError, match="prior must be 2 probabilities"):
            classify([scans], model_folder, out, prior=prior)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        classify([scans], model_folder, out, batch_size=0)
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda, got 'tpu'"):
        classify([scans], model_folder, out, device="tpu")
    with pytest.raises(ValueError, match="numbers separated by commas, got 'a,b'"):
        parse_prior("a,b")
    assert not out.exists()


def test_model_without_preprocessing_is_refused(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    model = MagicFlow.load(model_folder)
    model.metadata.clear()
    model.save(tmp_path / "bare")
    with pytest.raises(FastflowError, match="does not say how its images were prepared"):
        classify([scans], tmp_path / "bare", tmp_path / "r.csv")


@pytest.mark.parametrize("name", ["=1+1.nii", "+x.nii", "-x.nii", "@x.nii", "\tx.nii"])
def test_formulas_are_disarmed(name: str) -> None:
    row = module.Row(Record(name, "=label", "s"), np.array([-1.0, -2.0]), np.array([0.7, 0.3]), 1.0)
    cells = list(csv.reader(format_csv([row], ["=a", "b"]).splitlines(keepends=True)))[1]
    assert cells[0] == f"'{name}"
    assert cells[4:6] == ["'=label", "'=a"]
    # Numbers stay numbers.
    assert cells[7:9] == ["-1", "-2"]


def test_odd_file_names_survive(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    names = ['quo"te.nii.gz', "new\nline.nii.gz", "bad\udcff.nii.gz", "re\rturn.nii.gz"]
    for name in names:
        shutil.copy(scans / "flat/sub-000_T1w.nii.gz", folder / name)
    summary = classify([folder], model_folder, tmp_path / "r.csv")
    assert summary.failed == 0
    assert {Path(row["path"]).name for row in read(tmp_path / "r.csv")} == {*names[:2], "bad\\udcff.nii.gz", "re\\rturn.nii.gz"}


@given(st.lists(st.floats(-1e5, 1e5), min_size=2, max_size=6), st.floats(0.1, 1000))
def test_margin_is_the_log_odds_of_the_best_two(log_probs: list[float], temperature: float) -> None:
    values = np.array(log_probs)
    best, second = sorted(values / temperature, reverse=True)[:2]
    assert margin(values, temperature) == pytest.approx(best - second)


def test_margin_does_not_saturate_and_knows_the_impossible() -> None:
    assert margin(np.array([0.0, -5000.0])) == 5000.0
    assert margin(np.array([0.0, -1.0]), prior=[1.0, 0.0]) == np.inf
    assert margin(np.array([0.0])) == np.inf
