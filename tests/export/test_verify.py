"""The comparison of an export with its model: that it sees what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastflow.export.images import anatomy_slices
from fastflow.export.onnx import file_hash
from fastflow.export.verify import Parity, compare, verify
from onnx import numpy_helper

from fastflow import MagicFlow
from fastflow.cli.export import describe
from fastflow.errors import ExportError
from fastflow.readout import GaussianReadout

# A small model and its export.
SMALL = Path(__file__).parents[1] / "fixtures" / "v0"


@pytest.fixture(scope="module")
def model() -> MagicFlow:
    """The small model. Do not change it."""
    return MagicFlow.load(SMALL / "model")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Enough slices for the largest batch that is compared, and one more."""
    return anatomy_slices((1, 8, 8), 6)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """An export of `model` to tamper with."""
    return Path(shutil.copytree(SMALL / "export", tmp_path / "export"))


@pytest.fixture(scope="module")
def parity(exported: Path, model_folder: Path) -> Parity:
    """The comparison of a fresh export with its model."""
    return verify(exported, model_folder)


def record(folder: Path) -> None:
    """Make the document of a folder that was tampered with agree with it."""
    document = json.loads((folder / "export.json").read_text())
    document["sha256"] = {name: file_hash(folder / name) for name in document["sha256"]}
    (folder / "export.json").write_text(json.dumps(document))


def change(folder: Path, name: str, edit: Callable[[onnx.ModelProto], None]) -> None:
    """Edit a graph, which takes its tensors in, and let the document agree: it then lists no other graph."""
    path = folder / f"{name}.onnx"
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)
    keep(folder, name)
    record(folder)


def keep(folder: Path, *names: str) -> None:
    """Take all other graphs out of the document."""
    document = json.loads((folder / "export.json").read_text())
    for name in set(document["graphs"]) - set(names):
        del document["sha256"][document["graphs"].pop(name)]
    (folder / "export.json").write_text(json.dumps(document))


def add_to_output(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for node in model.graph.node:
        node.output[:] = [f"{name}_before" if output == name else output for output in node.output]
    model.graph.initializer.append(numpy_helper.from_array(value, "added"))
    model.graph.node.append(onnx.helper.make_node("Add", [f"{name}_before", "added"], [name]))


def test_a_fresh_export_passes(parity):
    assert parity.passed and parity.failure == ""
    assert parity.images == 16 and parity.source == "packaged anatomy"
    assert parity.provider == "CPUExecutionProvider"
    assert set(parity.graphs) == {"score", "sample", "latent", "attribution"}
    assert parity.graphs["score"]["log_odds_error"] < 0.01
    # Errors that are exactly zero would show that the graphs were compared with themselves.
    assert parity.graphs["score"]["log_odds_error"] > 0 and parity.float32["log_odds_error"] > 0
    assert json.loads(json.dumps(parity.to_dict()))["passed"]


def test_an_export_records_the_errors_that_verify_finds(exported, parity):
    recorded = json.loads((exported / "export.json").read_text())["parity"]
    found = parity.to_dict()
    assert recorded["graphs"].keys() == found["graphs"].keys()
    for name, errors in found["graphs"].items():
        assert recorded["graphs"][name] == pytest.approx(errors, abs=1e-4)


def test_a_label_that_is_favoured_is_seen(copy, model, images):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([0.0, 0.03])))
    found = verify(copy, model, images)
    assert found.graphs["score"]["log_odds_error"] == pytest.approx(0.03, abs=0.01)
    assert "score: log-odds are off by 0.03" in found.failure
    wider = dataclasses.replace(found, limit=0.1).failure
    assert wider == "" or "likeliest" in wider


def test_what_shifts_all_labels_alike_decides_nothing(copy, model, images):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([5.0, 5.0])))
    assert verify(copy, model, images).passed


def test_another_decision_is_seen_whatever_the_limit(copy, model, images):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([1e4, 0.0])))
    found = verify(copy, model, images, limit=1e6)
    assert found.graphs["score"]["agreement"] < 1 and "the likeliest label is the model's in" in found.failure


def test_numbers_that_are_none_are_seen(copy, model, images):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([0.0, np.nan])))
    assert "off by nan" in verify(copy, model, images).failure


def test_pixels_that_are_off_are_seen(copy, model, images):
    change(
        copy, "sample", lambda model: add_to_output(model, "image", np.full((1, 1, 8, 8), 0.01, np.float32))
    )
    assert "sample: its pixel error is 0.01" in verify(copy, model, images).failure


@pytest.mark.parametrize(
    ("name", "output", "kind"), [("latent", "z", "latent"), ("attribution", "map", "map")]
)
def test_elements_that_stand_elsewhere_are_seen(copy, model, images, name, output, kind):
    """Their sums are right."""

    def edit(model):
        for node in model.graph.node:
            node.output[:] = ["before" if one == output else one for one in node.output]
        axis = 1 if output == "z" else 2
        order = numpy_helper.from_array(np.arange(64 if output == "z" else 8)[::-1].copy(), "backwards")
        model.graph.initializer.append(order)
        model.graph.node.append(onnx.helper.make_node("Gather", ["before", "backwards"], [output], axis=axis))

    change(copy, name, edit)
    failure = verify(copy, model, images).failure
    assert f"{name}: its {kind} error is" in failure and "log-odds" not in failure


@pytest.mark.parametrize(("name", "output"), [("latent", "logdet"), ("attribution", "constant")])
def test_the_other_graphs_are_compared_too(copy, model, images, name, output):
    def edit(model):
        # Adding the label moves log-odds.
        model.graph.node.append(
            onnx.helper.make_node("Cast", ["label"], ["wide"], to=onnx.TensorProto.DOUBLE)
        )
        for node in model.graph.node:
            node.output[:] = ["moved" if one == output else one for one in node.output]
        model.graph.node.append(onnx.helper.make_node("Add", ["moved", "wide"], [output]))

    change(copy, name, edit)
    assert f"{name}: log-odds are off by 1" in verify(copy, model, images).failure


