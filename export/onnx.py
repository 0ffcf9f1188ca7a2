"""A model as a folder that ONNX Runtime runs: graphs that share weights, a document, and a small program.

The folder is made in a temporary one beside it and renamed when the graphs have been compared with the model.
`export.json` lists every file with its hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from fastflow import __version__
from fastflow._files import replacing_folder, write_text
from fastflow._locks import locked_beside
from fastflow._places import Kind, check_writable, warn_of_low_space, without_mark
from fastflow._places import check_place as check_contents
from fastflow.data.preprocess import GREY_LEVEL
from fastflow.decision import check_prior
from fastflow.errors import ExportError
from fastflow.models.checkpoint import CONFIG
from fastflow.models.magic_flow import MagicFlow
from fastflow.novelty import KEY
from fastflow.runtime.export_folder import DOCUMENT, FORMAT

from ._trace import trace
from .bundle import write_bundle
from .graphs import GRAPHS, PRECISIONS, Parts, fold
from .latent_scores import ScoreWithLatentsGraph
from .verify import Parity, verify

WEIGHTS, BUNDLE = "weights.data", "runtime.pyz"
OPSETS = (21,)
# Older exporters of PyTorch have neither opset 21 nor nodes that stand for another function.
OLDEST_TORCH = (2, 8)
# A tensor of fewer bytes stays in the graph.
EXTERNAL_BYTES = 1024
# Runtimes map external data into memory, from multiples of a page.
PAGE = 4096
EXPORT = Kind("an earlier export", "an export needs a folder of its own")
# These keys of `export.json` are about the folder, or long, and stay out of the metadata of the graphs.
NOT_IN_GRAPHS = ("sha256", "graphs", "validation", "images", KEY)


@dataclasses.dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        folder: the export folder.
        sizes: bytes of each of its files.
        checkpoint_bytes: bytes of the model's weights file.
        parity: how the graphs compare with the model; None where they were not compared.
    """

    folder: Path
    sizes: dict[str, int]
    checkpoint_bytes: int
    parity: Parity | None


