"""PNG files of single slices."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

from fastflow.data._opening import read_png
from fastflow.errors import VolumeError


def load_png(path: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The pixels of a PNG, (h, w) uint8, not larger than `size`.

    Raises:
        VolumeError: the file cannot be used.
    """
    content = read_png(path)
    try:
        # Volumes are read without Pillow, so that only PNG files need it.
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise VolumeError(
            path, "unsupported_format", "is a PNG image, which Pillow reads: pip install pillow"
        ) from error
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            # Only `verify` reads the checksums; afterwards the image must be opened again.
            image.verify()
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            mode, width, height = image.mode, image.width, image.height
            if height > size[0] or width > size[1]:
                message = f"is {height} x {width}, larger than the model's {size[0]} x {size[1]}"
                raise VolumeError(path, "size", message)
            pixels = np.asarray(image)
    except VolumeError:
        raise
    except MemoryError as error:
        raise VolumeError(path, "too_large", "needs more memory than there is") from error
    except UnidentifiedImageError as error:
        raise VolumeError(path, "image", "cannot be read as a PNG image: its header is damaged") from error
    # Pillow's readers let through whatever a broken chunk causes.
    except Exception as error:
        raise VolumeError(path, "image", f"cannot be read as a PNG image: {error}") from error
    if mode == "RGB" and (pixels == pixels[..., :1]).all():
        mode, pixels = "L", pixels[..., 0]
    if mode != "L":
        raise VolumeError(
            path,
            "image",
            f"is of mode {mode}; 8-bit grey images are accepted, also as RGB with equal channels",
        )
    return np.asarray(pixels)
