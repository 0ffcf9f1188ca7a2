"""The comparison of an export with its model: that it sees what is wrong."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from fastflow.export.onnx import file_hash
from fastflow.export.verify import Parity, anatomy_slices, compare, load_images, verify
from onnx import numpy_helper

from fastflow import MagicFlow
from fastflow.data.preprocess import Preprocess
from fastflow.errors import ExportError, VolumeError


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "export"))


def record(folder: Path) -> None:
    """Make the document of a folder that was tampered with agree with it."""
    document = json.loads((folder / "export.json").read_text())
    document["sha256"] = {name: file_hash(folder / name) for name in document["sha256"]}
    (folder / "export.json").write_text(json.dumps(document))


def change(folder: Path, name: str, edit) -> None:
    """Edit a graph, all of whose tensors become its own, and let the folder's hashes agree."""
    path = folder / f"{name}.onnx"
    model = onnx.load(path)
    edit(model)
    onnx.save(model, path)
    record(folder)


def add_to_output(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    for node in model.graph.node:
        node.output[:] = [f"{name}_before" if output == name else output for output in node.output]
    model.graph.initializer.append(numpy_helper.from_array(value, "added"))
    model.graph.node.append(onnx.helper.make_node("Add", [f"{name}_before", "added"], [name]))


def test_a_fresh_export_passes(exported, model_folder):
    found = verify(exported, model_folder)
    assert found.passed and found.failure == ""
    assert found.images == 16 and found.source == "packaged anatomy"
    assert found.provider == "CPUExecutionProvider"
    assert set(found.graphs) == {"score", "sample", "latent", "attribution"}
    assert found.graphs["score"]["log_odds_error"] < 0.01
    # Numbers that are exactly zero everywhere would have been compared with themselves.
    assert found.graphs["score"]["log_odds_error"] > 0 and found.float32["log_odds_error"] > 0
    assert json.loads(json.dumps(found.to_dict()))["passed"]


def test_what_is_written_is_what_verify_finds(exported, model_folder):
    recorded = json.loads((exported / "export.json").read_text())["parity"]
    found = verify(exported, model_folder).to_dict()
    assert recorded["graphs"].keys() == found["graphs"].keys()
    for name, errors in found["graphs"].items():
        assert recorded["graphs"][name] == pytest.approx(errors, abs=1e-4)


def test_a_label_that_is_favoured_is_seen(copy, model_folder):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([0.0, 0.03])))
    found = verify(copy, model_folder)
    assert found.graphs["score"]["log_odds_error"] == pytest.approx(0.03, abs=0.01)
    assert "score: log-odds are off by 0.03" in found.failure
    assert verify(copy, model_folder, limit=0.1).failure == "" or "likeliest" in verify(copy, model_folder, limit=0.1).failure


def test_what_shifts_all_labels_alike_decides_nothing(copy, model_folder):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([5.0, 5.0])))
    assert verify(copy, model_folder).passed


def test_another_decision_is_seen_whatever_the_limit(copy, model_folder):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([0.0, 1e4])))
    found = verify(copy, model_folder, limit=1e6)
    assert found.graphs["score"]["agreement"] < 1 and "the likeliest label is the model's in" in found.failure


def test_numbers_that_are_none_are_seen(copy, model_folder):
    change(copy, "score", lambda model: add_to_output(model, "log_probs", np.array([0.0, np.nan])))
    assert "off by nan" in verify(copy, model_folder).failure


def test_pixels_that_are_off_are_seen(copy, model_folder):
    change(copy, "sample", lambda model: add_to_output(model, "image", np.full((1, 1, 16, 16), 0.01, np.float32)))
    assert "sample: its pixel error is 0.01" in verify(copy, model_folder).failure


@pytest.mark.parametrize(("name", "output", "what"), [("latent", "z", "latent"), ("attribution", "map", "map")])
def test_elements_that_stand_elsewhere_are_seen(copy, model_folder, name, output, what):
    """Sums do not tell."""

    def edit(model):
        for node in model.graph.node:
            node.output[:] = ["before" if one == output else one for one in node.output]
        axis = 1 if output == "z" else 2
        order = numpy_helper.from_array(np.arange(256 if output == "z" else 16)[::-1].copy(), "backwards")
        model.graph.initializer.append(order)
        model.graph.node.append(onnx.helper.make_node("Gather", ["before", "backwards"], [output], axis=axis))

    change(copy, name, edit)
    failure = verify(copy, model_folder).failure
    assert f"{name}: its {what} error is" in failure and "log-odds" not in failure


@pytest.mark.parametrize(("name", "output"), [("latent", "logdet"), ("attribution", "constant")])
def test_the_other_graphs_are_compared_too(copy, model_folder, name, output):
    def edit(model):
        # By the label, so that log-odds move.
        model.graph.node.append(onnx.helper.make_node("Cast", ["label"], ["wide"], to=onnx.TensorProto.DOUBLE))
        for node in model.graph.node:
            node.output[:] = ["moved" if one == output else one for one in node.output]
        model.graph.node.append(onnx.helper.make_node("Add", ["moved", "wide"], [output]))

    change(copy, name, edit)
    assert f"{name}: log-odds are off by 1" in verify(copy, model_folder).failure


