from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastflow import MagicFlow
from fastflow.archive import results
from fastflow.archive.classify import classify, describe, parse_prior, tally
from fastflow.archive.inputs import gather
from fastflow.archive.journal import KEY_BYTES, Journal
from fastflow.archive.results import read_results
from fastflow.data.manifest import Record, index_folder, write_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image
from fastflow.errors import (
    CheckpointError,
    FastflowError,
    ManifestError,
    RunStoppedError,
)
from fastflow.models.scoring import LabelScorer, from_uint8

pytestmark = pytest.mark.usefixtures("loaded_once")


def read(folder: Path) -> list[dict[str, str]]:
    """The rows of a run without the one column that no two runs share."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_results(folder)]


def test_rows_are_what_the_model_says(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    files = [scans / "flat/sub-000_T1w.nii.gz", scans / "striped/sub-103_T1w.nii.gz"]
    summary = classify(files, model_folder, tmp_path / "r", prior=[0.9, 0.1])
    model = MagicFlow.load(model_folder)
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    rows = read(tmp_path / "r")
    assert [row["path"] for row in rows] == [str(file) for file in files]
    for row, file in zip(rows, files, strict=True):
        x = from_uint8(torch.from_numpy(load_image(str(file), preprocess)))
        assert len(x) == 3
        with torch.no_grad():
            log_probs = torch.stack([model.log_prob(x, torch.full((3,), k)).double().sum() for k in range(2)])
        logits = log_probs / 5.0 + torch.tensor([0.9, 0.1]).log()
        assert [float(row["logp_flat"]), float(row["logp_striped"])] == pytest.approx(
            log_probs.tolist(), rel=1e-5
        )
        posterior = torch.softmax(logits, 0)
        assert [float(row["posterior_flat"]), float(row["posterior_striped"])] == pytest.approx(
            posterior.tolist(), abs=1e-4
        )
        assert row["predicted"] == ("flat", "striped")[int(logits.argmax())]
        assert float(row["margin"]) == pytest.approx(float((logits[0] - logits[1]).abs()), abs=1e-3)
        assert (row["status"], row["label"], row["error_code"]) == ("ok", "", "")
    assert summary.failed == 0


def test_a_bad_file_costs_its_row_and_no_other(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    good = sorted(scans.rglob("*.nii.gz"))[:4]
    truncated, text = tmp_path / "truncated.nii.gz", tmp_path / "notes.txt"
    truncated.write_bytes(good[0].read_bytes()[:200])
    text.write_text("not a scan")
    bad = {1: tmp_path / "nowhere.nii", 4: truncated, 5: text}
    mixed = list(good)
    for position, path in bad.items():
        mixed.insert(position, path)
    classify(good, model_folder, tmp_path / "good", batch_size=7)
    seen: list[tuple[int, int | None, int]] = []
    summary = classify(
        mixed, model_folder, tmp_path / "mixed", batch_size=7, progress=lambda *done: seen.append(done)
    )
    rows = read(tmp_path / "mixed")
    assert [row["path"] for row in rows] == [str(path) for path in mixed]
    assert [row for row in rows if row["status"] == "ok"] == read(tmp_path / "good")
    errors = {i: row["error_code"] for i, row in enumerate(rows) if row["status"] == "error"}
    assert errors == {1: "missing", 4: "truncated", 5: "unsupported_format"}
    assert all(
        rows[i]["error_message"] and not rows[i]["predicted"] and not rows[i]["logp_flat"] for i in bad
    )
    assert summary.failed == 3
    # The total is counted beside the run and is None until then.
    assert [done for done, *_ in seen] == sorted({done for done, *_ in seen})
    assert seen[-1][0] == len(mixed)
    assert seen[-1][2] == 3
    assert {total for _, total, _ in seen} <= {None, len(mixed)}
    assert summary.counts == {"ok": len(good), "flagged": 0, "error": 3}
    assert summary.codes == {"missing": 1, "truncated": 1, "unsupported_format": 1}
    assert summary.errors[0] == f"{tmp_path / 'nowhere.nii'}: there is no such file [missing]"


def test_a_file_that_goes_bad_moves_no_other_in_its_batch(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits of a float32 score depend on the place in the batch; here all of it does."""

    def by_place(scorer: LabelScorer, images: np.ndarray, batch_size: int) -> np.ndarray:
        assert len(images) == batch_size
        return np.arange(len(images))[:, None] * [1.0, 2.0] + images.sum(axis=(1, 2, 3))[:, None]

    monkeypatch.setattr("fastflow.models.scoring.score_slices", by_place)
    sources = sorted(scans.rglob("*.nii.gz"))[:7]
    files = [tmp_path / path.name for path in sources]
    for target, source in zip(files, sources, strict=True):
        target.write_bytes(source.read_bytes())
    classify(files, model_folder, tmp_path / "before", batch_size=7)
    files[2].write_bytes(b"no longer a scan")
    classify(files, model_folder, tmp_path / "after", batch_size=7)
    before, after = read(tmp_path / "before"), read(tmp_path / "after")
    assert after[2]["status"] == "error"
    assert [row for i, row in enumerate(after) if i != 2] == [row for i, row in enumerate(before) if i != 2]


