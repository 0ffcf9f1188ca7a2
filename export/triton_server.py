"""A model repository for NVIDIA's Triton Inference Server (its ONNX Runtime backend), made from an export folder.

Each graph of the export becomes one model with everything that it needs, so that one can be loaded, moved or left out alone:

    REPOSITORY/magic_flow_score/config.pbtxt
    REPOSITORY/magic_flow_score/labels.txt
    REPOSITORY/magic_flow_score/1/model.onnx
    REPOSITORY/magic_flow_score/1/weights.data

The weights are copied for each model and their hash is checked on the way. Links would save the space and break the export:
ONNX Runtime refuses a symbolic link that leads out of the model's folder, `onnx` refuses to load a file with several hard links
(also the original), and a change made to one name would reach every model under a hash that nobody checks again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fastflow._files import replacing, replacing_folder, write_bytes, write_text
from fastflow.errors import ExportError, OutputFolderError

from ._folder import DOCUMENT, read_export

GRAPHS = ("score", "latent", "sample", "attribution")
DEVICES = {"auto": "KIND_AUTO", "cpu": "KIND_CPU", "cuda": "KIND_GPU"}
DATA_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
# What a client needs to prepare images and to judge the answers; the server gives it out at /v2/models/NAME/config.
DESCRIBED = (
    *("fastflow_version", "model_hash", "weights_sha256", "precision"),
    *("class_names", "temperature", "prior", "scaling", "preprocess"),
)
# How long a request waits for others to share a batch with: short beside the work that a batch is.
QUEUE_DELAY_US = 2000
LABELS = "labels.txt"
CONFIG = "config.pbtxt"
# The first line of a configuration, by which a folder is known as one that may be replaced.
HEADER = "# A model of fastflow, written from its ONNX export."
COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    Attributes:
        name: its name.
        data_type: the server's name of its type.
        dims: its shape without the batch dimension; empty where a row is one number.
    """

    name: str
    data_type: str
    dims: tuple[int, ...]

    @property
    def request_dims(self) -> tuple[int, ...]:
        """The row's shape in requests, where no shape may be empty."""
        return self.dims or (1,)


