from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastflow.archive.classify import classify
from fastflow.archive.evaluate import Evaluation, evaluate
from fastflow.archive.evaluate_options import EvaluateOptions
from fastflow.archive.results import read_results
from fastflow.archive.scored import open_results
from fastflow.data.manifest import Record, index_folder, write_manifest
from fastflow.data.preprocess import GREY_LEVEL
from fastflow.decision import posterior
from fastflow.errors import CheckpointError, FastflowError, ManifestError, OutputFolderError
from fastflow.readout import GaussianReadout

pytestmark = pytest.mark.usefixtures("matrix")

# Few resamples are quick.
FEW = {"resamples": 25}


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages take longer than all else, and one test looks at them."""
    monkeypatch.setattr("fastflow.archive.evaluation_files.write_evaluation", lambda path, document: None)


@pytest.fixture
def records(scans: Path) -> list[Record]:
    """Six files of each class: three to train on, two to test, one of another split."""
    splits = ["train"] * 3 + ["test"] * 2 + ["other"]
    return [
        Record(record.path, record.label, record.subject, splits[i % 10])
        for i, record in enumerate(index_folder(scans))
        if i % 10 < 6
    ]


@pytest.fixture
def manifest(records: list[Record], tmp_path: Path) -> Path:
    write_manifest(records, tmp_path / "m.csv")
    return tmp_path / "m.csv"


def run(*arguments: Any, **options: Any) -> Evaluation:
    return evaluate(*arguments, options=EvaluateOptions(**{**FEW, **options}))


def test_a_model_is_scored_and_its_figures_are_those_of_its_rows(
    model_folder: Path, manifest: Path, tmp_path: Path
) -> None:
    done = run(model_folder, manifest, tmp_path / "out")
    rows = list(read_results(tmp_path / "out" / "results" / "test"))
    one = done.document["sets"]["test"]
    assert (len(rows), one["volumes"], one["subjects"], done.failed) == (4, 4, 4, 0)
    figures = one["decisions"]["argmax"]["figures"]
    right = [row["label"] == row["predicted"] for row in rows]
    assert figures["accuracy"]["value"] == np.mean(right)
    # The temperature is 5. One of the two posteriors rounds to 0 where the model is wrong.
    logits = [(float(row["logp_flat"]) / 5, float(row["logp_striped"]) / 5, row["label"]) for row in rows]
    nll = [
        np.logaddexp(flat, striped) - (flat if label == "flat" else striped)
        for flat, striped, label in logits
    ]
    assert figures["nll"]["value"] == pytest.approx(np.mean(nll))
    # Three slices of 256 pixels, whose log-likelihoods are summed.
    nats = np.array([float(row[f"logp_{row['label']}"]) for row in rows]) / 3
    bits = -(nats / 256 + math.log(GREY_LEVEL)) / math.log(2)
    assert figures["bits_per_dim"]["value"] == pytest.approx(bits.mean())
    predicted = np.mean([float(row["bits_per_dim"]) for row in rows])
    assert figures["bits_per_dim_predicted"]["value"] == pytest.approx(predicted)
    # The scans differ in brightness, and the histogram sees it.
    assert one["decisions"]["histogram"]["figures"]["accuracy"]["value"] == 1.0
    assert done.document["baselines"]["training_volumes"] == {"flat": 3, "striped": 3}
    difference = one["differences"]["histogram"]
    assert difference["against"] == "argmax"
    assert difference["accuracy"]["value"] == pytest.approx(1.0 - np.mean(right))
    for name, column in (("metrics.csv", "accuracy"), ("classes.csv", "recall")):
        with (tmp_path / "out" / name).open(newline="") as stream:
            assert float(next(csv.DictReader(stream))[column]) >= 0.0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r'src="data:[^"]*"|http-equiv', "", page)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == done.document


@pytest.mark.usefixtures("no_pictures")
def test_results_are_evaluated_without_scoring(
    model_folder: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = run(model_folder, manifest, tmp_path / "out")
    classify([manifest], model_folder, tmp_path / "all")
    classify([manifest], model_folder, tmp_path / "hashed", id_from="hash")
    monkeypatch.setattr("fastflow.archive.evaluate.classify", None)
    for folder, given in (("all", None), ("all", manifest), ("hashed", manifest)):
        again = run(tmp_path / folder, given, tmp_path / "again", overwrite=True)
        assert again.document["sets"] == {
            "test": scored.document["sets"]["test"]
            | {"inventory": again.document["sets"]["test"]["inventory"]}
        }
        assert again.document["sets"]["test"]["inventory"]["left_out"] == {"other_split": 8}
    both = run(tmp_path / "all", manifest, tmp_path / "both", splits=("test", "other"))
    assert {name: one["volumes"] for name, one in both.document["sets"].items()} == {"test": 4, "other": 2}
    everything = run(tmp_path / "all", manifest, tmp_path / "e", splits=("all",))
    assert everything.document["sets"]["all"]["volumes"] == 12
    assert "learned from" in everything.document["baselines"]["missing"]
    manifest.unlink()
    with pytest.raises(FastflowError, match="subjects are not known: name the manifest"):
        run(tmp_path / "hashed", None, tmp_path / "x")
    alone = run(tmp_path / "all", None, tmp_path / "alone")
    assert alone.document["sets"]["all"]["volumes"] == 12
    assert any("subjects are read from the names" in line for line in alone.warnings)


@pytest.mark.usefixtures("no_pictures")
def test_rows_that_are_left_out_are_counted_by_reason(
    records: list[Record], model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.nii.gz").write_bytes(b"no scan")
    source = records[5].path
    for name in ("dotted", "unknown"):
        shutil.copy(source, tmp_path / f"{name}.nii.gz")
    extra = [
        Record(str(tmp_path / "bad.nii.gz"), "flat", "sub-bad", "test"),
        Record(str(tmp_path / "dotted.nii.gz"), "dotted", "sub-dotted", "test"),
        Record(str(tmp_path / "unknown.nii.gz"), None, "sub-unknown", "test"),
    ]
    striped = [record for record in records if record.label == "striped"]
    write_manifest([*striped, records[3], *extra], tmp_path / "m.csv")
    done = run(model_folder, tmp_path / "m.csv", tmp_path / "out", baselines=False)
    one = done.document["sets"]["test"]
    left_out = one["inventory"]["left_out"]
    assert (left_out.pop("unknown_label"), left_out.pop("no_label"), one["volumes"]) == (1, 1, 3)
    assert (sum(left_out.values()), done.failed) == (1, 1)
    assert one["one_subject"] == ["flat"]
    text = "\n".join(done.warnings)
    for part in ("dotted 1; the model knows flat, striped", "class 'flat': there is one subject"):
        assert part in text
    assert "no baseline stands beside the accuracy" in text
    parts = [one["flags"][name]["volumes"] for name in ("flagged", "not_flagged")]
    assert sum(parts) == 3


@pytest.mark.usefixtures("no_pictures")
def test_an_evaluation_goes_on_or_is_replaced_on_demand(
    model_folder: Path, manifest: Path, tmp_path: Path
) -> None:
    first = run(model_folder, manifest, tmp_path / "out", baselines=False)
    with pytest.raises(OutputFolderError, match="holds an earlier evaluation; go on with it"):
        run(model_folder, manifest, tmp_path / "out")
    (tmp_path / "out" / "metrics.json").unlink()
    journal = tmp_path / "out" / "results" / "test" / "journal.jsonl"
    before = journal.stat().st_mtime_ns
    again = run(model_folder, manifest, tmp_path / "out", baselines=False, resume=True)
    assert journal.stat().st_mtime_ns == before
    assert again.document["sets"] == first.document["sets"]
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"holds other files, such as 'thesis.txt'"):
        run(model_folder, manifest, tmp_path / "out", overwrite=True)


@pytest.mark.usefixtures("no_pictures")
def test_another_rule_than_argmax_stands_beside_it(
    model_folder: Path, manifest: Path, tmp_path: Path
) -> None:
    classify([manifest], model_folder, tmp_path / "r", prior=[0.001, 0.999])
    document = json.loads((tmp_path / "r" / "run.json").read_text())
    (tmp_path / "r" / "run.json").write_text(json.dumps(document | {"prior": None, "readout": "tilted"}))
    one = run(tmp_path / "r", manifest, tmp_path / "out", baselines=False).document["sets"]["test"]
    assert list(one["decisions"]) == ["argmax", "tilted"]
    plain, tilted = (one["decisions"][name]["figures"]["nll"]["value"] for name in one["decisions"])
    assert plain != tilted
    assert one["differences"]["tilted"]["nll"]["value"] == pytest.approx(tilted - plain)


@pytest.mark.usefixtures("no_pictures")
def test_parts_of_a_run_are_evaluated_together(model_folder: Path, manifest: Path, tmp_path: Path) -> None:
    for i in (1, 2):
        classify([manifest], model_folder, tmp_path / "parts", shard=f"{i}/2")
    done = run(tmp_path / "parts", manifest, tmp_path / "out", baselines=False)
    assert done.document["sets"]["test"]["volumes"] == 4
    shutil.rmtree(tmp_path / "parts" / "shard-00001-of-00002")
    with pytest.raises(OutputFolderError, match="1 of 2 parts are missing, such as --shard 1/2"):
        open_results(tmp_path / "parts")


def test_bad_input_is_named_before_anything_is_scored(
    records: list[Record],
    model_folder: Path,
    manifest: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastflow.archive.evaluate.classify", None)
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=r"must be a model folder .* it is none of these"):
        run(tmp_path, manifest, out)
    with pytest.raises(ValueError, match="MANIFEST is needed"):
        run(model_folder, None, out)
    with pytest.raises(ManifestError, match="no entry is in the split 'tset'; its splits are train 6"):
        run(model_folder, manifest, out, splits=("tset",))
    twice = [*records, Record(str(tmp_path / "b.nii"), "flat", records[0].subject, "test")]
    write_manifest(twice, tmp_path / "twice.csv")
    with pytest.raises(ManifestError, match=f"subject '{records[0].subject}' is in the splits"):
        run(model_folder, tmp_path / "twice.csv", out)
    learned = [Record(str(tmp_path / "c.nii"), "flat", records[3].subject, "train")]
    write_manifest(learned, tmp_path / "train.csv")
    with pytest.raises(ManifestError, match=f"subject '{records[3].subject}' is in the splits"):
        run(model_folder, manifest, out, train_manifest=tmp_path / "train.csv")
    assert not out.exists()
    for options, message in (
        ({"resamples": 0}, "resamples must be at least 1"),
        ({"resume": True, "overwrite": True}, "give one of them"),
        ({"device": "tpu"}, "device must be"),
    ):
        with pytest.raises(ValueError, match=message):
            EvaluateOptions(**options)


@pytest.mark.usefixtures("no_pictures")
def test_the_read_out_of_the_model_stands_beside_the_argmax(
    model_folder: Path, manifest: Path, tmp_path: Path
) -> None:
    """Its two classes lie half a nat a slice apart, so that it decides by the gap of the rows."""
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    document = json.loads((model / "config.json").read_text())
    slices = document["metadata"]["preprocess"]["slices"]
    readout = GaussianReadout(("flat", "striped"), np.array([[0.5], [-0.5]]), np.eye(1), 2.0, slices, (3, 3))
    document["metadata"]["readout"] = readout.to_dict()
    (model / "config.json").write_text(json.dumps(document))
    done = run(model, manifest, tmp_path / "out")
    one = done.document["sets"]["test"]["decisions"]
    assert list(one)[:2] == ["argmax", "gaussian"] and "bits_per_dim" not in one["gaussian"]["figures"]
    rows = list(read_results(tmp_path / "out" / "results" / "test"))
    scores = np.array([[float(row["logp_flat"]), float(row["logp_striped"])] for row in rows]) / 3
    wanted = posterior(readout.discriminants(scores), 2.0)
    own = [wanted[i, ["flat", "striped"].index(row["label"])] for i, row in enumerate(rows)]
    assert one["gaussian"]["figures"]["nll"]["value"] == pytest.approx(-np.log(own).mean())
    assert not any("read-out" in line for line in done.warnings)
    document["metadata"]["readout"]["slices"] = "center+-9"
    (model / "config.json").write_text(json.dumps(document))
    other = run(model, manifest, tmp_path / "other")
    assert "gaussian" not in other.document["sets"]["test"]["decisions"]
    assert any("fitted to slices 'center+-9'" in line for line in other.warnings)
