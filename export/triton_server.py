"""A model repository for NVIDIA's Triton Inference Server (ONNX Runtime backend), made from an export folder.

Each graph of the export becomes one model with everything that it needs, so that it can be loaded, moved or
left out alone:

    REPOSITORY/magic_flow_score/config.pbtxt
    REPOSITORY/magic_flow_score/labels.txt
    REPOSITORY/magic_flow_score/1/model.onnx
    REPOSITORY/magic_flow_score/1/weights.data

The weights are copied for each model and their hash is checked on the way. Links would save the space and
break the export: ONNX Runtime refuses a symbolic link that leads out of the model's folder, `onnx` refuses to
load a file with several hard links (also the original), and a change made to one name would reach every model
under a hash that nobody checks again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from fastflow._files import replacing, replacing_folder, write_bytes, write_text
from fastflow._locks import locked_beside
from fastflow._places import Kind, check_place, check_writable
from fastflow.errors import ExportError
from fastflow.runtime.export_folder import DOCUMENT, read_export

from .model_config import HEADER, LABELS, ServedTensor, Serving, model_config

GRAPHS = ("score", "latent", "sample", "attribution")
DATA_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.DOUBLE: "TYPE_FP64",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
# A client needs these to prepare images and to judge the answers; the server gives them out at
# /v2/models/NAME/config.
DESCRIBED_KEYS = (
    *("fastflow_version", "model_hash", "weights_sha256", "precision"),
    *("class_names", "temperature", "prior", "scaling", "preprocess"),
)
CONFIG = "config.pbtxt"
COPY_CHUNK_BYTES = 1 << 22
REPOSITORY = Kind("an earlier model repository", "the models need a folder of their own")


def write_model_repository(
    export_folder: str | PathLike[str],
    repository: str | PathLike[str],
    *,
    name: str = "magic_flow",
    max_batch: int = 16,
    instances: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    lock: bool = True,
) -> Path:
    """Write a model repository with one model for each graph of an export.

    It is made in a temporary folder beside its place and renamed when it is whole; where anything fails,
    nothing is left of it, and an earlier repository stays. It takes the space of the export once for each
    graph.

    Args:
        export_folder: a folder that `fastflow export` wrote.
        repository: the folder to write, new, empty, or with `overwrite` an earlier one of the same `name`.
        name: models are called ``NAME_score``, ``NAME_latent`` and so on.
        max_batch: largest batch in images; larger requests are errors, smaller ones are put together.
        instances: copies of a model on each device, each with its own weights in memory and its own threads;
            one when None.
        device: ``"auto"`` (GPUs where the server sees any), ``"cpu"`` or ``"cuda"``.
        overwrite: replace an earlier repository.
        lock: hold the place of the repository; without it, the caller sees to it that nothing else writes
            there.

    Returns:
        The repository's absolute path.

    Raises:
        ExportError: the folder is not an export, is damaged or was changed, or has class names that labels
            cannot hold.
        OutputFolderError: the repository holds something else, or anything where `overwrite` is not set;
            another run writes there, or it cannot be put there.
        OSError: the place cannot be written, or the disk is full; an earlier repository stays.
        ValueError: an argument is out of its range.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ValueError(
            "name must be of letters, digits, '_', '-' and '.', and start with a letter or digit, "
            f"got {name!r}"
        )
    serving = Serving(max_batch, 1 if instances is None else instances, device)
    export = _CheckedExport(Path(export_folder))
    place = Path(repository).resolve()
    check_repository(place, name, overwrite)
    with locked_beside(place, lock):
        # Another run may have come and gone before the lock was taken.
        check_repository(place, name, overwrite)
        _write_models(export, place, name, serving)
    return place


def _write_models(export: _CheckedExport, place: Path, name: str, serving: Serving) -> None:
    with replacing_folder(place) as new:
        for graph in export.graphs:
            _write_model(export, graph, new / f"{name}_{graph}", serving)


