"""An export made by hand with all four graphs, and the configurations that a server should get of it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from fastflow.export.triton_server import GRAPHS
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

NAMES = ["AD", 'said "so"\\', "gesund \N{LATIN SMALL LETTER A WITH DIAERESIS}", ""]
SHAPE = (1, 2, 3)
DIMS = 6
# Type and shape of a sample, of the inputs and outputs of each graph.
SIGNATURES = {
    "score": ({"image": ("FP32", SHAPE)}, {"log_probs": ("FP64", (len(NAMES),))}),
    "latent": (
        {"image": ("FP32", SHAPE), "label": ("INT64", ())},
        {"z": ("FP32", (DIMS,)), "logdet": ("FP64", ())},
    ),
    "sample": ({"z": ("FP32", (DIMS,)), "label": ("INT64", ())}, {"image": ("FP32", SHAPE)}),
    "attribution": (
        {"image": ("FP32", SHAPE), "label": ("INT64", ())},
        {"map": ("FP32", SHAPE), "constant": ("FP64", ())},
    ),
}
ELEMENTS = {"FP32": TensorProto.FLOAT, "FP64": TensorProto.DOUBLE, "INT64": TensorProto.INT64}
NODES = {
    "score": [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"]),
        helper.make_node("Cast", ["product"], ["log_probs"], to=TensorProto.DOUBLE),
    ],
    "latent": [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "square"], ["z"]),
        helper.make_node("Cast", ["label"], ["logdet"], to=TensorProto.DOUBLE),
    ],
    "sample": [
        helper.make_node("Cast", ["label"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["number", "axis"], ["column"]),
        helper.make_node("Add", ["z", "column"], ["shifted"]),
        helper.make_node("Reshape", ["shifted", "shape"], ["image"]),
    ],
    "attribution": [
        helper.make_node("Identity", ["image"], ["map"]),
        helper.make_node("Cast", ["label"], ["constant"], to=TensorProto.DOUBLE),
    ],
}
RANDOM = np.random.default_rng(0)
CONSTANTS = {
    "score": {"weight": RANDOM.standard_normal((DIMS, len(NAMES))).astype(np.float32)},
    "latent": {"square": RANDOM.standard_normal((DIMS, DIMS)).astype(np.float32)},
    "sample": {"axis": np.array([1]), "shape": np.array([-1, *SHAPE])},
    "attribution": {},
}


def make_graph(graph: str, batch: str | int = "batch") -> onnx.ModelProto:
    ins, outs = (
        [
            helper.make_tensor_value_info(name, ELEMENTS[kind], [batch, *dims])
            for name, (kind, dims) in part.items()
        ]
        for part in SIGNATURES[graph]
    )
    constants = [numpy_helper.from_array(value, name) for name, value in CONSTANTS[graph].items()]
    built = helper.make_graph(NODES[graph], graph, ins, outs, constants)
    return helper.make_model(built, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def make_export(folder: Path, kept: tuple[str, ...] = GRAPHS, **changes: Any) -> Path:
    """Write an export, float constants as external weights. None as a change takes a key out."""
    folder.mkdir(parents=True)
    data = bytearray()
    for graph in kept:
        model = make_graph(graph)
        for tensor in model.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                onnx.external_data_helper.set_external_data(
                    tensor, "weights.data", len(data), len(tensor.raw_data)
                )
                data += tensor.raw_data
                tensor.ClearField("raw_data")
        (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())
    (folder / "weights.data").write_bytes(data)
    document = {
        "format": 1,
        "fastflow_version": "0.1",
        "model_hash": "0123456789abcdef",
        "weights_sha256": "f" * 64,
        "precision": "float32",
        "graphs": {graph: f"{graph}.onnx" for graph in kept},
        "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()},
        "class_names": NAMES,
        "input_shape": SHAPE,
        "dims": DIMS,
        "temperature": 5.5,
        "prior": [0.25] * 4,
        "preprocess": {"size": SHAPE[1:]},
        "validation": {},
        "scaling": {"scale": 2 / 255, "offset": -1},
    }
    document = {key: value for key, value in (document | changes).items() if value is not None}
    (folder / "export.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def load_schema() -> ModuleType:
    """The client's schema without the client, whose package imports grpc, which needs an old protobuf."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None and package.submodule_search_locations
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCHEMA = load_schema()


def parse(model: Path) -> Any:
    """The configuration of a model's folder."""
    return text_format.Parse((model / "config.pbtxt").read_text(encoding="utf-8"), SCHEMA.ModelConfig())


def expected_config(graph: str, sizes: tuple[int, ...], max_batch: int, count: int, kind: str) -> Any:
    """The configuration that a graph should have, field by field."""
    config = SCHEMA.ModelConfig(name=f"magic_flow_{graph}", backend="onnxruntime", max_batch_size=max_batch)
    for part, target in zip(SIGNATURES[graph], (config.input, config.output), strict=True):
        for name, (data_type, dims) in part.items():
            tensor = target.add(name=name, data_type=f"TYPE_{data_type}", dims=dims or (1,))
            if not dims:
                tensor.reshape.SetInParent()
    if graph == "score":
        config.output[0].label_filename = "labels.txt"
    config.version_policy.latest.num_versions = 1
    if max_batch > 1:
        config.dynamic_batching.preferred_batch_size.extend(sizes)
        config.dynamic_batching.max_queue_delay_microseconds = 2000
    config.instance_group.add(count=count, kind=kind)
    for size in sorted({1, *sizes}):
        warmup = config.model_warmup.add(name=f"zeros, batch of {size}", batch_size=size)
        for name, (data_type, dims) in SIGNATURES[graph][0].items():
            value = SCHEMA.ModelWarmup.Input(data_type=f"TYPE_{data_type}", dims=dims or (1,), zero_data=True)
            warmup.inputs[name].CopyFrom(value)
    parameters = {
        "execution_mode": "0",
        "intra_op_thread_count": "0",
        "fastflow.fastflow_version": "0.1",
        "fastflow.model_hash": "0123456789abcdef",
        "fastflow.weights_sha256": "f" * 64,
        "fastflow.precision": "float32",
        "fastflow.class_names": json.dumps(NAMES),
        "fastflow.temperature": "5.5",
        "fastflow.prior": "[0.25, 0.25, 0.25, 0.25]",
        "fastflow.scaling": json.dumps({"scale": 2 / 255, "offset": -1}),
        "fastflow.preprocess": json.dumps({"size": SHAPE[1:]}),
    }
    for key, text in parameters.items():
        config.parameters[key].string_value = text
    return config
