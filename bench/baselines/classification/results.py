"""The document of a run: predictions on each set, what chose them, and what they cost."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.files import replacing
from fastflow import __version__
from fastflow.data.slices import SliceSet
from fastflow.errors import OutputFolderError
from fastflow.evaluation.metrics import probability_metrics

KIND, FORMAT = "fastflow-classification-run", 1
# Probabilities are written with so many digits.
DIGITS = 8


def set_document(data: SliceSet, probabilities: NDArray[np.float64], root: Path) -> dict[str, Any]:
    """Predictions and figures on one set.

    Args:
        data: V volumes with labels.
        probabilities: (V, K).
        root: paths are written relative to it.
    """
    return {
        "metrics": probability_metrics(data.volume_labels, probabilities, data.class_names),
        "paths": [os.path.relpath(path, root) for path in data.paths],
        "subjects": list(data.subjects),
        "labels": [int(label) for label in data.volume_labels],
        "probabilities": [[float(f"{p:.{DIGITS}g}") for p in row] for row in probabilities],
    }


def versions() -> dict[str, str]:
    """The versions of what computed."""
    found = {"fastflow": __version__, "python": platform.python_version()}
    for name in ("torch", "timm", "torchvision", "numpy", "scikit-learn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def write_run(path: Path, document: Mapping[str, Any]) -> None:
    """Write a run's document whole."""
    text = json.dumps({"kind": KIND, "format": FORMAT, **document}, indent=1) + "\n"
    with replacing(path) as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def read_run(path: Path) -> dict[str, Any] | None:
    """A run's document; None where the file is of another kind.

    Raises:
        ValueError: the file is no JSON, or of a format that this version does not know.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != KIND:
        return None
    if document.get("format") != FORMAT:
        raise ValueError(f"{path}: has format {document.get('format')!r}, this version reads {FORMAT}")
    return document


def check_finished(path: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a finished run lies at a path.

    Args:
        path: of its document.
        wanted: what identifies the run that is about to start.

    Raises:
        OutputFolderError: the file is no run, or one of other settings; the message names those.
    """
    if not path.exists():
        return False
    document = read_run(path)
    if document is None:
        raise OutputFolderError(f"{path}: is no result of a run; name another folder")
    differ = [key for key, value in wanted.items() if document.get(key) != _as_json(value)]
    if differ:
        raise OutputFolderError(
            f"{path}: is the result of a run with another {', '.join(differ)}; "
            "name another folder, or replace it with --overwrite"
        )
    return True


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def run_name(method: str, start: str, budget: str, fold: int, folds: int, seed: int) -> str:
    """The file name of a run, which tells runs of a campaign apart."""
    parts: Sequence[str] = (method, start, budget, f"fold{fold}of{folds}", f"seed{seed}")
    return "-".join(part.replace(" ", "_").replace("/", "_") for part in parts if part) + ".json"