class _CheckedExport:
    """An export folder whose files are checked against their recorded hashes when they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document = read_export(folder).document
        missing = [key for key in DESCRIBED_KEYS if key not in self.document]
        if missing:
            raise ExportError(f"{folder / DOCUMENT} lacks {', '.join(missing)}")
        self.graphs: dict[str, str] = self.document["graphs"]
        if not self.graphs or not self.graphs.keys() <= set(GRAPHS):
            raise ExportError(
                f"{folder / DOCUMENT}: graphs must be some of {', '.join(GRAPHS)}, "
                f"got {', '.join(self.graphs) or 'none'}"
            )
        self.class_names: list[str] = self.document["class_names"]
        for label in self.class_names:
            if "\n" in label or "\r" in label:
                raise ExportError(
                    f"{folder / DOCUMENT}: a class name must be one line to be a label, got {label!r}"
                )

    def _chunks(self, file: str) -> Iterator[bytes]:
        """A file's content in pieces. Raises at the end if its hash is not the recorded one."""
        recorded = self.document["sha256"].get(file)
        if recorded is None or Path(file).name != file:
            raise ExportError(
                f"{self.folder / DOCUMENT} must record the hash of each file of its folder, "
                f"has none of {file!r}"
            )
        digest = hashlib.sha256()
        try:
            with open(self.folder / file, "rb") as stream:
                while chunk := stream.read(COPY_CHUNK_BYTES):
                    digest.update(chunk)
                    yield chunk
        except OSError as error:
            raise ExportError(f"{self.folder / file} cannot be read: {error}") from error
        if digest.hexdigest() != recorded:
            raise ExportError(
                f"{self.folder / file} has sha256 {digest.hexdigest()}, but {DOCUMENT} records {recorded}"
            )

    def read(self, file: str) -> bytes:
        """A file's content."""
        return b"".join(self._chunks(file))

    def copy(self, file: str, target: Path) -> None:
        """Copy a file."""
        with replacing(target) as stream:
            for chunk in self._chunks(file):
                stream.write(chunk)


def check_repository(
    repository: str | PathLike[str], name: str = "magic_flow", overwrite: bool = False
) -> None:
    """Check that a model repository can be put into a folder.

    Args:
        repository: see `write_model_repository`.
        name: see `write_model_repository`.
        overwrite: see `write_model_repository`.

    Raises:
        OutputFolderError: it holds something else, or an earlier repository where `overwrite` is not set.
        OSError: it cannot be written, or the disk is full.
    """
    place, models = Path(repository), {f"{name}_{graph}" for graph in GRAPHS}

    def others(here: Sequence[str]) -> list[str]:
        return [entry for entry in here if entry not in models or not _is_ours(place / entry)]

    check_place(place, REPOSITORY, others, overwrite)
    check_writable(place.resolve().parent)


def _is_ours(model: Path) -> bool:
    try:
        with open(model / CONFIG, encoding="utf-8", errors="replace") as stream:
            return stream.readline(len(HEADER) + 1).rstrip("\n") == HEADER
    except OSError:
        return False


def _write_model(export: _CheckedExport, graph: str, folder: Path, serving: Serving) -> None:
    file = export.graphs[graph]
    content = export.read(file)
    try:
        model = onnx.load_model_from_string(content)
    except DecodeError as error:
        raise ExportError(f"{export.folder / file} is not an ONNX graph: {error}") from error
    constants = {tensor.name for tensor in model.graph.initializer}
    path = export.folder / file
    inputs = [_tensor(value, path) for value in model.graph.input if value.name not in constants]
    outputs = [_tensor(value, path) for value in model.graph.output]
    # The correlations that a model with known scanners gives come after the log-likelihoods.
    if graph == "score" and [output.dims for output in outputs[:1]] != [(len(export.class_names),)]:
        found = ", ".join(f"{output.name} {list(output.dims)}" for output in outputs)
        raise ExportError(
            f"{export.folder / file} must give one number for each of the {len(export.class_names)} classes, "
            f"gives {found}"
        )
    version = folder / "1"
    version.mkdir(parents=True)
    write_bytes(version / "model.onnx", content)
    for location in sorted(_external_files(model)):
        export.copy(location, version / location)
    if graph == "score":
        write_text(folder / LABELS, "".join(f"{label}\n" for label in export.class_names))
    described = {key: export.document[key] for key in DESCRIBED_KEYS}
    write_text(folder / CONFIG, model_config(folder.name, graph, inputs, outputs, serving, described))


def _tensor(value: onnx.ValueInfoProto, path: Path) -> ServedTensor:
    tensor = value.type.tensor_type
    batch, *rest = tensor.shape.dim or [None]
    if batch is None or not batch.dim_param or any(dim.dim_value < 1 for dim in rest):
        found = ", ".join(dim.dim_param or str(dim.dim_value) for dim in tensor.shape.dim)
        raise ExportError(
            f"{path}: {value.name} must have a named batch dimension and fixed others, got ({found})"
        )
    data_type = DATA_TYPES.get(tensor.elem_type)
    if data_type is None:
        found = onnx.TensorProto.DataType.Name(tensor.elem_type)
        raise ExportError(f"{path}: {value.name} must be float32, float64 or int64, got {found}")
    return ServedTensor(value.name, data_type, tuple(dim.dim_value for dim in rest))


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for entry in tensor.external_data
        if entry.key == "location"
    }