def test_workers_change_nothing(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    classify([scans / "flat"], model_folder, tmp_path / "one", workers=1)
    classify([scans / "flat"], model_folder, tmp_path / "two", workers=2)
    assert read(tmp_path / "one") == read(tmp_path / "two")
    assert len(read(tmp_path / "one")) == 10


def test_likelihood_that_is_not_finite_is_an_error_row(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_volume_is_nan(scorer: LabelScorer, images: np.ndarray, batch_size: int) -> np.ndarray:
        scores = np.zeros((len(images), 2))
        scores[4] = np.nan
        return scores

    monkeypatch.setattr("fastflow.models.scoring.score_slices", second_volume_is_nan)
    files = sorted(scans.rglob("*.nii.gz"))[:3]
    classify(files, model_folder, tmp_path / "r")
    assert [row["status"] + row["error_code"] for row in read(tmp_path / "r")] == [
        "ok",
        "errorlikelihood",
        "ok",
    ]


def test_engine_and_precision_reach_the_scorer(
    scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Noted(LabelScorer):
        def __init__(self, model: MagicFlow, precision: str, engine: str) -> None:
            made.append((precision, engine))
            super().__init__(model)

    monkeypatch.setattr("fastflow.models.scoring.LabelScorer", Noted)
    files = sorted(scans.rglob("*.nii.gz"))[:2]
    classify(files, model_folder, tmp_path / "r", precision="mixed", engine="compile")
    monkeypatch.undo()
    # One scorer for the whole run, and a choice that does not exist is told before anything is read.
    assert made == [("mixed", "compile")]
    with pytest.raises(
        ValueError, match="engine must be one of auto, eager, compile, cuda_graph, got 'fast'"
    ):
        classify(files, model_folder, tmp_path / "no", engine="fast")
    assert not (tmp_path / "no").exists()


def test_manifest_with_labels_and_splits(few_scans: Path, model_folder: Path, tmp_path: Path) -> None:
    records = [
        Record(r.path, r.label, r.subject, "test" if i % 2 else "train")
        for i, r in enumerate(index_folder(few_scans))
    ]
    records.append(Record(str(tmp_path / "gone.nii"), "flat", "sub-x", "test"))
    write_manifest(records, tmp_path / "m.csv")
    summary = classify([tmp_path / "m.csv"], model_folder, tmp_path / "r", split="test")
    rows = read(tmp_path / "r")
    assert [row["label"] for row in rows] == [r.label for r in records if r.split == "test"]
    labels, predictions = summary.labelled()
    assert labels.tolist() == [0, 1, 1]
    text = describe(summary)
    assert "4 inputs, 3 classified, 1 failed" in text
    assert f"accuracy {(labels == predictions).mean():.3f}" in text
    with pytest.raises(ManifestError, match="no entry is in the split 'tset'"):
        classify([tmp_path / "m.csv"], model_folder, tmp_path / "r", split="tset")


def test_what_is_passed_over_is_counted(few_scans: Path, model_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "d"
    shutil.copytree(few_scans, root)
    (root / "flat/sub-000_T1w.nii.gz").rename(root / "flat/sub-000_T1w.NII.GZ")
    for name in ("a.dcm", "b.DCM", "c.hdr", "notes.txt"):
        (root / name).touch()
    summary = classify([root], model_folder, tmp_path / "r")
    first, second = describe(summary).splitlines()[:2]
    assert first.endswith(
        "6 inputs, 6 classified, 0 failed; 3 files of other endings were passed over (.dcm 2, .hdr 1)"
    )
    assert second == "9 files found: 6 used, 3 left out (.dcm 2, .hdr 1)"
    counts = json.loads((tmp_path / "r/summary.json").read_text())["inventory"]
    assert (counts["found"], counts["used"], counts["left_out"]) == (9, 6, {".dcm": 2, ".hdr": 1})


def test_labels_are_compared_in_one_form(few_scans: Path, model_folder: Path, tmp_path: Path) -> None:
    files = sorted(few_scans.rglob("*.nii.gz"))
    rows = "".join(
        f"{file};{label};{split}\n"
        for file, label, split in zip(
            files,
            [" flat", "flat ", "n/a", "striped", "NaN", ""],
            ["valid", "Val", "dev", *["train"] * 3],
            strict=True,
        )
    )
    (tmp_path / "m.csv").write_text("File; Class; Set\n" + rows)
    summary = classify([tmp_path / "m.csv"], model_folder, tmp_path / "r", split="Validation")
    assert [row["label"] for row in read(tmp_path / "r")] == ["flat", "flat", ""]
    assert summary.labelled()[0].tolist() == [0, 0]
    assert summary.inventory.left_out == {"other_split": 3}
    assert "6 files found: 3 used, 3 left out (other_split 3)" in describe(summary)


def test_labels_are_counted_for_models_with_names_of_another_form(tmp_path: Path) -> None:
    rows = [
        ("cafe\u0301", "old  age"),
        ("caf\u00e9", "cafe\u0301"),
        (" old age", "old  age"),
        ("n/a", "old  age"),
    ]
    journal = Journal.open(tmp_path / "journal.jsonl")
    journal.append(
        (bytes(KEY_BYTES), {"status": "ok", "label": label, "predicted": predicted})
        for label, predicted in rows
    )
    _, _, confusion = tally(journal, ["cafe\u0301", "old  age"])
    assert confusion.tolist() == [[1, 1], [0, 1]]


def test_inputs_that_name_nothing(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="nothing to classify"):
        gather([])
    with pytest.raises(ManifestError, match=r"no \.nii, \.nii\.gz, \.mgz, \.mgh, \.png file"):
        gather([tmp_path])
    with pytest.raises(ManifestError, match=r"m\.txt: a manifest ends in \.csv, \.tsv or \.jsonl"):
        classify([], model_folder, tmp_path / "r", manifest=tmp_path / "m.txt")
    with pytest.raises(CheckpointError, match="not a model folder"):
        classify([tmp_path / "a.nii"], tmp_path, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_same_input_twice_has_two_rows(few_scans: Path, model_folder: Path, tmp_path: Path) -> None:
    file = few_scans / "flat/sub-000_T1w.nii.gz"
    classify([file, few_scans / "flat", file], model_folder, tmp_path / "r")
    rows = read(tmp_path / "r")
    assert len(rows) == 5
    assert rows[0] == rows[-1]


def test_bad_settings_are_named(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    for prior in ([0.5, 0.4], [1.0], [1.5, -0.5]):
        with pytest.raises(ValueError, match="prior must be 2 probabilities"):
            classify([scans], model_folder, out, prior=prior)
    for name, value, accepted in [
        ("on_error", "skip", "row or fail"),
        ("max_errors", -1, "not be negative"),
        ("format", "xlsx", "one of csv, parquet"),
        ("id_from", "name", "one of relpath, hash"),
        ("combine", "max", "one of sum, mean"),
        ("shard", "0/4", "i/N with 1 <= i <= N, got 0/4"),
        ("shard", "5", "i/N with 1 <= i <= N, got '5'"),
        ("slices", "middle", "'center'"),
        ("workers", 0, "at least 1, got 0"),
        ("shard_rows", 0, "at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=f"{name} must .*{re.escape(accepted)}"):
            classify([scans], model_folder, out, **{name: value})
    with pytest.raises(ValueError, match="overwrite starts anew"):
        classify([scans], model_folder, out, overwrite=True, retry_failed=True)
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
        classify([scans], tmp_path / "bare", tmp_path / "r")


def test_odd_file_names_survive(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a,b"
    folder.mkdir()
    names = ['quo"te.nii.gz', "new\nline.nii.gz", "bad\udcff.nii.gz", "re\rturn.nii.gz"]
    for name in names:
        shutil.copy(scans / "flat/sub-000_T1w.nii.gz", folder / name)
    summary = classify([folder], model_folder, tmp_path / "r")
    assert summary.failed == 0
    assert {Path(row["path"]).name for row in read(tmp_path / "r")} == {
        *names[:2],
        "bad\\udcff.nii.gz",
        "re\\rturn.nii.gz",
    }


def test_volumes_outside_of_what_is_typical_are_flagged(
    scans: Path, model_folder: Path, tmp_path: Path
) -> None:
    files = sorted(scans.rglob("*.nii.gz"))[:4]
    classify(files, model_folder, tmp_path / "plain")
    # Of the model's own values only the highest counts, a slice.
    each = [max(float(row["logp_flat"]), float(row["logp_striped"])) / 3 for row in read(tmp_path / "plain")]
    assert all(row["typicality"] == "" and row["status"] == "ok" for row in read(tmp_path / "plain"))
    model = MagicFlow.load(model_folder)
    spread = np.linspace(min(each) - 0.5, min(each) + 0.5, 999)
    model.metadata["validation"] = {"slices": "center+-1", "log_prob": spread.tolist()}
    model.save(tmp_path / "model")
    summary = classify(files, tmp_path / "model", tmp_path / "r")
    for value, row in zip(each, read(tmp_path / "r"), strict=True):
        rank = min((spread <= value).sum(), (spread >= value).sum())
        assert float(row["typicality"]) == pytest.approx(min(1.0, 2 * (1 + rank) / 1000))
        flagged = float(row["typicality"]) < 0.01
        assert row["status"] == ("flagged" if flagged else "ok")
        assert row["error_code"] == ("atypical" if flagged else "")
    assert 1 <= summary.counts["flagged"] <= 3
    assert summary.codes == {"atypical": summary.counts["flagged"]}
    # Likelihoods of other slices are not compared.
    classify(files, tmp_path / "model", tmp_path / "other", slices="4")
    assert all(row["typicality"] == "" for row in read(tmp_path / "other"))


def test_slices_and_how_they_are_combined(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    file = scans / "flat/sub-000_T1w.nii.gz"
    for slices in ("3", "4", "5", "center+-1"):
        classify([file], model_folder, tmp_path / slices, slices=slices)
    classify([file], model_folder, tmp_path / "mean", combine="mean")
    single = np.array(
        [[float(read(tmp_path / name)[0][f"logp_{k}"]) for k in ("flat", "striped")] for name in "345"]
    )
    for name, expected in (("center+-1", single.sum(axis=0)), ("mean", single.mean(axis=0))):
        row = read(tmp_path / name)[0]
        assert [float(row["logp_flat"]), float(row["logp_striped"])] == pytest.approx(
            expected.tolist(), rel=1e-8
        )
        logits = expected / 5.0
        assert float(row["posterior_flat"]) == pytest.approx(
            float(np.exp(logits[0]) / np.exp(logits).sum()), abs=1e-6
        )
    # Bits per dimension are of a slice, however many there are.
    bits = [float(read(tmp_path / name)[0]["bits_per_dim"]) for name in ("3", "4", "5", "center+-1", "mean")]
    assert bits[3] == pytest.approx(np.mean(bits[:3]), rel=1e-6)
    assert bits[3] == bits[4]


def test_the_folder_says_what_was_done(scans: Path, model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    summary = classify(
        [scans / "flat", tmp_path / "gone.nii"], model_folder, out, prior=[0.9, 0.1], workers=2
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "journal.jsonl",
        "results-00000.csv",
        "run.json",
        "summary.json",
    ]
    document = json.loads((out / "summary.json").read_text())
    assert document["state"] == "finished"
    assert document["status"] == {"ok": 10, "flagged": 0, "error": 1}
    assert document["codes"] == {"missing": 1}
    assert document["files"] == ["results-00000.csv"]
    configuration = document["configuration"]
    assert configuration["prior"] == [0.9, 0.1]
    assert configuration["workers"] == 2
    assert configuration["preprocess"]["slices"] == "center+-1"
    assert configuration["model_hash"] == read(out)[0]["model_hash"]
    assert {"fastflow", "torch", "numpy", "nibabel", "python"} == set(document["versions"])
    rates = document["rates"]
    assert rates["bound_by"] in ("reading", "scoring", "writing")
    assert all(rates[f"{name}files_per_second"] > 0 for name in ("", "reading_", "scoring_", "writing_"))
    assert read(out)[0]["prior"] == "0.9 0.1"
    assert summary.files == (str(out / "results-00000.csv"),)


def test_errors_beyond_the_limit_stop_the_run_and_keep_its_rows(
    few_scans: Path, model_folder: Path, tmp_path: Path
) -> None:
    flat, striped = (sorted((few_scans / name).iterdir()) for name in ("flat", "striped"))
    inputs = [*flat, tmp_path / "a.nii", tmp_path / "b.nii", *striped[:2]]
    with pytest.raises(
        RunStoppedError, match=r"2 inputs failed, more than the 1 allowed; the last: .*b\.nii: there is"
    ):
        classify(inputs, model_folder, tmp_path / "r", max_errors=1, batch_size=3)
    assert len(read(tmp_path / "r")) == 5
    assert json.loads((tmp_path / "r/summary.json").read_text())["state"] == "stopped"
    with pytest.raises(RunStoppedError, match="1 inputs failed"):
        classify(inputs, model_folder, tmp_path / "one", on_error="fail", batch_size=3)
    assert len(read(tmp_path / "one")) == 4
    summary = classify(inputs, model_folder, tmp_path / "r", resume=True, batch_size=3)
    assert (summary.total, summary.new, summary.failed) == (7, 2, 2)
    classify(inputs, model_folder, tmp_path / "whole")
    assert read(tmp_path / "r") == read(tmp_path / "whole")


def test_results_by_hash_hold_no_name(few_scans: Path, model_folder: Path, tmp_path: Path) -> None:
    classify([few_scans], model_folder, tmp_path / "names")
    classify([few_scans], model_folder, tmp_path / "hashes", id_from="hash")
    for path in (tmp_path / "hashes").iterdir():
        assert b"sub-0" not in path.read_bytes(), path
    names, hashes = read(tmp_path / "names"), read(tmp_path / "hashes")
    assert names[0]["path"] == "flat/sub-000_T1w.nii.gz"
    assert all(re.fullmatch("[0-9a-f]{32}", row.pop("path")) for row in hashes)
    for row in names:
        del row["path"]
    assert names == hashes


def test_options_by_position_still_work_and_are_told(
    few_scans: Path, model_folder: Path, tmp_path: Path
) -> None:
    file = few_scans / "flat/sub-000_T1w.nii.gz"
    with pytest.warns(DeprecationWarning, match="give prior, batch_size by name"):
        classify([file], model_folder, tmp_path / "old", [0.9, 0.1], 4)
    classify([file], model_folder, tmp_path / "new", prior=[0.9, 0.1], batch_size=4)
    assert read(tmp_path / "old") == read(tmp_path / "new")
    with (
        pytest.raises(TypeError, match="multiple values for argument 'prior'"),
        pytest.warns(DeprecationWarning, match="by name"),
    ):
        classify([file], model_folder, tmp_path / "r", [0.9, 0.1], prior=None)
    with pytest.raises(TypeError, match="at most 11 arguments by position"):
        classify([file], model_folder, tmp_path / "r", *[None] * 9)
    with pytest.raises(TypeError, match="'speed'"):
        classify([file], model_folder, tmp_path / "r", speed="high")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("classify", "Clock", "Timings"),
        ("classify", "Scored", "ScoredInput"),
        ("journal", "Done", "FinishedInputs"),
    ],
)
def test_old_names_still_work_and_are_told(module: str, old: str, new: str) -> None:
    found = importlib.import_module(f"fastflow.archive.{module}")
    with pytest.warns(DeprecationWarning, match=new):
        assert getattr(found, old) is getattr(found, new)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = found.Nothing


def test_the_old_module_of_result_files_still_works_and_is_told() -> None:
    sys.modules.pop("fastflow.archive.shards", None)
    with pytest.warns(DeprecationWarning, match=r"is now fastflow\.archive\.results"):
        from fastflow.archive import shards
    assert shards.read_results is read_results
    assert (shards.Shards, shards.SHARD_ROWS) == (results.ResultFiles, 100_000)
