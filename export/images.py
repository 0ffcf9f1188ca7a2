"""Real slices to compare graphs on: of the heads that ship with the package, or of given scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fastflow.data.anatomy import HEADS, load_head
from fastflow.data.preprocess import Preprocess, pad_evenly
from fastflow.data.slices import coronal_slices, read_image
from fastflow.errors import VolumeError

# Number of slices that graphs are compared on by default.
SLICES = 16
# Distance of two slices of a packaged head, in voxels.
HEAD_SLICE_STEP = 3
# Multiples of it, modulo 1, spread evenly over [0, 1), however many there are.
GOLDEN_RATIO = 0.6180339887498949


def anatomy_slices(shape: Sequence[int], count: int = SLICES) -> NDArray[np.uint8]:
    """Coronal slices of the heads that ship with the package, stretched to an image size.

    Args:
        shape: (C, H, W) of an image.
        count: number of slices.

    Returns:
        (count, C, H, W) uint8; all channels hold the same.
    """
    channels, height, width = shape
    per_head = -(-count // len(HEADS))
    slices = []
    for name in HEADS:
        t1 = load_head(name).t1
        middle = t1.shape[1] // 2
        planes = coronal_slices(t1, [middle + HEAD_SLICE_STEP * (i - per_head // 2) for i in range(per_head)])
        scaled = np.clip(planes * (255.0 / np.percentile(t1[t1 > 0], 99.9)), 0.0, 255.0)
        factor = min(height / planes.shape[1], width / planes.shape[2])
        stretched = ndimage.zoom(scaled, (1.0, factor, factor), order=1)[:, :height, :width]
        slices.append(pad_evenly(np.rint(stretched).astype(np.uint8), (height, width)))
    return np.repeat(np.concatenate(slices)[:count, None], channels, axis=1)


def load_images(
    paths: Sequence[str],
    preprocess: Preprocess,
    count: int = SLICES,
    warn: Callable[[str], None] | None = None,
) -> NDArray[np.uint8]:
    """Slices of scans, spread evenly over all scans.

    Args:
        paths: volumes or PNG files, one at least.
        preprocess: that of the model.
        count: slices, at most.
        warn: called with the error of a file that cannot be used; another file takes its place.

    Returns:
        (N, 1, H, W) uint8, N <= count.

    Raises:
        VolumeError: none of the files can be used; the error is that of the first.
    """
    # Any beginning of this order is spread evenly over the files, and the order is the same every time.
    order = sorted(range(len(paths)), key=lambda i: (i * GOLDEN_RATIO) % 1.0)
    slices: list[NDArray[np.uint8]] = []
    first_error: VolumeError | None = None
    for i in order:
        if len(slices) == count:
            break
        try:
            found = read_image(paths[i], preprocess).images
        except VolumeError as error:
            first_error = first_error or error
            if warn is not None:
                warn(str(error))
        else:
            # One slice of each scan is enough: its neighbours are much like it.
            slices.append(found[len(found) // 2])
    if first_error is not None and not slices:
        raise first_error
    return np.stack(slices)
