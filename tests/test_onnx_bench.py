"""The benchmark of ONNX Runtime runs on a tiny model, and compares what it says."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from bench import test_onnx
from fastflow import FlowConfig, MagicFlow
from fastflow.errors import ExportError

# A model of three small steps with all graphs of its export, as version 0.1 wrote them.
STORED = Path(__file__).parent / "fixtures" / "v0"


@pytest.fixture(scope="module")
def case():
    folder = STORED / "model"
    bytes_of_weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    model, threads = MagicFlow.load(folder).eval(), torch.get_num_threads()
    return test_onnx.Case("small", model, folder, STORED / "export", bytes_of_weights, 0.0, threads)


def test_all_ways_score_the_same_images(case):
    engines = {"eager": test_onnx.LabelScorer(case.model, engine="eager")}
    ways = test_onnx.works(case, engines, batch=3)
    assert list(ways) == ["onnx", "whole", "eager", "log_prob", "published"]
    found = {name: work() for name, work in ways.items()}
    for scores in found.values():
        assert scores.shape == (3, 2)
        assert test_onnx.log_odds_difference(scores, found["onnx"]) < 0.01


def test_difference_is_that_of_log_odds():
    found, shifted = np.array([[1.0, 2.0], [3.0, 3.0]]), np.array([[11.0, 12.0], [0.0, 0.5]])
    assert test_onnx.log_odds_difference(found, shifted) == 0.5
    # A scorer that swaps images must not look right.
    assert test_onnx.log_odds_difference(found, found[::-1]) == 1.0


def test_engine_without_a_compiler_is_left_out(case, monkeypatch):
    def scorer(model, engine):
        if engine == "compile":
            raise RuntimeError("engine='compile' needs a C++ compiler")
        return engine

    monkeypatch.setattr(test_onnx, "LabelScorer", scorer)
    assert test_onnx.label_scorers(case.model) == {"eager": "eager"}

    def broken(model, engine):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(test_onnx, "LabelScorer", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        test_onnx.label_scorers(case.model)


def test_ratios_are_of_rounds_that_belong_together():
    # The first round of the others has none of ours.
    others = [{"a": 100.0}, {"a": 2.0}, {"a": 30.0}, {"a": 8.0}]
    assert test_onnx.ratios(others, [1.0, 10.0, 2.0]) == {"ratio_a": 3.0, "range_a": [2.0, 4.0]}


def test_sizes_are_those_of_the_folder(case):
    sizes = test_onnx.conditions(case)
    json.dumps(sizes)
    assert sizes["exported_graphs"] == ["attribution", "latent", "sample", "score"]
    assert 0 < sizes["score_mib"] < sizes["export_mib"]
    assert sizes["export_mib"] * 2**20 == pytest.approx(
        sum(path.stat().st_size for path in case.export.iterdir())
    )
    assert (
        sizes["checkpoint_mib"] * 2**20
        == (case.folder / json.loads((case.folder / "config.json").read_text())["weights"]).stat().st_size
    )
    assert sizes["torch_threads"] == sizes["onnxruntime_intra_op_threads"]


def test_loaders_check_hashes_or_do_not(case, tmp_path):
    for load in test_onnx.loaders(case).values():
        assert load() is not None
    for path in case.export.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    document = json.loads((tmp_path / "export.json").read_text())
    document["sha256"]["score.onnx"] = "0" * 64
    (tmp_path / "export.json").write_text(json.dumps(document))
    tampered = test_onnx.loaders(dataclasses.replace(case, export=tmp_path))
    tampered["unchecked"]()
    with pytest.raises(ExportError, match=r"score\.onnx has sha256"):
        tampered["onnx"]()


def test_processes_measure_themselves(case, tmp_path):
    np.save(tmp_path / "images.npy", test_onnx.images(case.model, 2))
    rows = {kind: test_onnx.run_process(case, kind, tmp_path / "images.npy") for kind in test_onnx.PROCESSES}
    assert {kind: row["torch"] for kind, row in rows.items()} == {
        "onnx": False,
        "whole": False,
        "eager": True,
    }
    for row in rows.values():
        assert row["finite"] and row["peak_mib"] >= row["before_mib"] > 10
    assert rows["eager"]["peak_mib"] > rows["onnx"]["peak_mib"]


@pytest.mark.slow
def test_a_model_is_prepared_and_measured(tmp_path, benchmark):
    config = FlowConfig(
        num_classes=test_onnx.CLASSES,
        input_shape=(1, 8, 8),
        masks=("checkerboard", "channel"),
        squeeze_before=(1,),
        widths=((4, 4, 4),) * 2,
    )
    case = test_onnx.prepare("small", config, tmp_path, ("score",))
    assert case.sizes()["exported_graphs"] == ["score"] and case.export_seconds > 0
    ways = test_onnx.works(case, {}, batch=2)
    scores, wanted = ways["onnx"](), ways["log_prob"]()
    assert scores.shape == (2, test_onnx.CLASSES) and np.isfinite(scores).all()
    # Labels must matter, or a difference of log-odds says nothing.
    assert np.ptp(scores, axis=1).min() > 10 * test_onnx.log_odds_difference(scores, wanted)
    test_onnx.interleave(benchmark, ways.pop("onnx"), ways, rounds=3)
    if benchmark.stats is not None:
        assert benchmark.stats.stats.rounds == 3
        assert {f"{what}_{name}" for what in ("ratio", "range") for name in ways} == set(benchmark.extra_info)
