"""An export made by hand: a linear score graph with its weights, whose scores NumPy can compute as well."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CLASSES = ("flat", "striped")
SHAPE = (1, 16, 16)
DIMS = 256
# The tiny model takes the scans of `tests/conftest.py` so.
PREPROCESS = {
    "size": [16, 16],
    "slices": "center+-1",
    "spacing": [2.0, 2.0, 2.0],
    "grid": [14, 9, 15],
    "scaling": "percentile",
}


def weights(seed: int = 0) -> NDArray[np.float32]:
    """(D, K): the second label likes stripes across columns."""
    rng = np.random.default_rng(seed)
    stripes = np.broadcast_to(np.where(np.arange(16) % 2, -1.0, 1.0), (16, 16)).reshape(-1)
    return (0.01 * rng.normal(size=(DIMS, 2)) + 0.1 * np.stack([-stripes, stripes], axis=1)).astype(
        np.float32
    )


def expected(images: NDArray[Any], seed: int = 0) -> NDArray[np.float64]:
    """Scores of float images in float64, (B, K)."""
    return images.reshape(len(images), -1).astype(np.float64) @ weights(seed).astype(np.float64) - 300.0


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Images of noise, (count, 1, 16, 16)."""
    return np.random.default_rng(seed).uniform(-1.0, 1.0, (count, *SHAPE)).astype(np.float32)


def document(**changes: Any) -> dict[str, Any]:
    """An ``export.json`` without the hashes."""
    return {
        "format": 1,
        "fastflow_version": "0.1.0",
        "model_hash": "0123456789abcdef",
        "weights_sha256": "ab" * 32,
        "precision": "float32",
        "opset": 21,
        "graphs": {"score": "score.onnx"},
        "class_names": list(CLASSES),
        "input_shape": list(SHAPE),
        "dims": DIMS,
        "temperature": 5.0,
        "prior": [0.5, 0.5],
        "preprocess": PREPROCESS,
        "scaling": {"scale": 2.0 / 255.0, "offset": -1.0},
        "config": {},
        "validation": None,
        "parity": None,
        **changes,
    }


def metadata(values: Mapping[str, Any], weights_digest: str) -> dict[str, str]:
    """The metadata that an exporter puts into the score graph."""
    own = {
        key: value
        for key, value in values.items()
        if key not in ("graphs", "sha256", "validation", "scanners")
    }
    own |= {"graph": "score", "weights": {"file": "weights.data", "sha256": weights_digest}}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in own.items()}


def score_graph(
    batch: str | int = "batch",
    image: str = "image",
    output: int = TensorProto.DOUBLE,
    shape: tuple[int, ...] = SHAPE,
    seed: int = 0,
) -> onnx.ModelProto:
    """Flatten, multiply, cast, add."""
    nodes = [
        helper.make_node("Flatten", [image], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Cast", ["product"], ["wide"], to=output),
        helper.make_node("Add", ["wide", "constant"], ["log_probs"]),
    ]
    kind = np.float64 if output == TensorProto.DOUBLE else np.float32
    graph = helper.make_graph(
        nodes,
        "score",
        [helper.make_tensor_value_info(image, TensorProto.FLOAT, [batch, *shape])],
        [helper.make_tensor_value_info("log_probs", output, [batch, 2])],
        [
            numpy_helper.from_array(weights(seed), "weight"),
            numpy_helper.from_array(np.array(-300.0, dtype=kind), "constant"),
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_export(
    folder: Path,
    graph: onnx.ModelProto | None = None,
    props: Mapping[str, str | None] | None = None,
    **changes: Any,
) -> Path:
    """Write an export.

    Args:
        folder: the folder; made if missing.
        graph: takes the place of `score_graph`.
        props: metadata of the graph that differ from those of the document; None takes a key away.
        changes: keys of the document that differ from `document`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph = score_graph() if graph is None else graph
    values = document(**changes)
    file = folder / "score.onnx"
    external = {"save_as_external_data": True, "location": "weights.data", "size_threshold": 64}
    (folder / "weights.data").unlink(missing_ok=True)
    onnx.save(graph, file, **external)
    found = metadata(values, digest(folder / "weights.data")) | dict(props or {})
    graph = onnx.load(file, load_external_data=False)
    helper.set_model_props(graph, {key: value for key, value in found.items() if value is not None})
    file.write_bytes(graph.SerializeToString())
    values = {"sha256": {name: digest(folder / name) for name in ("score.onnx", "weights.data")}} | values
    (folder / "export.json").write_text(json.dumps(values))
    return folder