@pytest.mark.parametrize(("name", "output"), [("score", "log_probs"), ("latent", "logdet")])
def test_a_graph_that_fails_when_it_is_run_is_told_by_name(copy, model_folder, name, output):
    """As one whose rows are less than it was planned for."""

    def edit(model):
        for node in model.graph.node:
            node.output[:] = ["before" if one == output else one for one in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array([1000]), "beyond"))
        model.graph.node.append(onnx.helper.make_node("Gather", ["before", "beyond"], ["one"], axis=0))
        model.graph.node.append(onnx.helper.make_node("Add", ["before", "one"], [output]))

    change(copy, name, edit)
    with pytest.raises(ExportError, match=r"ONNX Runtime cannot .* out of"):
        verify(copy, model_folder)


def test_other_weights_are_refused(copy, model_folder, tmp_path):
    model = MagicFlow.load(model_folder)
    with torch.no_grad():
        model.steps[0].actnorm.bias.add_(0.1)
    model.save(tmp_path / "other")
    with pytest.raises(ExportError, match=r"is an export of weights .*, but .*other has"):
        verify(copy, tmp_path / "other")


@pytest.mark.parametrize("name", ["weights.data", "score.onnx", "latent.onnx"])
def test_damage_is_told_by_name(copy, model_folder, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ExportError, match=rf"{name.replace('.', '[.]')} has sha256 .*, but export\.json records"):
        verify(copy, model_folder)


def test_an_export_without_the_score_graph_is_compared_by_what_it_has(copy, model_folder):
    document = json.loads((copy / "export.json").read_text())
    del document["graphs"]["score"], document["sha256"]["score.onnx"]
    (copy / "export.json").write_text(json.dumps(document))
    (copy / "score.onnx").unlink()
    found = verify(copy, model_folder)
    assert found.passed and set(found.graphs) == {"sample", "latent", "attribution"} and found.provider


def test_graphs_that_are_not_valid_are_told(copy, model_folder):
    def edit(model):
        model.graph.node[0].op_type = "NoSuchOperator"

    change(copy, "latent", edit)
    with pytest.raises(ExportError, match=r"latent\.onnx is not a valid ONNX graph"):
        verify(copy, model_folder)


def test_refuses(exported, model_folder, tmp_path):
    with pytest.raises(ExportError, match="is not an export folder: no such folder"):
        verify(tmp_path / "nowhere", model_folder)
    for images in (np.zeros((2, 1, 16, 16), np.float32), np.zeros((2, 1, 8, 8), np.uint8), np.zeros((0, 1, 16, 16), np.uint8)):
        with pytest.raises(ValueError, match=r"images must be \(N, 1, 16, 16\) uint8, N >= 1, got"):
            verify(exported, model_folder, images)
    with pytest.raises(ValueError, match="limit must be positive, got 0"):
        verify(exported, model_folder, limit=0)


def test_errors_are_of_log_odds():
    want = np.array([[0.0, 1.0, 5.0], [3.0, 2.0, 1.0]])
    assert compare(want + 7.0, want) == {"log_odds_error": 0.0, "log_odds_error_rms": 0.0, "agreement": 1.0}
    found = compare(want + np.array([[0.0, -0.5, 0.25], [0.0, 0.0, 3.0]]), want)
    assert found["log_odds_error"] == 3.0 and found["agreement"] == 0.5
    assert found["log_odds_error_rms"] == pytest.approx(np.sqrt((0.75**2 + 9.0) / 2))


def test_a_report_fails_by_any_of_its_limits():
    good = Parity(4, "given", 0.02, {"score": {"log_odds_error": 0.019, "agreement": 1.0}}, {}, 1.0, "CPU", "1")
    assert good.passed
    for errors in ({"log_odds_error": 0.021}, {"agreement": 0.75}, {"batch_difference": 0.1}, {"log_odds_error": float("nan")}):
        assert not dataclasses.replace(good, graphs={"score": {**good.graphs["score"], **errors}}).passed
    assert not dataclasses.replace(good, graphs={"sample": {"pixel_error": 0.01}}).passed


@pytest.mark.parametrize("shape", [(1, 184, 184), (1, 96, 96), (2, 16, 24), (1, 40, 12)])
def test_packaged_slices_fit_any_model(shape):
    slices = anatomy_slices(shape, 8)
    assert slices.shape == (8, *shape) and slices.dtype == np.uint8
    assert (slices.reshape(8, -1).max(axis=1) > 100).all()
    assert len({one.tobytes() for one in slices}) == 8


def test_slices_of_scans_are_spread_over_them(scans, tmp_path):
    preprocess = Preprocess((16, 16), "center+-1", (2.0, 2.0, 2.0), (14, 9, 15))
    paths = [str(path) for path in sorted(scans.rglob("*.nii.gz"))]
    assert load_images(paths, preprocess, 6).shape == (6, 1, 16, 16)
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no volume")
    said: list[str] = []
    assert len(load_images([str(bad), *paths], preprocess, 100, said.append)) == len(paths)
    assert len(said) == 1 and "bad.nii.gz" in said[0]
    with pytest.raises(VolumeError, match=r"bad\.nii\.gz"):
        load_images([str(bad)], preprocess)
