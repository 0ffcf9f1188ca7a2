"""An export as a folder: reading its `export.json`, and checking its files against it. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from fastflow.data.preprocess import Preprocess
from fastflow.data.training_images import TrainingImages, training_images
from fastflow.decision import accepted_range, check_prior
from fastflow.errors import ExportError
from fastflow.novelty import KnownScanners, known_scanners

FORMAT = 1
DOCUMENT = "export.json"
LINK_TO_NOTHING = "is a link whose target is missing: fetch its content (git annex get, dvc pull)"
# Every graph carries these keys of the document too, with the same values.
SHARED_KEYS = (
    *("format", "model_hash", "weights_sha256", "precision", "class_names", "input_shape", "dims"),
    *("temperature", "prior", "preprocess"),
)


@dataclasses.dataclass(frozen=True)
class Export:
    """The content of the ``export.json`` of a folder.

    Attributes:
        folder: the folder.
        document: all of it.
        class_names: K names.
        input_shape: (C, H, W) of an image.
        dims: D, elements of an image.
        temperature: divides log-likelihoods in the posterior.
        prior: (K,) probabilities of the labels.
        preprocess: how volumes become images; None where the model does not know.
        validation: sorted log-likelihoods a slice of validation data under their predicted label, None where
            unknown.
        validation_slices: the choice of slices that those values belong to.
        precision: ``"float32"`` or ``"mixed"``.
        model_hash: identifies the model that was exported.
        images: statistics of the images of training, None where unknown.
        accepted: lowest and highest log-likelihood that is not flagged, see `DecisionRule`.
        scanners: how the scanners of training look, None where unknown.
    """

    folder: Path
    document: dict[str, Any]
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    dims: int
    temperature: float
    prior: tuple[float, ...]
    preprocess: Preprocess | None
    validation: tuple[float, ...] | None
    validation_slices: str | None
    precision: str
    model_hash: str
    images: TrainingImages | None = None
    accepted: tuple[float, float] | None = None
    scanners: KnownScanners | None = None

    @property
    def path(self) -> Path:
        """The document's file."""
        return self.folder / DOCUMENT

    @property
    def own_preprocess(self) -> Preprocess:
        """How volumes become images.

        Raises:
            ExportError: the model does not know.
        """
        if self.preprocess is None:
            raise ExportError(
                f"{self.path} does not say how images are prepared, so volumes cannot be read; "
                "score arrays instead"
            )
        return self.preprocess

    def comparable(self, slices: str) -> tuple[float, ...] | None:
        """The validation values, if they are of this choice of slices: others have other likelihoods."""
        return self.validation if self.validation_slices == slices else None

    def file(self, graph: str, verify: bool = True) -> Path:
        """A graph's file, after its hash and that of the weights beside it have been checked.

        Args:
            graph: ``"score"``, ``"sample"``, ``"latent"`` or ``"attribution"``.
            verify: compare hashes; without it, files only have to be readable.

        Raises:
            ExportError: the graph was not exported, a file is missing, or has another hash than the document
                records.
        """
        graphs, digests = self.document["graphs"], self.document["sha256"]
        if graph not in graphs:
            raise ExportError(
                f"{self.folder} holds no {graph} graph, only {', '.join(graphs)}: "
                f"export it with --graphs {graph}"
            )
        # The other graphs are not needed and may be absent.
        names = [graphs[graph], *(name for name in digests if name not in graphs.values())]
        for name in names:
            self._check_file(name, digests, verify)
        return self.folder / graphs[graph]

    def _check_file(self, name: str, digests: Mapping[str, str], verify: bool) -> None:
        path = self.folder / name
        if name not in digests:
            raise ExportError(f"{self.path} has no sha256 of {name}")
        try:
            with open(path, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest() if verify else digests[name]
        except FileNotFoundError:
            reason = LINK_TO_NOTHING if path.is_symlink() else f"is missing: {DOCUMENT} lists it"
            raise ExportError(f"{path} {reason}") from None
        except OSError as error:
            raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
        if digest != digests[name]:
            raise ExportError(f"{path} has sha256 {digest}, but {DOCUMENT} records {digests[name]}")


def read_export(folder: str | PathLike[str]) -> Export:
    """Read the ``export.json`` of a folder. Graphs and weights are not looked at.

    Raises:
        ExportError: the folder is no export, or its document is not usable.
    """
    folder = Path(folder)
    path = folder / DOCUMENT
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        reason = f"no {DOCUMENT} in it" if folder.is_dir() else "no such folder"
        reason = f"{DOCUMENT} {LINK_TO_NOTHING}" if path.is_symlink() else reason
        raise ExportError(f"{folder} is not an export folder: {reason}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise ExportError(f"{path} must have format {FORMAT}, got {found!r}")
    missing = [key for key in (*SHARED_KEYS, "graphs", "sha256", "validation") if key not in document]
    if missing:
        raise ExportError(f"{path} lacks {', '.join(missing)}")
    try:
        return _parse(folder, document)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{path} is not usable: {error}") from error


def _parse(folder: Path, document: dict[str, Any]) -> Export:
    names, shape, preprocess = document["class_names"], document["input_shape"], document["preprocess"]
    files = [*document["graphs"].values(), *document["sha256"]]
    validation = document["validation"] or {}
    in_folder = all(isinstance(file, str) and Path(file).name == file for file in files)
    for name, fits, accepted in (
        ("class_names", is_list_of(names, str) and len(names) > 0, "a list of names"),
        ("input_shape", is_list_of(shape, int) and len(shape) == 3 and min(shape) > 0, "[C, H, W]"),
        ("dims", _is_product(document["dims"], shape), "the product of input_shape"),
        ("graphs and sha256", in_folder, "files of the folder"),
        ("model_hash", isinstance(document["model_hash"], str), "text"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {accepted}")
    temperature = float(document["temperature"])
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return Export(
        folder,
        document,
        tuple(names),
        tuple(shape),
        document["dims"],
        temperature,
        tuple(check_prior(document["prior"], len(names)).tolist()),
        None if preprocess is None else Preprocess.from_dict(preprocess),
        tuple(map(float, validation["log_prob"])) if validation.get("log_prob") else None,
        validation.get("slices"),
        str(document["precision"]),
        document["model_hash"],
        training_images(document),
        accepted_range(validation),
        known_scanners(document),
    )


def is_list_of(value: object, kind: type) -> bool:
    """Whether a JSON value is a list of one type; true and false are no integers."""
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _is_product(dims: object, shape: object) -> bool:
    return isinstance(shape, list) and dims == math.prod(shape)


def check_metadata(export: Export, graph: str, file: Path, found: Mapping[str, str]) -> None:
    """Check that a graph carries its own metadata, and that these agree with the document.

    Args:
        export: the document.
        graph: the graph that the file must hold.
        file: the graph's file, for messages.
        found: its metadata: text as it is, any other value as JSON.

    Raises:
        ExportError: a key is missing, or has another value than in the document.
    """
    missing = [key for key in (*SHARED_KEYS, "graph", "weights") if key not in found]
    if missing:
        raise ExportError(
            f"{file} has no metadata {', '.join(missing)}: "
            "it is not from this exporter, or they were stripped"
        )
    digests = export.document["sha256"]
    wanted = {key: export.document[key] for key in SHARED_KEYS} | {"graph": graph}
    for key, value in wanted.items():
        text = found[key]
        try:
            same = (text if isinstance(value, str) else json.loads(text)) == value
        except ValueError:
            same = False
        if not same:
            raise ExportError(
                f"{file} has {key} {text}, but {DOCUMENT} says {value}: they are of two exports"
            )
    try:
        weights = json.loads(found["weights"])
        if weights is not None and digests.get(weights["file"]) != weights["sha256"]:
            raise ExportError(
                f"{file} belongs to weights {weights['sha256']}, which are not those of {DOCUMENT}"
            )
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ExportError(
            f"{file} has metadata weights {found['weights']!r}, which is no file with its sha256"
        ) from error
