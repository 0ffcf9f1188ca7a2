"""A model as a folder: `config.json` and one safetensors file named after its hash.

`config.json` is replaced last and names the weights that belong to it, so a reader sees the old model or the
new one, whenever the writer stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors

from fastflow import __version__
from fastflow._files import write_bytes, write_text
from fastflow.decision import check_temperature
from fastflow.errors import CheckpointError
from fastflow.models.config import FlowConfig

FORMAT = 1
CONFIG = "config.json"
MAX_DEPTH = 100


class Checkpoint(NamedTuple):
    """The content of a model folder.

    Attributes:
        config: the architecture.
        state: the state dict.
        temperature: of the posterior.
        metadata: JSON values.
    """

    config: FlowConfig
    state: Mapping[str, torch.Tensor]
    temperature: float
    metadata: dict[str, Any]


def write(folder: str | PathLike[str], model: Checkpoint) -> None:
    """Write a model folder, atomically: a reader sees the old model or the new one.

    Raises:
        CheckpointError: weights or the temperature are not finite, the temperature is not positive, or the
            metadata are no JSON. Nothing is written then.
    """
    folder = Path(folder)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state.items()}
    _check_finite(f"the model cannot be saved in {folder}", state)
    content = format_tensors(state)
    digest = hashlib.sha256(content).hexdigest()
    weights = f"model-{digest[:16]}.safetensors"
    text = _document(folder, model, weights, digest)
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / weights, content)
    write_text(folder / CONFIG, text)
    for old in folder.glob("model-*.safetensors"):
        if old.name != weights:
            old.unlink()


def _document(folder: Path, model: Checkpoint, weights: str, digest: str) -> str:
    """The text of `config.json`."""
    refusal = f"the model cannot be saved in {folder}"
    try:
        temperature = _finite_temperature(model.temperature)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{refusal}: {error}") from error
    document = {
        "format": FORMAT,
        "fastflow_version": __version__,
        "config": model.config.to_dict(),
        "weights": weights,
        "sha256": digest,
        "temperature": temperature,
        "metadata": model.metadata,
    }
    try:
        return json.dumps(document, indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        fault = _not_json(model.metadata, "metadata") or str(error)
        raise CheckpointError(f"{refusal}: {fault}") from error


def _finite_temperature(temperature: float) -> float:
    value = float(check_temperature(temperature))
    if math.isinf(value):
        raise ValueError(f"temperature must be finite, got {value}")
    return value


def _not_json(value: Any, name: str, depth: int = 0) -> str:
    """The entry of `value` that is no JSON, and what it is; empty where all is JSON."""
    if depth > MAX_DEPTH:
        return f"{name[:60]}... is nested in more than {MAX_DEPTH} levels, or in itself"
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        wrong = [key for key in value if key is not None and not isinstance(key, (str, int))]
        if wrong:
            return f"a key of {name} must be a string, got {wrong[0]!r}"
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    elif isinstance(value, float) and not math.isfinite(value):
        return f"{name} must be finite, got {value}, which JSON has no number for; leave it out, or put None"
    elif value is not None and not isinstance(value, (str, int, float)):
        return f"{name} must be a JSON value (a string, number, list, dict or None), got {value!r:.60}"
    return next(filter(None, (_not_json(item, f"{name}[{key!r}]", depth + 1) for key, item in items)), "")


def _check_finite(refusal: str, state: Mapping[str, torch.Tensor]) -> None:
    """Raise CheckpointError where tensors hold NaN or infinity; it names the first."""
    wrong = [
        name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if wrong:
        shown = ", ".join(wrong[:3]) + (", ..." if len(wrong) > 3 else "")
        raise CheckpointError(
            f"{refusal}: {len(wrong)} of its {len(state)} tensors hold NaN or infinity ({shown}), and so "
            "would every score; train again, or go back to weights that are finite"
        )


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read a model folder.

    Raises:
        CheckpointError: the folder is missing, incomplete or corrupt, the weights do not match their hash,
            or they or the temperature are not finite.
    """
    folder = Path(folder)
    document = _read_config(folder)
    state = _read_weights(folder, document)
    _check_finite(f"the model in {folder} cannot be used", state)
    with described_by(folder):
        config = FlowConfig.from_dict(document["config"])
        temperature = _finite_temperature(float(document["temperature"]))
        return Checkpoint(config, state, temperature, dict(document["metadata"]))


@contextlib.contextmanager
def described_by(folder: str | PathLike[str]) -> Iterator[None]:
    """Tell by `CheckpointError` what goes wrong while a model is made of the files of `folder`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        path = Path(folder) / CONFIG
        raise CheckpointError(f"{path} and its weights do not describe one model: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        reason = f"no {CONFIG} in it" if folder.is_dir() else "no such folder"
        raise CheckpointError(f"{folder} is not a model folder: {reason}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        found = document.get("format") if isinstance(document, dict) else type(document).__name__
        raise CheckpointError(f"{path} must have format {FORMAT}, got {found!r}")
    return document


def _read_weights(folder: Path, document: dict[str, Any]) -> dict[str, torch.Tensor]:
    name = str(document.get("weights", ""))
    if not name or Path(name).name != name:
        raise CheckpointError(f"{folder / CONFIG} must name a weights file in its own folder, got {name!r}")
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != document.get("sha256"):
        raise CheckpointError(
            f"{folder / name} has sha256 {digest}, but {CONFIG} records {document.get('sha256')}"
        )
    try:
        state: dict[str, torch.Tensor] = parse_tensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name} is not a safetensors file: {error}") from error
    return state
