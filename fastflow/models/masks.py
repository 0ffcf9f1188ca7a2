"""Coupling masks, (C, H, W) boolean, True = passive in the first half of a step.

With i the step index and c the channel, a mask is inverted when i is odd (`custom`, `channel`) or when i + c
is odd (the patterns), so that successive steps transform complementary pixels. Source: RealNVP (Dinh et al.,
2017); MAGIC-Flow for `custom`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastflow.models.config import FlowConfig, Shape


def application_mask(value: Any, height: int, width: int) -> Tensor:
    """The binary image behind the `custom` masks.

    Args:
        value: (H, W) array or tensor of 0/1 or bool, the path of a PNG whose grey values are 0 and 1 or 0 and
            255, or None for the default: the foreground of the central coronal slices of the shipped heads.
        height: H of the model's image.
        width: W of the model's image.

    Returns:
        (H, W) bool.

    Raises:
        ValueError: the shape does not fit or a value is neither 0 nor 1.
    """
    if value is None:
        from fastflow.data.anatomy import coronal_mask

        value = coronal_mask((height, width))
    elif isinstance(value, str | Path):
        value = _read_png(Path(value))
    mask = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
    if tuple(mask.shape) != (height, width):
        raise ValueError(
            f"application_mask must be ({height}, {width}) like the image, got {tuple(mask.shape)}"
        )
    if not torch.all((mask == 0) | (mask == 1)):
        found = torch.unique(mask).tolist()
        raise ValueError(
            f"application_mask must hold only 0 and 1, got {len(found)} distinct values from {found[0]} to "
            f"{found[-1]}"
        )
    return mask.bool()


def _read_png(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, ValueError) as error:
        raise ValueError(f"application_mask {str(path)!r} cannot be read as an image: {error}") from error
    # Image editors write a binary image as 0 and 255.
    return pixels // 255 if set(np.unique(pixels)) <= {0, 255} else pixels


def _pattern(name: str, height: int, width: int, block_size: int) -> Tensor:
    row, col = torch.arange(height)[:, None], torch.arange(width)[None, :]
    if name == "checkerboard":
        return (row + col) % 2
    if name == "block_checkerboard":
        return (row // block_size + col // block_size) % 2
    zeros = torch.zeros(height, width, dtype=torch.int64)
    return zeros + (col % 2 if name == "vertical_stripe" else row % 2)


def build_mask(name: str, step: int, shape: Shape, application: Tensor | None, block_size: int) -> Tensor:
    """One step's mask.

    Args:
        name: one of `fastflow.models.config.MASKS`.
        step: i, the index of the step.
        shape: (C, H, W) that the step transforms.
        application: (H, W) bool for ``"custom"``, else None.
        block_size: edge of the blocks of ``"block_checkerboard"`` in pixels.

    Returns:
        (C, H, W) bool, True = passive in the first half.

    Raises:
        ValueError: the application mask is missing or does not have the step's height and width.
    """
    channels, height, width = shape
    odd_step = step % 2 == 1
    if name == "custom":
        if application is None or tuple(application.shape) != (height, width):
            got = None if application is None else tuple(application.shape)
            raise ValueError(
                f"a custom mask at step {step} needs an application mask of ({height}, {width}), got {got}"
            )
        return (application ^ odd_step).expand(shape).clone()
    if name == "channel":
        first_half = torch.arange(channels) < channels // 2
        return (first_half ^ odd_step)[:, None, None].expand(shape).clone()
    pattern = _pattern(name, height, width, block_size).bool()
    return torch.stack([pattern ^ bool((step + c) % 2) for c in range(channels)])


def build_masks(config: FlowConfig, application: Any = None) -> list[Tensor]:
    """The masks of every step of `config`; `application_mask` is read only where a step needs it.

    The application mask has the size of the image; a `custom` step after squeezes takes every second (fourth,
    ...) pixel of it.

    Raises:
        ValueError: as `application_mask`.
    """
    _, height, width = config.input_shape
    image = application_mask(application, height, width) if "custom" in config.masks else None
    masks = []
    for i, (name, shape) in enumerate(zip(config.masks, config.step_shapes, strict=True)):
        stride = height // shape[1]
        masks.append(
            build_mask(
                name, i, shape, None if image is None else image[::stride, ::stride], config.block_size
            )
        )
    return masks
