"""The full state of a training as files: written whole, hashed, and replaced only by a whole one.

``state/`` holds a document ``state.json``, which is replaced last and names the tensors that belong to it,
so that a reader finds one state or the next, whenever the writer stops. ``fingerprint.json`` says which
training it is; it is written once, before the first state, as it names every volume.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_tensors
from safetensors.torch import save as format_tensors
from torch import Tensor

from fastflow import __version__
from fastflow._files import is_temporary, write_bytes, write_text
from fastflow.errors import ResumeError
from fastflow.models.checkpoint import CONFIG
from fastflow.training.fingerprint import Fingerprint, changed_settings, differences

STATE, DOCUMENT, FINGERPRINT = "state", "state.json", "fingerprint.json"
# The document has this name from when the model is finished until its files are where they belong.
COMPLETE = "complete.json"
FORMAT = 1
# So many differences are named in a message.
MAX_NAMED = 6


@dataclasses.dataclass(frozen=True)
class RunState:
    """A training between two steps.

    Attributes:
        epoch: that is under way, counted from 0; `TrainConfig.epochs` where all are done.
        step: of the epoch that comes next, counted from 0.
        seconds: that the epoch has taken so far.
        history: the records of the epochs before.
        checkpoints: name of the weights file in each folder of ``checkpoints/``.
        changes: of settings since the training began, in words.
        tensors: weights, optimizer, generators and all else that is a tensor, by name.
    """

    epoch: int
    step: int
    seconds: float
    history: Sequence[Mapping[str, float]]
    checkpoints: Mapping[str, str]
    changes: Sequence[str]
    tensors: Mapping[str, Tensor]

    def where(self) -> str:
        """The position in words: ``epoch 3, after 40 steps``."""
        return f"epoch {self.epoch + 1}, after {self.step} steps"


def has_state(folder: str | PathLike[str]) -> bool:
    """Whether the folder of a training holds a state, which may be damaged."""
    return (Path(folder) / STATE / DOCUMENT).exists()


def mark_complete(folder: str | PathLike[str]) -> None:
    """Say that the model in the folder is finished. Nothing is written, as a disk may be full by now."""
    if has_state(folder):
        os.replace(Path(folder) / STATE / DOCUMENT, Path(folder) / STATE / COMPLETE)


def is_complete(folder: str | PathLike[str]) -> bool:
    """Whether the model in the folder of a training is finished, and only its files are to be moved."""
    return (Path(folder) / STATE / COMPLETE).exists()


def check_resumable(folder: str | PathLike[str]) -> None:
    """Raise ResumeError where the folder of a training holds no state."""
    if not has_state(folder):
        finished = (Path(folder) / CONFIG).exists()
        raise ResumeError(
            f"{folder}: "
            + (
                "holds a finished model, there is nothing to resume"
                if finished
                else "there is no unfinished training to resume; leave --resume (resume=True) out"
            )
        )


def remove_state(folder: str | PathLike[str]) -> None:
    """Remove the state of a training; the document goes first, as it names the rest."""
    state = Path(folder) / STATE
    (state / DOCUMENT).unlink(missing_ok=True)
    if state.is_dir():
        shutil.rmtree(state)


def write_state(folder: str | PathLike[str], state: RunState) -> None:
    """Write a state; the one before it stays until this one is whole.

    Raises:
        OSError: it cannot be written. The state before it is still there.
    """
    place = Path(folder) / STATE
    content = format_tensors({k: v.detach().cpu().contiguous() for k, v in state.tensors.items()})
    digest = hashlib.sha256(content).hexdigest()
    name = f"tensors-{digest[:16]}.safetensors"
    # The dataclass is not copied by `asdict`, which would copy the tensors.
    values = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    del values["tensors"]
    write_bytes(place / name, content)
    write_text(place / DOCUMENT, _signed(values | {"file": name, "sha256": digest, "notes": _software()}))
    for old in place.iterdir():
        if old.name not in (name, DOCUMENT, FINGERPRINT):
            old.unlink()


def read_state(folder: str | PathLike[str]) -> tuple[RunState, dict[str, Any]]:
    """The state in the folder of a training, and notes on the software that wrote it.

    Raises:
        ResumeError: there is none, it is of another format, or it is damaged.
    """
    place = Path(folder) / STATE
    values = _read_signed(place / DOCUMENT)
    path = place / str(values.pop("file"))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ResumeError(f"{path} cannot be read: {error.strerror or error}; {_way_on(folder)}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != values.pop("sha256"):
        raise ResumeError(f"{path} is damaged: its sha256 is {digest}; {_way_on(folder)}")
    try:
        tensors = parse_tensors(content)
    except SafetensorError as error:
        raise ResumeError(f"{path} is no safetensors file: {error}; {_way_on(folder)}") from error
    notes = values.pop("notes")
    return RunState(**values, tensors=tensors), notes


def write_fingerprint(folder: str | PathLike[str], fingerprint: Fingerprint) -> None:
    """Write down which training the states of a folder are of."""
    write_text(Path(folder) / STATE / FINGERPRINT, _signed(fingerprint))


def check_fingerprint(
    folder: str | PathLike[str], now: Fingerprint, allow_changes: bool = False
) -> list[str]:
    """Compare a training that is to be resumed with the one whose state is in the folder.

    Args:
        folder: of the training.
        now: groups of the fingerprint of the training that is to go on; those it lacks are not compared.
        allow_changes: whether the settings that are `CHANGEABLE` may differ.

    Returns:
        The settings that differ and may, in words.

    Raises:
        ResumeError: anything else differs, or the fingerprint is missing or damaged; the message names the
            old and the new values.
    """
    before = _read_signed(Path(folder) / STATE / FINGERPRINT)
    found, may = differences(before, now), changed_settings(before, now) if "settings" in now else []
    wrong = [text for text in found if not (allow_changes and text in may)]
    if wrong:
        more = f"; and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
        way = (
            "--allow-changes (allow_changes=True) goes on all the same"
            if set(wrong) <= set(may)
            else "give what the training was begun with, or train anew (--overwrite)"
        )
        raise ResumeError(
            f"{folder}: the training cannot be resumed: {'; '.join(wrong[:MAX_NAMED])}{more}. {way}"
        )
    return may


def _way_on(folder: str | PathLike[str]) -> str:
    return f"the training in {folder} cannot be resumed, train anew (--overwrite)"


def _signed(values: Mapping[str, Any]) -> str:
    """A document as text, with its format and a hash of its content."""
    content = json.dumps({"format": FORMAT, **values})
    return (
        json.dumps({"sha256": hashlib.sha256(content.encode()).hexdigest()})[:-1]
        + f', "content": {content}}}\n'
    )


def _read_signed(path: Path) -> dict[str, Any]:
    """The content of a document of `_signed`, once its format and hash are checked."""
    folder = path.parent.parent
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content = document["content"]
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        is_whole = digest == document["sha256"]
        found = content.pop("format")
    except FileNotFoundError:
        raise ResumeError(f"{path} is missing; {_way_on(folder)}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ResumeError(f"{path} is damaged ({error}); {_way_on(folder)}") from error
    if found != FORMAT:
        raise ResumeError(f"{path} has format {found!r}, this version reads {FORMAT}; {_way_on(folder)}")
    if not is_whole:
        raise ResumeError(f"{path} is damaged: it does not match its hash; {_way_on(folder)}")
    return dict(content)


@contextlib.contextmanager
def described_as_damaged(folder: str | PathLike[str]) -> Iterator[None]:
    """Tell by `ResumeError` what goes wrong while a training goes on from the tensors of its state."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError) as error:
        raise ResumeError(
            f"{Path(folder) / STATE}: its tensors are not those of this training ({error}); {_way_on(folder)}"
        ) from error


