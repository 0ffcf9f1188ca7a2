"""A model as a folder: `config.json` and one safetensors file named after its hash.

`config.json` is replaced last and names the weights that belong to it, so a reader sees the old model or the new one, whenever
the writer stops.
"""

from __future__ import annotations

import hashlib
import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors

from fastflow import __version__
from fastflow._files import write_bytes, write_text
from fastflow.errors import CheckpointError, UninitializedModelError
from fastflow.models.config import FlowConfig

if TYPE_CHECKING:
    from fastflow.models.magic_flow import MagicFlow

FORMAT = 1
CONFIG = "config.json"


def save(model: MagicFlow, folder: str | PathLike[str]) -> None:
    """See `MagicFlow.save`."""
    if not model.initialized:
        raise UninitializedModelError("a model that has seen no data cannot be saved: train it or call initialize(x) first")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    content = format_tensors({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()})
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


def load(folder: str | PathLike[str], device: str | torch.device) -> MagicFlow:
    """See `MagicFlow.load`."""
    from fastflow.models.magic_flow import MagicFlow

    folder = Path(folder)
    document = _read_config(folder)
    state = _read_weights(folder, document)
    try:
        config = FlowConfig.from_dict(document["config"])
        # The skeleton's masks and dtypes are placeholders: the stored tensors take their place as they are.
        model = MagicFlow(config, np.zeros(config.input_shape[1:]))
        model.load_state_dict(state, assign=True)
        model.temperature = float(document["temperature"])
        model.metadata = dict(document["metadata"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder / CONFIG} and its weights do not describe one model: {error}") from error
    return model.to(device).eval()


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
        raise CheckpointError(f"{folder / name} has sha256 {digest}, but {CONFIG} records {document.get('sha256')}")
    try:
        state: dict[str, torch.Tensor] = parse_tensors(content)
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name} is not a safetensors file: {error}") from error
    return state
