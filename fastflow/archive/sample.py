"""Images drawn from a model."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastflow._files import write_bytes
from fastflow._places import Kind, check_place, held, telling_what_stays, without_mark
from fastflow.archive.names import clean_stem, files_in_table, replace_files, unique_names, write_table
from fastflow.archive.options import pick_device
from fastflow.archive.rows import class_names
from fastflow.data.preprocess import to_uint8
from fastflow.data.words import find_class
from fastflow.evaluation.figures import grid_figure, png
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.sampling import Sampler

IMAGES_PER_PASS = 16
TABLE, GRID, ARRAYS = "samples.csv", "grid.png", "samples.npz"
COLUMNS = ("file", "class", "number", "seed", "temperature")
KIND = Kind(
    "earlier samples",
    "samples need a folder of their own",
    "replace them (--overwrite) or name another folder",
)


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
    check_counts(labels, count)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.tensor(labels).repeat_interleave(count)
    sampler = Sampler(model, precision)
    parts = [
        to_uint8(sampler(y, temperature, generator).cpu().numpy()) for y in wanted.split(IMAGES_PER_PASS)
    ]
    return np.concatenate(parts).reshape(len(labels), count, *model.config.input_shape)


def check_counts(labels: Sequence[Any], count: int) -> None:
    """Check that there is something to draw.

    Raises:
        ValueError: there is no label, or no image is wanted.
    """
    if count < 1 or not labels:
        raise ValueError(
            "there must be at least one label and count at least 1, "
            f"got labels {list(labels)} and count {count}"
        )


def sample(
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    labels: Sequence[str] | None = None,
    count: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
    device: str = "auto",
    precision: str = "float32",
    *,
    overwrite: bool = False,
    lock: bool = True,
) -> list[Path]:
    """Draw images and write them.

    Each becomes a file ``CLASS-N.png``; ``grid.png`` shows all, and ``samples.npz`` holds images,
    labels and class_names. ``samples.csv`` says of which class each file is, and how it was drawn.

    Args:
        model_folder: the model.
        out: the folder of the results.
        labels: class names; all when None.
        count: images per class.
        temperature: standard deviation of the latent; below 1 gives smoother, more typical images.
        seed: of the draws.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        precision: ``"float32"``, ``"tf32"`` or ``"mixed"``, see `fastflow.models.sampling.Sampler`.
        overwrite: replace earlier samples in `out`. Other files in it stay.
        lock: hold the folder; without it, the caller sees to it that nothing else writes there.

    Returns:
        The files that were written.

    Raises:
        ValueError: a label is no class of the model, or a number does not fit.
        OutputFolderError: `out` holds other files, or earlier samples and `overwrite` is not set; or
            another run writes there.
        OSError: `out` cannot be written, or the disk is full.
    """
    model = MagicFlow.load(model_folder, pick_device(device))
    names = class_names(model)
    wanted = list(labels) if labels else list(names)
    wanted = [names[find_class(name, names)] for name in wanted]
    check_counts(wanted, count)
    stems = unique_names([_stem(name) for name in wanted], "_")
    rows = [
        {"file": f"{stem}-{i}.png", "class": name, "number": i, "seed": seed, "temperature": temperature}
        for stem, name in zip(stems, wanted, strict=True)
        for i in range(1, count + 1)
    ]
    folder, needed = Path(out), 2 * len(rows) * model.config.num_dims
    with (
        held(folder, lambda: check_place(folder, KIND, without_mark(TABLE), overwrite), lock, needed),
        telling_what_stays(folder, lambda: f"not all files that {TABLE} names are there"),
    ):
        images = draw(model, [names.index(name) for name in wanted], count, temperature, seed, precision)
        shown = images.max(axis=2)
        mine = [*files_in_table(folder / TABLE, "file"), GRID, ARRAYS] if (folder / TABLE).exists() else []
        replace_files(folder, mine, [GRID, ARRAYS, *_files(rows)], KIND)
        # The table comes first: it says whose the files are, also of a run that is killed.
        write_table(folder / TABLE, COLUMNS, rows)
        write_bytes(folder / GRID, png(grid_figure(shown, wanted)))
        write_bytes(folder / ARRAYS, _archive(images, wanted, names))
        for file, picture in zip(_files(rows), shown.reshape(-1, *shown.shape[2:]), strict=True):
            write_bytes(folder / file, _png(picture))
    return [folder / file for file in (GRID, ARRAYS, TABLE, *_files(rows))]


def _files(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row["file"] for row in rows]


def _stem(name: str) -> str:
    return clean_stem("".join(c if c.isalnum() or c in "-_." else "_" for c in name))


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
