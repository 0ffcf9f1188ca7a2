"""Explanations of single slices: likelihood attribution maps as pictures and arrays."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastflow._files import write_bytes
from fastflow.archive.inputs import gather
from fastflow.archive.options import pick_device
from fastflow.archive.rows import class_names, preprocess_of
from fastflow.data.manifest import Record
from fastflow.data.slices import iterate_images
from fastflow.errors import VolumeError
from fastflow.evaluation.figures import Explanation, attribution_figure, png
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8


@torch.no_grad()
def explain_slice(
    model: MagicFlow,
    image: NDArray[np.uint8],
    label: int | None = None,
    truth: int | None = None,
    name: str = "",
) -> Explanation:
    """Attribute the likelihood of a slice, and its log-odds against the strongest rival, to its pixels.

    Args:
        model: in evaluation mode.
        image: (1, H, W) uint8.
        label: the label to explain; the most likely one when None.
        truth: the true label, where known.
        name: of the picture.

    Raises:
        ValueError: the shape or the label does not fit.
    """
    if image.shape != model.config.input_shape or image.dtype != np.uint8:
        raise ValueError(f"image must be {model.config.input_shape} uint8, got {image.shape} {image.dtype}")
    classes = model.config.num_classes
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"label must lie in 0 to {classes - 1}, got {label}")
    x = from_uint8(torch.from_numpy(image[None]).to(model.device))
    log_probs = model.log_prob_all(x)[0].double().cpu().numpy()
    label = int(log_probs.argmax()) if label is None else label
    others = np.where(np.arange(classes) == label, -np.inf, log_probs)
    rival = int(others.argmax()) if classes > 1 else label
    maps, const = model.attribution(
        x.expand(2, -1, -1, -1), torch.tensor([label, rival], device=model.device)
    )
    pixels = maps.double().sum(dim=1).cpu().numpy()
    return Explanation(
        image.max(axis=0),
        log_probs,
        label,
        rival,
        pixels[0],
        pixels[0] - pixels[1],
        float(const[0]),
        truth=truth,
        name=name,
    )


def explain(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    label: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> list[VolumeError]:
    """Explain the middle slice of each file: ``NAME.png``, and ``NAME.npz`` with the maps in nats per pixel.

    Args:
        inputs: files, folders, manifests.
        model_folder: the model.
        out: the folder of the results.
        label: class to explain; each slice's most likely one when None.
        limit: explain only so many inputs.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        progress: called with the number of inputs done and their total.

    Returns:
        The errors of the files that could not be read.

    Raises:
        ValueError: the label is no class of the model.
    """
    model = MagicFlow.load(model_folder, pick_device(device))
    names = class_names(model)
    if label is not None and label not in names:
        raise ValueError(f"label must be one of {', '.join(names)}, got {label!r}")
    records = gather(inputs)[:limit]
    stems = _stems(records)
    errors: list[VolumeError] = []
    images = iterate_images([record.path for record in records], preprocess_of(model))
    for done, (record, stem, image) in enumerate(zip(records, stems, images, strict=True), start=1):
        if isinstance(image, VolumeError):
            errors.append(image)
        else:
            truth = names.index(record.label) if record.label in names else None
            chosen = None if label is None else names.index(label)
            _write(Path(out) / stem, explain_slice(model, image[len(image) // 2], chosen, truth, stem), names)
        if progress is not None:
            progress(done, len(records))
    return errors


def _stems(records: Iterable[Record]) -> list[str]:
    """A file name for each record; equal ones are numbered."""
    seen: dict[str, int] = {}
    stems = []
    for record in records:
        stem = Path(record.path).name.split(".")[0] or "input"
        seen[stem] = seen.get(stem, 0) + 1
        stems.append(stem if seen[stem] == 1 else f"{stem}-{seen[stem]}")
    return stems


def _write(stem: Path, explanation: Explanation, names: tuple[str, ...]) -> None:
    write_bytes(stem.with_name(f"{stem.name}.png"), png(attribution_figure([explanation], names)))
    buffer = io.BytesIO()
    fields = {field.name: getattr(explanation, field.name) for field in dataclasses.fields(explanation)}
    fields["truth"] = -1 if explanation.truth is None else explanation.truth
    np.savez_compressed(buffer, **fields, class_names=np.array(names))
    write_bytes(stem.with_name(f"{stem.name}.npz"), buffer.getvalue())