@dataclass(frozen=True)
class Serving:
    """How models are served; see `write_model_repository`."""

    max_batch: int
    instances: int
    device: str

    def __post_init__(self) -> None:
        for name, value in (("max_batch", self.max_batch), ("instances", self.instances)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
                raise ValueError(f"{name} must be a whole number of 1 or more, got {value!r}")
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Sizes to make batches of, ascending: few, because a GPU plans every new one."""
        powers = (2**power for power in range(1, self.max_batch.bit_length()))
        return tuple(sorted({*powers, self.max_batch}))


def write_model_repository(
    export_folder: str | PathLike[str],
    repository: str | PathLike[str],
    *,
    name: str = "magic_flow",
    max_batch: int = 16,
    instances: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
) -> Path:
    """Write a model repository with one model for each graph of an export.

    It is made in a temporary folder beside its place and renamed when it is whole; whatever fails, nothing is left of it, and
    an earlier repository stays. It takes the space of the export once for each graph.

    Args:
        export_folder: what `fastflow export` wrote.
        repository: the folder to write, new, empty, or with `overwrite` an earlier one of the same `name`.
        name: models are called ``NAME_score``, ``NAME_latent`` and so on.
        max_batch: largest batch in images; larger requests are errors, smaller ones are put together.
        instances: copies of a model on each device, each with its own weights in memory and its own threads. None: one.
        device: ``"auto"`` (GPUs where the server sees any), ``"cpu"`` or ``"cuda"``.
        overwrite: replace an earlier repository.

    Returns:
        The repository's absolute path.

    Raises:
        ExportError: the folder is not an export, is damaged or was changed, or has class names that labels cannot hold.
        OutputFolderError: the repository holds something else, or anything where `overwrite` is not set, or cannot be put there.
        ValueError: an argument is out of its range.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name must be of letters, digits, '_', '-' and '.', and start with a letter or digit, got {name!r}")
    serving = Serving(max_batch, 1 if instances is None else instances, device)
    export = _Export(Path(export_folder))
    place = Path(repository).resolve()
    check_repository(place, name, overwrite)
    with replacing_folder(place) as new:
        for graph in export.graphs:
            _write_model(export, graph, new / f"{name}_{graph}", serving)
    return place


class _Export:
    """An export folder, of which every file is checked against its recorded hash when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document = read_export(folder).document
        missing = [key for key in DESCRIBED if key not in self.document]
        if missing:
            raise ExportError(f"{folder / DOCUMENT} lacks {', '.join(missing)}")
        self.graphs: dict[str, str] = self.document["graphs"]
        if not self.graphs or not self.graphs.keys() <= set(GRAPHS):
            raise ExportError(
                f"{folder / DOCUMENT}: graphs must be some of {', '.join(GRAPHS)}, got {', '.join(self.graphs) or 'none'}"
            )
        self.class_names: list[str] = self.document["class_names"]
        for label in self.class_names:
            if "\n" in label or "\r" in label:
                raise ExportError(f"{folder / DOCUMENT}: a class name must be one line to be a label, got {label!r}")

    def _chunks(self, file: str) -> Iterator[bytes]:
        """A file's content. Raises at its end where it is not what was recorded."""
        recorded = self.document["sha256"].get(file)
        if recorded is None or Path(file).name != file:
            raise ExportError(f"{self.folder / DOCUMENT} must record the hash of each file of its folder, has none of {file!r}")
        digest = hashlib.sha256()
        try:
            with open(self.folder / file, "rb") as stream:
                while chunk := stream.read(COPY_BYTES):
                    digest.update(chunk)
                    yield chunk
        except OSError as error:
            raise ExportError(f"{self.folder / file} cannot be read: {error}") from error
        if digest.hexdigest() != recorded:
            raise ExportError(f"{self.folder / file} has sha256 {digest.hexdigest()}, but {DOCUMENT} records {recorded}")

    def read(self, file: str) -> bytes:
        return b"".join(self._chunks(file))

    def copy(self, file: str, target: Path) -> None:
        with replacing(target) as stream:
            for chunk in self._chunks(file):
                stream.write(chunk)


def check_repository(repository: str | PathLike[str], name: str = "magic_flow", overwrite: bool = False) -> None:
    """See that a model repository can be put into a folder.

    Args:
        repository: see `write_model_repository`.
        name: see `write_model_repository`.
        overwrite: see `write_model_repository`.

    Raises:
        OutputFolderError: it holds something else, or an earlier repository where `overwrite` is not set.
    """
    place, models = Path(repository), {f"{name}_{graph}" for graph in GRAPHS}
    if not place.exists():
        return
    if not place.is_dir():
        raise OutputFolderError(f"{place}: must be a folder, it is a file")
    here = sorted(entry.name for entry in place.iterdir())
    others = [entry for entry in here if entry not in models or not _is_ours(place / entry)]
    if others:
        raise OutputFolderError(f"{place}: holds other files, such as {others[0]!r}; the models need a folder of their own")
    if here and not overwrite:
        raise OutputFolderError(f"{place}: holds an earlier model repository; replace it (--overwrite) or name another folder")


def _is_ours(model: Path) -> bool:
    try:
        with open(model / CONFIG, encoding="utf-8", errors="replace") as stream:
            return stream.readline(len(HEADER) + 1).rstrip("\n") == HEADER
    except OSError:
        return False


def _write_model(export: _Export, graph: str, folder: Path, serving: Serving) -> None:
    file = export.graphs[graph]
    content = export.read(file)
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ExportError(f"{export.folder / file} is not an ONNX graph: {error}") from error
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [_tensor(value, export.folder / file) for value in model.graph.input if value.name not in constants]
    outputs = [_tensor(value, export.folder / file) for value in model.graph.output]
    if graph == "score" and [output.dims for output in outputs] != [(len(export.class_names),)]:
        found = ", ".join(f"{output.name} {list(output.dims)}" for output in outputs)
        raise ExportError(
            f"{export.folder / file} must give one number for each of the {len(export.class_names)} classes, gives {found}"
        )
    version = folder / "1"
    version.mkdir(parents=True)
    write_bytes(version / "model.onnx", content)
    for location in sorted(_external_files(model)):
        export.copy(location, version / location)
    if graph == "score":
        write_text(folder / LABELS, "".join(f"{label}\n" for label in export.class_names))
    described = {key: export.document[key] for key in DESCRIBED}
    write_text(folder / CONFIG, _config(folder.name, graph, inputs, outputs, serving, described))


def _tensor(value: onnx.ValueInfoProto, path: Path) -> Tensor:
    tensor = value.type.tensor_type
    batch, *rest = tensor.shape.dim or [None]
    if batch is None or not batch.dim_param or any(dim.dim_value < 1 for dim in rest):
        found = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
        raise ExportError(f"{path}: {value.name} must have a named batch dimension and fixed others, got ({found})")
    data_type = DATA_TYPES.get(tensor.elem_type)
    if data_type is None:
        found = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(f"{path}: {value.name} must be float32, float64 or int64, got {found}")
    return Tensor(value.name, data_type, tuple(dim.dim_value for dim in rest))


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }


class _Word(str):
    """A value of an enumeration, which text format writes without quotes."""

    __slots__ = ()


# A message of text-format protobuf: its fields in order. Tuples are lists of numbers.
_Value = str | int | tuple[int, ...] | list["tuple[str, _Value]"]
_Message = list[tuple[str, _Value]]


def _config(
    name: str, graph: str, inputs: Iterable[Tensor], outputs: Iterable[Tensor], serving: Serving, described: dict[str, Any]
) -> str:
    """A model's `config.pbtxt`."""
    inputs = tuple(inputs)
    message: _Message = [("name", name), ("backend", "onnxruntime"), ("max_batch_size", serving.max_batch)]
    message += [("input", _tensor_message(tensor)) for tensor in inputs]
    labels: _Message = [("label_filename", LABELS)] if graph == "score" else []
    message += [("output", _tensor_message(tensor) + labels) for tensor in outputs]
    message.append(("version_policy", [("latest", [("num_versions", 1)])]))
    if serving.max_batch > 1:
        batching: _Message = [
            ("preferred_batch_size", serving.batch_sizes),
            ("max_queue_delay_microseconds", QUEUE_DELAY_US),
        ]
        message.append(("dynamic_batching", batching))
    message.append(("instance_group", [("count", serving.instances), ("kind", _Word(DEVICES[serving.device]))]))
    message += [("model_warmup", _warmup_message(inputs, size)) for size in sorted({1, *serving.batch_sizes})]
    # The backend's own settings, at their defaults: operators in sequence, one thread for each core.
    parameters = {"execution_mode": "0", "intra_op_thread_count": "0"}
    parameters |= {f"fastflow.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in described.items()}
    message += [("parameters", [("key", key), ("value", [("string_value", value)])]) for key, value in parameters.items()]
    return "\n".join([HEADER, *(COMMENTS if graph == "score" else ()), *_lines(message), ""])


COMMENTS = (
    "# log_probs are log p(image | class) in nats. A client that asks for `classification` of this output gets texts",
    "# 'VALUE:INDEX:CLASS', largest VALUE first: VALUE is the log-likelihood, and the first is the most probable class under a",
    "# uniform prior. For other priors ask for the numbers: posterior = softmax(log_probs / temperature + log prior).",
)


def _tensor_message(tensor: Tensor) -> _Message:
    message: _Message = [
        ("name", tensor.name),
        ("data_type", _Word(tensor.data_type)),
        ("dims", tensor.request_dims),
    ]
    if not tensor.dims:
        message.append(("reshape", [("shape", ())]))
    return message


def _warmup_message(inputs: Iterable[Tensor], batch_size: int) -> _Message:
    # Zeros are a valid image, latent and label. The server's random data are random bits, with NaN among them.
    message: _Message = [("name", f"zeros, batch of {batch_size}"), ("batch_size", batch_size)]
    for tensor in inputs:
        value: _Message = [("data_type", _Word(tensor.data_type)), ("dims", tensor.request_dims), ("zero_data", True)]
        message.append(("inputs", [("key", tensor.name), ("value", value)]))
    return message


def _lines(message: _Message, indent: str = "") -> Iterator[str]:
    for name, value in message:
        if isinstance(value, list):
            yield f"{indent}{name} {{"
            yield from _lines(value, indent + "  ")
            yield f"{indent}}}"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: str | int | tuple[int, ...]) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not isinstance(value, _Word):
        return _quoted(value)
    return str(value)


def _quoted(text: str) -> str:
    """A string of text format: printable ASCII as it is, every other byte of its UTF-8 in octal."""
    escapes = {ord('"'): '\\"', ord("\\"): "\\\\"}
    content = text.encode("utf-8", "backslashreplace")
    return '"' + "".join(escapes.get(byte, chr(byte) if 32 <= byte < 127 else f"\\{byte:03o}") for byte in content) + '"'