def warn_of_other_software(notes: Mapping[str, Any]) -> None:
    """Warn where other software goes on with a training than wrote its state: last bits may differ."""
    now = _software()
    found = [
        f"{name} was {notes[name]} and is now {now[name]}" for name in now if notes.get(name) != now[name]
    ]
    if found:
        warnings.warn(f"the training goes on, but last bits may differ: {'; '.join(found)}", stacklevel=2)


def _software() -> dict[str, Any]:
    return {"fastflow": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}


def kept_weights(checkpoints: Path) -> dict[str, str]:
    """The name of the weights file of each checkpoint, which holds their hash."""
    found = {}
    for path in sorted(checkpoints.glob(f"*/{CONFIG}")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found[path.parent.name] = str(json.loads(path.read_text(encoding="utf-8"))["weights"])
    return found


def younger_checkpoints(checkpoints: Path, state: RunState) -> set[str]:
    """The checkpoints that were written after a state.

    Raises:
        ResumeError: one that the state names is missing.
    """
    found = kept_weights(checkpoints)
    for name in state.checkpoints:
        if name not in found:
            raise ResumeError(
                f"{checkpoints / name}: the best epoch so far is missing; {_way_on(checkpoints.parent)}"
            )
    return {name for name, weights in found.items() if state.checkpoints.get(name) != weights}


def clear_unfinished_files(folder: str | PathLike[str]) -> None:
    """Remove files that a killed training had begun to write, in its folder and all below it."""
    for path in list(Path(folder).rglob(".*")):
        if is_temporary(path.name) and path.is_file():
            path.unlink(missing_ok=True)
