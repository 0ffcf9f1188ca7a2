"""Images drawn from a model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastflow._files import write_bytes
from fastflow.archive.options import pick_device
from fastflow.archive.rows import class_names
from fastflow.data.preprocess import to_uint8
from fastflow.evaluation.figures import grid_figure, png
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.sampling import Sampler

IMAGES_PER_PASS = 16


def draw(
    model: MagicFlow,
    labels: Sequence[int],
    count: int,
    temperature: float = 1.0,
    seed: int = 0,
    precision: str = "float32",
) -> NDArray[np.uint8]:
    """Samples as 8-bit images.

    Args:
        model: in evaluation mode.
        labels: L integers in [0, K).
        count: images per label.
        temperature: standard deviation of the latent.
        seed: of the draws; equal seeds give equal images on equal hardware.
        precision: see `fastflow.models.sampling.Sampler`.

    Returns:
        (L, count, C, H, W) uint8; values outside [-1, 1] are clipped.

    Raises:
        ValueError: the count is not positive, a label, the temperature or the precision does not fit.
    """
    if count < 1 or not labels:
        raise ValueError(
            "there must be at least one label and count at least 1, "
            f"got labels {list(labels)} and count {count}"
        )
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.tensor(labels).repeat_interleave(count)
    sampler = Sampler(model, precision)
    parts = [
        to_uint8(sampler(y, temperature, generator).cpu().numpy()) for y in wanted.split(IMAGES_PER_PASS)
    ]
    return np.concatenate(parts).reshape(len(labels), count, *model.config.input_shape)


def sample(
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    labels: Sequence[str] | None = None,
    count: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "float32",
) -> list[Path]:
    """Draw images and write them.

    Each becomes a file ``CLASS-N.png``; ``grid.png`` shows all, and ``samples.npz`` holds images,
    labels and class_names.

    Args:
        model_folder: the model.
        out: the folder of the results.
        labels: class names; all when None.
        count: images per class.
        temperature: standard deviation of the latent; below 1 gives smoother, more typical images.
        seed: of the draws.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"``, ``"tf32"`` or ``"mixed"``, see `fastflow.models.sampling.Sampler`.

    Returns:
        The files that were written.

    Raises:
        ValueError: a label is no class of the model, or a number does not fit.
    """
    model = MagicFlow.load(model_folder, pick_device(device))
    names = class_names(model)
    wanted = list(labels) if labels else list(names)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(f"label must be one of {', '.join(names)}, got {unknown[0]!r}")
    images = draw(model, [names.index(name) for name in wanted], count, temperature, seed, precision)
    shown = images.max(axis=2)
    files = {
        Path(out) / "grid.png": png(grid_figure(shown, wanted)),
        Path(out) / "samples.npz": _archive(images, wanted, names),
    }
    for name, pictures in zip(wanted, shown, strict=True):
        for i, picture in enumerate(pictures, start=1):
            files[Path(out) / f"{_file_name(name)}-{i}.png"] = _png(picture)
    for path, content in files.items():
        write_bytes(path, content)
    return list(files)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name)


def _png(picture: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG")
    return buffer.getvalue()


def _archive(images: NDArray[np.uint8], wanted: Sequence[str], names: Sequence[str]) -> bytes:
    buffer = io.BytesIO()
    labels = np.array([names.index(name) for name in wanted]).repeat(images.shape[1])
    np.savez_compressed(
        buffer, images=images.reshape(-1, *images.shape[2:]), labels=labels, class_names=np.array(names)
    )
    return buffer.getvalue()
