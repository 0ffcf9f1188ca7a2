"""The score graph of an export: its inputs and outputs, and the passes that images take through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.data.preprocess import to_unit_range
from fastflow.errors import ExportError
from fastflow.runtime.export_folder import Export


def check_images(images: NDArray[Any], input_shape: tuple[int, ...]) -> NDArray[Any]:
    """The images, (B, *input_shape).

    Raises:
        ValueError: the shape or dtype does not fit.
    """
    wanted = f"(B, {', '.join(map(str, input_shape))})"
    if not isinstance(images, np.ndarray):
        raise ValueError(f"images must be a NumPy array {wanted}, got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1:] != input_shape:
        raise ValueError(f"images must be {wanted}, got {images.shape}")
    if images.dtype.kind != "f" and images.dtype != np.uint8:
        raise ValueError(f"images must be of a float dtype in [-1, 1], or uint8, got {images.dtype}")
    return images


def spans(count: int, buckets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, stop, size of the pass) of the images that are scored together.

    Args:
        count: number of images.
        buckets: sizes of passes, sorted.
    """
    first = 0
    while first < count:
        remaining = count - first
        size = next((bucket for bucket in buckets if bucket >= remaining), buckets[-1])
        stop = first + min(size, remaining)
        yield first, stop, size
        first = stop


def in_unit_range(images: NDArray[Any]) -> NDArray[np.float32]:
    """Images as the graph takes them; 8-bit ones are scaled."""
    if images.dtype == np.uint8:
        return to_unit_range(images)
    # A value beyond float32 becomes infinity, and is reported as such.
    with np.errstate(over="ignore"):
        return images.astype(np.float32)


def filled_up(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """Images (n, C, H, W) with the last one repeated up to `size`."""
    missing = size - len(images)
    return images if missing == 0 else np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def check_signature(path: Path, session: Any, export: Export) -> int:
    """Check inputs and outputs of a score graph.

    Returns:
        J, the number of latent blocks that it gives correlations of; 0 where it gives none.

    Raises:
        ExportError: they are not those of the export.
    """
    classes = len(export.class_names)
    outputs: list[tuple[str, str, tuple[int, ...]]] = [("log_probs", "tensor(double)", (classes,))]
    found, blocks = session.get_outputs(), 0
    if len(found) == 2:
        # The second output is newer than the format: a graph without it still scores.
        shape = found[1].shape[1:]
        blocks = shape[1] if len(shape) == 3 and isinstance(shape[1], int) else 0
        outputs.append(("correlations", "tensor(double)", (classes, blocks, 2)))
    for kind, values, wanted in (
        ("input", session.get_inputs(), [("image", "tensor(float)", export.input_shape)]),
        ("output", found, outputs),
    ):
        got = [(value.name, value.type, tuple(value.shape[1:])) for value in values]
        fixed = [value.name for value in values if value.shape and isinstance(value.shape[0], int)]
        if got != wanted:
            raise ExportError(f"{path} must have {kind} {wanted} after the batch, has {got}")
        if fixed:
            raise ExportError(f"{path}: {kind} {fixed[0]} has a fixed number of images")
    return blocks