def export_onnx(
    model: str | PathLike[str],
    out: str | PathLike[str],
    graphs: Sequence[str] = tuple(GRAPHS),
    precision: str = "float32",
    opset: int = 21,
    *,
    prior: Sequence[float] | None = None,
    images: NDArray[np.uint8] | None = None,
    limit: float | None = None,
    check: bool = True,
    overwrite: bool = False,
    lock: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Exported:
    """Export a trained model to ONNX and compare the graphs with it.

    Args:
        model: a model folder.
        out: folder to write, new, empty, or with `overwrite` an earlier export.
        graphs: which graphs, of ``"score"``, ``"sample"``, ``"latent"`` and ``"attribution"``. They share one
            file of weights.
        precision: see `fastflow.export.graphs.fold`.
        opset: version of ONNX' operators; 21.
        prior: (K,) probabilities of the labels that predictions of the export start from; uniform when None.
        images: (N, C, H, W) uint8 to compare on; coronal slices of the heads that ship with the package when
            None.
        limit: largest error of a log-odds in nats that is accepted; `fastflow.export.verify.LIMITS` of the
            precision when None.
        check: compare the graphs with the model. Without it the export says that nothing is known of its
            errors.
        overwrite: replace an earlier export.
        lock: hold the place of the folder; without it, the caller sees to it that nothing else writes there.
        progress: called with (name of the stage, steps done, steps in all).

    Raises:
        CheckpointError: the model folder is not usable.
        OutputFolderError: `out` holds something else, or anything where `overwrite` is not set; another run
            writes there.
        OSError: the folder cannot be written, or the disk is full; an earlier export stays.
        ExportError: the graphs differ from the model by more than the limit, or PyTorch is too old. Nothing
            is left of them.
        ValueError: an argument does not fit; the message names it.
    """
    _check_arguments(graphs, precision, opset)
    out = Path(out)
    check_place(out, overwrite)
    tell = progress or (lambda stage, done, total: None)
    flow = MagicFlow.load(model)
    document = _describe(flow, Path(model), precision, opset, prior)
    weights = _weights_of(Path(model))
    # An export keeps half of the weights and more.
    warn_of_low_space(out.resolve().parent, weights // 2)
    with _place_held(out, overwrite, lock), replacing_folder(out) as folder:
        models = _trace_all(flow, graphs, precision, opset, tell)
        document["graphs"] = {name: f"{name}.onnx" for name in models}
        write_weights(models.values(), folder)
        write_bundle(folder / BUNDLE)
        _write(models, document, folder)
        parity = None
        if check:
            parity = verify(
                folder, flow, images, limit=limit, progress=lambda done, total: tell("compare", done, total)
            )
            if not parity.passed:
                raise ExportError(
                    f"{out}: not written, because the graphs differ from the model: {parity.failure}"
                )
            document["parity"] = parity.to_dict()
            _write(models, document, folder)
    sizes = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    return Exported(out, sizes, weights, parity)


@contextlib.contextmanager
def _place_held(out: Path, overwrite: bool, lock: bool) -> Iterator[None]:
    with locked_beside(out, lock):
        # Another export may have come and gone before the lock was taken.
        check_place(out, overwrite)
        yield


def _weights_of(model: Path) -> int:
    """Bytes of a model's weights file."""
    document = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    return (model / document["weights"]).stat().st_size


def _check_arguments(graphs: Sequence[str], precision: str, opset: int) -> None:
    if not graphs or len(set(graphs)) < len(graphs) or not set(graphs) <= set(GRAPHS):
        raise ValueError(
            f"graphs must be some of {', '.join(GRAPHS)}, each once, got {', '.join(graphs) or 'none'}"
        )
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if opset not in OPSETS:
        raise ValueError(f"opset must be {' or '.join(map(str, OPSETS))}, got {opset}")
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise ExportError(
            f"export needs PyTorch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is {torch.__version__}"
        )


def check_place(out: Path, overwrite: bool) -> None:
    """Check that an export can be put into a folder.

    Raises:
        OutputFolderError: it holds something else, or an earlier export where `overwrite` is not set.
        OSError: it cannot be written, or the disk is full.
    """
    check_contents(out, EXPORT, without_mark(DOCUMENT), overwrite)
    check_writable(out.resolve().parent)


def _describe(
    model: MagicFlow, folder: Path, precision: str, opset: int, prior: Sequence[float] | None
) -> dict[str, Any]:
    """The content of `export.json`, without the keys that are known only when the graphs are written."""
    config, classes = model.config, model.config.num_classes
    # A prior that does not fit is reported before the graphs are traced.
    checked_prior = check_prior([1.0 / classes] * classes if prior is None else prior, classes)
    content = (folder / CONFIG).read_bytes()
    return {
        "format": FORMAT,
        "fastflow_version": __version__,
        "model_hash": hashlib.sha256(content).hexdigest()[:16],
        "weights_sha256": json.loads(content)["sha256"],
        "precision": precision,
        "opset": opset,
        "class_names": list(config.class_names or map(str, range(classes))),
        "input_shape": list(config.input_shape),
        "dims": config.num_dims,
        "temperature": model.temperature,
        "prior": checked_prior.tolist(),
        "preprocess": model.metadata.get("preprocess"),
        "scaling": {"scale": GREY_LEVEL, "offset": -1.0},
        "config": config.to_dict(),
        "validation": model.metadata.get("validation"),
        "images": model.metadata.get("images"),
        "readout": model.metadata.get("readout"),
        "calibration": model.metadata.get("calibration"),
        KEY: model.metadata.get(KEY),
        "parity": None,
    }


def _trace_all(
    model: MagicFlow, graphs: Sequence[str], precision: str, opset: int, tell: Callable[[str, int, int], None]
) -> dict[str, ir.Model]:
    constants, parts = fold(model, precision), Parts()
    functions: dict[Any, ir.Function] = {}
    models = {}
    for done, name in enumerate(graphs):
        tell("export", done, len(graphs))
        # A model that knows its scanners tells others by its latents.
        kind = ScoreWithLatentsGraph if name == "score" and model.metadata.get(KEY) else GRAPHS[name]
        models[name] = trace(kind(model, constants, parts), functions, opset)
    tell("export", len(graphs), len(graphs))
    return models


# -- files ---------------------------------------------------------------------------------------------------


def write_weights(models: Iterable[ir.Model], folder: Path) -> None:
    """Move the large constants of all models into one file, each once however many graphs hold it."""
    offsets: dict[bytes, int] = {}
    with open(folder / WEIGHTS, "wb") as stream:
        for model in models:
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < EXTERNAL_BYTES:
                    continue
                content = tensor.tobytes()
                digest = hashlib.sha256(content).digest()
                if digest not in offsets:
                    stream.write(b"\0" * (-stream.tell() % PAGE))
                    offsets[digest] = stream.tell()
                    stream.write(content)
                value.const_value = ir.ExternalTensor(
                    WEIGHTS,
                    offsets[digest],
                    len(content),
                    tensor.dtype,
                    shape=ir.Shape(list(tensor.numpy().shape)),
                    name=value.name or "",
                    base_dir=folder,
                )
    if not offsets:
        (folder / WEIGHTS).unlink()


def _write(models: dict[str, ir.Model], document: dict[str, Any], folder: Path) -> None:
    """Write the graphs with their metadata, and last the document that lists them."""
    weights = folder / WEIGHTS
    digests = {WEIGHTS: file_hash(weights)} if weights.exists() else {}
    known = {key: value for key, value in document.items() if key not in NOT_IN_GRAPHS}
    known["weights"] = {"file": WEIGHTS, "sha256": digests[WEIGHTS]} if digests else None
    for name, model in models.items():
        values = {**known, "graph": name}
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
        model.metadata_props.clear()
        model.metadata_props.update(text)
        model.producer_name, model.producer_version = "fastflow", __version__
        file = folder / f"{name}.onnx"
        ir.save(model, file)
        digests[file.name] = file_hash(file)
    write_text(folder / DOCUMENT, json.dumps({**document, "sha256": digests}, indent=1) + "\n")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
