"""A model as a folder: `config.json` and one safetensors file named after its hash.

`config.json` is replaced last and names the weights that belong to it, so a reader sees the old model or the
new one, whenever the writer stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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
from fastflow.errors import CheckpointError
from fastflow.models.config import FlowConfig

FORMAT = 1
CONFIG = "config.json"


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
    """Write a model folder, atomically: a reader sees the old model or the new one."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = format_tensors({name: value.detach().cpu().contiguous() for name, value in model.state.items()})
    digest = hashlib.sha256(content).hexdigest()
    weights = f"model-{digest[:16]}.safetensors"
    write_bytes(folder / weights, content)
    document = {
        "format": FORMAT,
        "fastflow_version": __version__,
        "config": model.config.to_dict(),
        "weights": weights,
        "sha256": digest,
        "temperature": model.temperature,
        "metadata": model.metadata,
    }
    write_text(folder / CONFIG, json.dumps(document, indent=1) + "\n")
    for old in folder.glob("model-*.safetensors"):
        if old.name != weights:
            old.unlink()


def read(folder: str | PathLike[str]) -> Checkpoint:
    """Read a model folder.

    Raises:
        CheckpointError: the folder is missing, incomplete or corrupt, or the weights do not match their hash.
    """
    folder = Path(folder)
    document = _read_config(folder)
    state = _read_weights(folder, document)
    with described_by(folder):
        config = FlowConfig.from_dict(document["config"])
        return Checkpoint(config, state, float(document["temperature"]), dict(document["metadata"]))


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
