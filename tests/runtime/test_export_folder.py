"""Folders that are no export, damaged, or of two exports."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from fastflow.errors import ExportError
from fastflow.runtime.export_folder import read_export
from fastflow.runtime.scorer import OnnxScorer
from tests.export.handmade import document, expected, images, score_graph, weights, write_export


def test_folders_that_are_no_export(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is not an export folder: no such folder"):
        OnnxScorer(tmp_path / "gone")
    with pytest.raises(ExportError, match=r"is not an export folder: no export\.json in it"):
        OnnxScorer(tmp_path)
    for content, message in (
        (b"{", r"export\.json cannot be read"),
        (b"\xff\xfe", r"export\.json cannot be read"),
        (b"[" * 100_000, r"export\.json cannot be read"),
        (b"[1]", "must have format 1, got 'list'"),
        (b'{"format": 2}', "must have format 1, got 2"),
        (
            b'{"format": 1, "graphs": {}, "temperature": 1}',
            "lacks model_hash, weights_sha256, precision, class_names",
        ),
    ):
        (tmp_path / "export.json").write_bytes(content)
        with pytest.raises(ExportError, match=message):
            OnnxScorer(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": []}, "class_names must be a list of names"),
        ({"class_names": "ab"}, "class_names must be a list of names"),
        ({"class_names": [1, 2]}, "class_names must be a list of names"),
        ({"input_shape": [1, 16]}, r"input_shape must be \[C, H, W\]"),
        ({"input_shape": [1, 0, 16]}, r"input_shape must be \[C, H, W\]"),
        ({"dims": 255}, "dims must be the product of input_shape"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": "warm"}, "could not convert"),
        ({"prior": [1.0]}, "prior must be 2 probabilities"),
        ({"prior": None}, "prior must be 2 probabilities"),
        ({"preprocess": {"size": [16]}}, "size must be 2 positive whole numbers"),
        ({"preprocess": 3}, "not usable"),
        ({"validation": {"log_prob": ["a"]}}, "could not convert"),
        ({"graphs": {"score": "../score.onnx"}}, "graphs and sha256 must be files of the folder"),
        ({"graphs": ["score"]}, "not usable"),
        ({"sha256": {"/etc/passwd": "00"}}, "graphs and sha256 must be files of the folder"),
        ({"model_hash": 7}, "model_hash must be text"),
    ],
)
def test_documents_that_are_not_usable(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "export.json").write_text(json.dumps({"sha256": {}} | document(**changes)))
    with pytest.raises(
        ExportError, match=rf"export\.json is not usable: .*{message}|export\.json is {message}"
    ):
        read_export(tmp_path)


@pytest.mark.parametrize("name", ["score.onnx", "weights.data"])
def test_files_that_were_tampered_with_or_are_missing(tmp_path: Path, name: str) -> None:
    file = write_export(tmp_path) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        ExportError, match=rf"{name} has sha256 [0-9a-f]{{64}}, but export\.json records [0-9a-f]{{64}}"
    ):
        OnnxScorer(tmp_path)
    file.unlink()
    for verify in (True, False):
        with pytest.raises(ExportError, match=rf"{name} is missing: export\.json lists it"):
            OnnxScorer(tmp_path, verify_hashes=verify)
    file.mkdir()
    with pytest.raises(ExportError, match=rf"{name} cannot be read: Is a directory"):
        OnnxScorer(tmp_path)


def test_hashes_are_not_looked_at_where_nobody_asks(tmp_path: Path) -> None:
    file = write_export(tmp_path) / "weights.data"
    changed = weights() * 2
    file.write_bytes(changed.tobytes())
    x = images(2)
    got = OnnxScorer(tmp_path, "cpu", verify_hashes=False).score(x)
    np.testing.assert_allclose(got, 2 * expected(x) + 300.0, atol=1e-4)


def test_graphs_that_are_not_needed_need_not_be_there(tmp_path: Path) -> None:
    folder = write_export(tmp_path, graphs={"sample": "sample.onnx", "score": "score.onnx"})
    values = json.loads((folder / "export.json").read_text())
    values["sha256"]["sample.onnx"] = "00" * 32
    (folder / "export.json").write_text(json.dumps(values))
    assert OnnxScorer(folder).score(images(1)).shape == (1, 2)
    values["graphs"].pop("score")
    (folder / "export.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match="holds no score graph, only sample: export it with --graphs score"):
        OnnxScorer(folder)
    values["graphs"] = {"score": "score.onnx"}
    values["sha256"].pop("score.onnx")
    (folder / "export.json").write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"has no sha256 of score\.onnx"):
        OnnxScorer(folder)


@pytest.mark.parametrize(
    ("props", "message"),
    [
        (
            dict.fromkeys(["prior", "temperature", "weights"]),
            r"score\.onnx has no metadata temperature, prior, weights: it is",
        ),
        (
            {"model_hash": "fedcba9876543210"},
            r"score\.onnx has model_hash fedcba.*, but export\.json says 0123456789abcdef",
        ),
        (
            {"class_names": '["striped", "flat"]'},
            r"has class_names .*, but export\.json says \['flat', 'striped'\]",
        ),
        ({"temperature": "1.0"}, r"has temperature 1\.0, but export\.json says 5\.0"),
        ({"temperature": "warm"}, r"has temperature warm, but export\.json says 5\.0"),
        ({"preprocess": "null"}, "has preprocess null, but"),
        ({"graph": "latent"}, "has graph latent, but"),
        (
            {"weights": json.dumps({"file": "weights.data", "sha256": "00"})},
            r"belongs to weights 00, which are not those of export",
        ),
        ({"weights": "{}"}, r"has metadata weights '\{\}', which is no file with its sha256"),
        ({"weights": "weights.data"}, "has metadata weights 'weights.data', which is no file"),
    ],
)
def test_metadata_that_are_missing_or_of_another_export(
    tmp_path: Path, props: dict[str, str | None], message: str
) -> None:
    with pytest.raises(ExportError, match=message):
        OnnxScorer(write_export(tmp_path, props=props))


def test_weights_may_be_in_the_graph(tmp_path: Path) -> None:
    folder = write_export(tmp_path, props={"weights": "null"})
    graph = helper.make_model(score_graph().graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    helper.set_model_props(graph, {p.key: p.value for p in onnx.load(folder / "score.onnx").metadata_props})
    onnx.save(graph, folder / "score.onnx")
    (folder / "weights.data").unlink()
    values = json.loads((folder / "export.json").read_text())
    values["sha256"] = {"score.onnx": hashlib.sha256((folder / "score.onnx").read_bytes()).hexdigest()}
    (folder / "export.json").write_text(json.dumps(values))
    np.testing.assert_allclose(OnnxScorer(folder).score(images(2)), expected(images(2)), atol=1e-5)


def test_a_graph_that_onnxruntime_cannot_load(tmp_path: Path) -> None:
    (write_export(tmp_path) / "score.onnx").write_bytes(b"not a graph")
    with pytest.raises(
        ExportError, match=r"score\.onnx cannot be loaded by onnxruntime \d.*Protobuf parsing failed"
    ):
        OnnxScorer(tmp_path, verify_hashes=False)
