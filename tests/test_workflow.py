"""The demo from end to end, on an archive of a few scans and with a model of a few steps."""

import json
import re

import pytest

from fastflow import FlowConfig, MagicFlow
from fastflow.archive.results import read_results
from fastflow.data.demo.distortions import DISTORTIONS
from fastflow.data.manifest import read_manifest
from fastflow.training.trainer import TrainConfig
from fastflow.workflow import run_demo

SMALL = {
    "masks": ("custom", "checkerboard", "channel", "checkerboard"),
    "squeeze_before": (0, 1),
    "split_after": (2,),
    "widths": ((8, 8, 8),) * 4,
}


# The unseen head lacks most classes, as an archive may.
SIZE = {
    "train": (2,) + (1,) * 6,
    "val": (1, 1) + (0,) * 5,
    "test": (1,) * 7,
    "unseen_head": (1, 1) + (0,) * 5,
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    stages, epochs = [], []
    names = ("Aster", "Borea", "Cirrus", "Dorado", "Eridan", "Fornax", "Gemini")
    result = run_demo(
        out,
        seed=3,
        size=SIZE,
        workers=1,
        device="cpu",
        config=FlowConfig.demo(7, class_names=names, **SMALL),
        training=TrainConfig.demo(epochs=2, ema=0.5),
        notify=lambda stage, done, total: stages.append((stage, done, total)),
        on_epoch=epochs.append,
        distortions=DISTORTIONS[:2],
    )
    return out, result, stages, epochs


def test_the_folder_holds_what_was_promised(demo):
    out, result, _, _ = demo
    assert {p.name for p in out.iterdir()} == {
        "archive",
        "manifest.csv",
        "model",
        "results",
        "metrics.json",
        "report.html",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics == result.metrics
    keys = ("accuracy", "balanced_accuracy", "histogram_balanced_accuracy", "bits_per_dim")
    keys += ("grain_accuracy", "grain_balanced_accuracy")
    assert {f"{prefix}{key}" for prefix in ("", "unseen_head_") for key in keys} | {"seconds"} <= set(metrics)
    assert MagicFlow.load(out / "model").temperature > 0


def test_distorted_copies_are_flagged_and_good_scans_are_counted(demo):
    out, result, _, _ = demo
    assert [one.name for one in result.distorted] == ["z_score", "offset"]
    for one in result.distorted:
        # A scan of each of seven scanners.
        assert one.count == 7 and one.share == result.metrics[f"flagged_{one.name}"] == 1.0
        assert one.codes["unlike_training"] == 7
    rows = list(read_results(out / "results"))
    for test, prefix in zip(result.tests, ("", "unseen_head_"), strict=True):
        assert test.flagged == result.metrics[f"{prefix}flagged"]
    flagged = result.tests[0].flagged * 7 + result.tests[1].flagged * 2
    assert round(flagged) == sum(row["status"] != "ok" for row in rows)
    page = (out / "report.html").read_text()
    assert "Which distortions are noticed" in page and "offset: 1000 is added" in page


def test_results_and_metrics_agree(demo):
    out, result, _, _ = demo
    held_out = {r.path: r for r in read_manifest(out / "manifest.csv") if r.split in ("test", "unseen_head")}
    rows = list(read_results(out / "results"))
    # A model of two epochs on a few scans may find a scan of another head unlike them.
    assert len(rows) == len(held_out) == 9 and {row["status"] for row in rows} <= {"ok", "flagged"}
    assert [str(out / row["path"]) for row in rows] == list(held_out)
    for split, prefix in (("test", ""), ("unseen_head", "unseen_head_")):
        of_split = [row for row, record in zip(rows, held_out.values(), strict=True) if record.split == split]
        right = [row["predicted"] == row["label"] for row in of_split]
        assert result.metrics[f"{prefix}accuracy"] == pytest.approx(sum(right) / len(right))


def test_the_report_shows_its_numbers_and_pictures(demo):
    out, result, _, _ = demo
    page = (out / "report.html").read_text()
    assert (
        f"{result.metrics['balanced_accuracy']:.3f}" in page
        and f"{result.metrics['unseen_head_bits_per_dim']:.3f}" in page
    )
    assert len(re.findall(r'<img[^>]+src="data:image/png;base64,', page)) >= 5
    assert not re.search(r'(src|href)="https?:', page) and "simulated scanners on real anatomy" in page


def test_progress_tells_every_stage_to_its_end(demo):
    _, _, stages, epochs = demo
    for stage in ("archive", "reading", "training", "classification", "distortions"):
        told = [(done, total) for name, done, total in stages if name == stage]
        assert told and told[-1][0] == told[-1][1]
    assert [record["epoch"] for record in epochs] == [1, 2]
    assert {"train_bits_per_dim", "val_bits_per_dim", "test_bits_per_dim", "unseen_head_bits_per_dim"} <= set(
        epochs[0]
    )