@pytest.mark.parametrize(("name", "output"), [("score", "log_probs"), ("latent", "logdet")])
def test_a_graph_that_fails_when_it_is_run_is_told_by_name(copy, model, images, name, output):
    """A Gather reaches beyond the batch."""

    def edit(model):
        for node in model.graph.node:
            node.output[:] = ["before" if one == output else one for one in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array([1000]), "beyond"))
        model.graph.node.append(onnx.helper.make_node("Gather", ["before", "beyond"], ["one"], axis=0))
        model.graph.node.append(onnx.helper.make_node("Add", ["before", "one"], [output]))

    change(copy, name, edit)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot .* out of"):
        verify(copy, model, images)


def test_other_weights_are_refused(copy, tmp_path):
    model = MagicFlow.load(SMALL / "model")
    with torch.no_grad():
        model.steps[0].actnorm.bias.add_(0.1)
    model.save(tmp_path / "other")
    with pytest.raises(ExportError, match=r"is an export of weights .*, but .*other has"):
        verify(copy, tmp_path / "other")


@pytest.mark.parametrize("name", ["weights.data", "score.onnx", "latent.onnx"])
def test_damage_is_told_by_name(copy, model, images, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(
        ExportError, match=rf"{name.replace('.', '[.]')} has sha256 .*, but export\.json records"
    ):
        verify(copy, model, images)


def test_an_export_without_the_score_graph_is_compared_by_what_it_has(copy, model, images):
    keep(copy, "sample", "latent", "attribution")
    (copy / "score.onnx").unlink()
    found = verify(copy, model, images)
    assert found.passed and set(found.graphs) == {"sample", "latent", "attribution"} and found.provider


def test_graphs_that_are_not_valid_are_told(copy, model, images):
    def edit(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    change(copy, "latent", edit)
    with pytest.raises(ExportError, match=r"latent\.onnx is not a valid ONNX graph"):
        verify(copy, model, images)


def test_refuses(model, tmp_path):
    with pytest.raises(ExportError, match="is not an export folder: no such folder"):
        verify(tmp_path / "nowhere", model)
    for images in (
        np.zeros((2, 1, 8, 8), np.float32),
        np.zeros((2, 1, 16, 16), np.uint8),
        np.zeros((0, 1, 8, 8), np.uint8),
    ):
        with pytest.raises(ValueError, match=r"images must be \(N, 1, 8, 8\) uint8, N >= 1, got"):
            verify(SMALL / "export", model, images)
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        verify(SMALL / "export", model, limit=0)


def test_errors_are_of_log_odds():
    want = np.array([[0.0, 1.0, 5.0], [3.0, 2.0, 1.0]])
    assert compare(want + 7.0, want) == {"log_odds_error": 0.0, "log_odds_error_rms": 0.0, "agreement": 1.0}
    found = compare(want + np.array([[0.0, -0.5, 0.25], [0.0, 0.0, 3.0]]), want)
    assert found["log_odds_error"] == 3.0 and found["agreement"] == 0.5
    assert found["log_odds_error_rms"] == pytest.approx(np.sqrt((0.75**2 + 9.0) / 2))


def test_a_report_fails_by_any_of_its_limits():
    good = Parity(
        4, "given", 0.02, {"score": {"log_odds_error": 0.019, "agreement": 1.0}}, {}, 1.0, "CPU", "1"
    )
    assert good.passed
    for errors in (
        {"log_odds_error": 0.021},
        {"agreement": 0.75},
        {"batch_difference": 0.1},
        {"log_odds_error": float("nan")},
    ):
        assert not dataclasses.replace(good, graphs={"score": {**good.graphs["score"], **errors}}).passed
    assert not dataclasses.replace(good, graphs={"sample": {"pixel_error": 0.01}}).passed


def test_the_report_of_one_label_is_json_and_has_no_gap():
    one = Parity(4, "given", 0.02, {"score": {"log_odds_error": 0.0}}, {}, float("inf"), "CPU", "1")
    assert json.loads(json.dumps(one.to_dict(), allow_nan=False))["smallest_gap"] is None
    assert "smallest gap" not in describe(one)
    assert "smallest gap between two labels 2 nats" in describe(dataclasses.replace(one, smallest_gap=2.0))


def test_log_odds_of_the_readout_are_compared(copy: Path, model: MagicFlow, images: np.ndarray) -> None:
    document = json.loads((copy / "export.json").read_text())
    names, classes = tuple(document["class_names"]), len(document["class_names"])
    means = 0.1 * np.random.default_rng(0).normal(size=(classes, classes - 1))
    readout = GaussianReadout(names, means, 1e-4 * np.eye(classes - 1))
    assert "readout_log_odds_error" not in verify(copy, model, images).graphs["score"]
    (copy / "export.json").write_text(json.dumps(document | {"readout": readout.to_dict()}))
    parity = verify(copy, model, images)
    errors = parity.graphs["score"]
    assert errors["readout_limit"] == pytest.approx(parity.limit * readout.gain) and readout.gain > 1.0
    assert 0.0 < errors["readout_log_odds_error"] <= readout.gain * errors["log_odds_error"] * (1 + 1e-9)
    assert parity.passed
    worse = {"score": errors | {"readout_log_odds_error": 2 * errors["readout_limit"]}}
    failure = dataclasses.replace(parity, graphs=worse).failure
    assert "score: the read-out's log-odds are off by" in failure
