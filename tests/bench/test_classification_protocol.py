"""The protocol of the rivals, with a network of two layers in place of timm's."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bench.baselines.classification import protocol
from bench.baselines.classification.__main__ import main
from bench.baselines.classification.run import Run, run
from bench.baselines.classification.settings import Budget, Settings, rate_at
from bench.baselines.classification.slices import cached_slices, sets_of_fold
from fastflow.data.folds import folds_of
from fastflow.data.manifest import read_manifest, write_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.records import Record
from fastflow.errors import ManifestError, OutputFolderError

SETTINGS = Settings(Budget("images", 60), rates=(1e-3, 3e-2), batch_size=8, evaluations=2)


def tiny(classes: int, size: tuple[int, int]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, classes)
    )


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flat and striped pictures: two files of each of twelve subjects, and an unseen head of four."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    records = []
    for subject in range(16):
        label = ("flat", "striped")[subject % 2]
        for visit in range(1 if subject >= 12 else 2):
            pixels = rng.integers(60, 120, (16, 16), dtype=np.uint8)
            pixels[:, :: 2 if label == "striped" else 20] += 100
            path = folder / f"sub-{subject:02}_{visit}.png"
            Image.fromarray(pixels).save(path)
            split = "unseen_head" if subject >= 12 else "train"
            records.append(Record(str(path), label, f"sub-{subject:02}", split))
    write_manifest(records, folder / "manifest.csv")
    return folder / "manifest.csv"


def wanted(manifest: Path, out: Path, **changes: object) -> Run:
    values = {"name": "tiny", "folds": 3, "size": (16, 16), "cache": manifest.parent / "slices"}
    return Run(**{**values, "manifest": manifest, "out": out, **changes})


def test_folds_are_the_shared_ones_and_the_unseen_head_is_no_part_of_them(manifest: Path) -> None:
    records = read_manifest(manifest)
    slices = cached_slices(records, Preprocess((16, 16)), manifest.parent / "slices")
    pooled = [record for record in records if record.split != "unseen_head"]
    for fold, members in enumerate(folds_of(pooled, 3, 7)):
        sets = sets_of_fold(slices, records, "unseen_head", fold, 3, 7)
        for name in ("train", "val", "test"):
            assert sets[name].paths == tuple(record.path for record in members if record.split == name)
        assert set(sets["unseen_head"].subjects) == {f"sub-{n}" for n in range(12, 16)}
        subjects = [set(data.subjects) for data in sets.values()]
        assert sum(map(len, subjects)) == len(set().union(*subjects)) == 16
    with pytest.raises(ValueError, match="fold must lie in 0 to 2"):
        sets_of_fold(slices, records, "unseen_head", 3, 3, 7)


def test_a_subject_of_the_unseen_head_in_the_folds_is_refused(manifest: Path) -> None:
    records = read_manifest(manifest)
    slices = cached_slices(records, Preprocess((16, 16)), manifest.parent / "slices")
    records[0] = dataclasses.replace(records[0], split="unseen_head")
    with pytest.raises(ManifestError, match="sub-00"):
        sets_of_fold(slices, records, "unseen_head", 0, 3, 0)


def test_slices_are_decoded_once(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = read_manifest(manifest)
    first = cached_slices(records, Preprocess((16, 16)), tmp_path)
    monkeypatch.setattr("bench.baselines.classification.slices.load_slices", None)
    again = cached_slices(records, Preprocess((16, 16)), tmp_path)
    np.testing.assert_array_equal(again.images, first.images)
    assert (again.paths, again.subjects, again.class_names) == (
        first.paths,
        first.subjects,
        first.class_names,
    )
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(TypeError):
        cached_slices(records, Preprocess((20, 20)), tmp_path)


def test_a_run_trains_on_no_test_row_and_keeps_to_its_budget(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, scored = [], []
    batches, score = protocol.iterate_batches, protocol.volume_probabilities

    def watched(train, *rest):
        for images, labels in batches(train, *rest):
            seen.append((train.subjects, len(labels)))
            yield images, labels

    def watched_score(model, data, *rest):
        scored.append(set(data.subjects))
        return score(model, data, *rest)

    monkeypatch.setattr(protocol, "iterate_batches", watched)
    monkeypatch.setattr(protocol, "volume_probabilities", watched_score)
    path = run(wanted(manifest, tmp_path), SETTINGS, builder=tiny)
    document = json.loads(path.read_text())
    tested = {name: set(document["sets"][name]["subjects"]) for name in ("val", "test", "unseen_head")}
    trained = set().union(*(subjects for subjects, _ in seen))
    assert not trained & set().union(*tested.values())
    # Training looks at validation volumes only.
    assert len(scored) == 4 and all(subjects == tested["val"] for subjects in scored)
    assert sum(count for _, count in seen) == 2 * 56
    assert document["images"] == 56 and [tried["images"] for tried in document["tried"]] == [56, 56]
    assert document["budget"] == {"kind": "images", "amount": 60} and document["parameters"] == 170
    metrics = document["sets"]["unseen_head"]["metrics"]
    right = np.argmax(document["sets"]["unseen_head"]["probabilities"], axis=1)
    assert metrics["accuracy"] == np.mean(right == document["sets"]["unseen_head"]["labels"])


def test_the_validation_set_alone_chooses_the_learning_rate(manifest: Path, tmp_path: Path) -> None:
    document = json.loads(run(wanted(manifest, tmp_path), SETTINGS, builder=tiny).read_text())
    scores = [(tried["val_balanced_accuracy"], -tried["val_nll"]) for tried in document["tried"]]
    assert document["learning_rate"] == SETTINGS.rates[scores.index(max(scores))]
    best = [
        max((e["val_balanced_accuracy"], -e["val_nll"]) for e in t["evaluations"]) for t in document["tried"]
    ]
    assert scores == best
    # The network of the document is the one that was best on the validation set.
    assert document["sets"]["val"]["metrics"]["nll"] == pytest.approx(-max(scores)[1], rel=1e-6)


def test_the_same_seed_gives_the_same_probabilities(manifest: Path, tmp_path: Path) -> None:
    first, again, other = (
        json.loads(
            run(
                wanted(manifest, tmp_path / name), dataclasses.replace(SETTINGS, seed=seed), builder=tiny
            ).read_text()
        )
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first["sets"] == again["sets"] != other["sets"]


def test_a_finished_run_is_not_repeated(manifest: Path, tmp_path: Path) -> None:
    path = run(wanted(manifest, tmp_path), SETTINGS, builder=tiny)
    before = path.read_bytes()

    def fail(classes: int, size: tuple[int, int]) -> nn.Module:
        raise AssertionError("trained again")

    assert run(wanted(manifest, tmp_path), SETTINGS, builder=fail) == path
    assert path.read_bytes() == before
    with pytest.raises(OutputFolderError, match="another settings"):
        run(wanted(manifest, tmp_path), dataclasses.replace(SETTINGS, batch_size=4), builder=fail)
    run(wanted(manifest, tmp_path), dataclasses.replace(SETTINGS, batch_size=4), True, builder=tiny)
    assert json.loads(path.read_text())["settings"]["batch_size"] == 4


@pytest.mark.parametrize("kind", ["seconds", "cpu_seconds"])
def test_a_budget_of_time_ends(kind: str, manifest: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, budget=Budget(kind, 0.2), rates=(1e-3,))
    document = json.loads(run(wanted(manifest, tmp_path), settings, builder=tiny).read_text())
    assert document[kind] >= 0.2 and document["images"] > 0
    assert len(document["tried"][0]["evaluations"]) >= 1


def test_learning_rate_rises_and_falls() -> None:
    rates = [rate_at(progress) for progress in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.01) and max(rates) == rates[5] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01) and all(a > b for a, b in itertools.pairwise(rates[5:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rates": ()}, "rates must be positive"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"precision": "8"}, "precision must be 32 or bf16"),
        ({"batch_size": 100}, "less than one batch"),
    ],
)
def test_bad_settings_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTINGS, **change)
    with pytest.raises(ValueError, match="kind must be"):
        Budget("epochs", 3)  # type: ignore[arg-type]


def test_the_table_has_a_row_for_each_method_and_set(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--folds", "3", "--size", "16", "16", "--cache", str(manifest.parent / "slices")]
    for fold in ("0", "1"):
        for name in ("histogram", "grain"):
            assert main([name, str(manifest), "--out", str(tmp_path), "--fold", fold, *common]) == 0
    (tmp_path / "other.json").write_text("{}")
    assert main(["table", str(tmp_path), "--out", str(tmp_path / "table")]) == 0
    text = capsys.readouterr().out
    assert "### test" in text and "### unseen_head" in text and "### val" not in text
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 5 and rows[0].startswith("set,method,start,budget,runs,folds,seeds")
    documents = [json.loads(path.read_text()) for path in tmp_path.glob("grain-*.json")]
    values = [document["sets"]["test"]["metrics"]["balanced_accuracy"] for document in documents]
    (row,) = [
        dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows if "test,grain" in row
    ]
    assert float(row["balanced_accuracy"]) == pytest.approx(np.mean(values)) and row["runs"] == "2"
    assert float(row["balanced_accuracy_sd"]) == pytest.approx(np.std(values, ddof=1))
    # The same run twice would count twice.
    copy = tmp_path / "copy.json"
    copy.write_text((tmp_path / "grain-fold0of3-seed0.json").read_text())
    assert main(["table", str(tmp_path)]) == 2
    assert "same run" in capsys.readouterr().err


def test_runs_with_other_test_subjects_are_not_compared(
    manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--folds", "3", "--size", "16", "16", "--cache", str(manifest.parent / "slices")]
    for name, seed in (("histogram", "0"), ("grain", "1")):
        assert main([name, str(manifest), "--out", str(tmp_path), "--fold-seed", seed, *common]) == 0
    assert main(["table", str(tmp_path)]) == 2
    assert "other subjects" in capsys.readouterr().err


def test_bad_calls_are_told(manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["resnet18", str(manifest), "--out", str(tmp_path)])
    assert "--images, --seconds" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "nowhere")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_bfloat16_gives_probabilities(manifest: Path) -> None:
    slices = cached_slices(read_manifest(manifest), Preprocess((16, 16)), manifest.parent / "slices")
    torch.manual_seed(0)
    model = tiny(2, (16, 16))
    wide, narrow = (protocol.volume_probabilities(model, slices, precision) for precision in ("32", "bf16"))
    np.testing.assert_allclose(wide.sum(axis=1), 1.0)
    np.testing.assert_allclose(narrow, wide, atol=0.01)
