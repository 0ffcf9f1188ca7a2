"""The anatomy that ships with the package: four real heads at 2 mm, their deformations, and a coronal mask.

The heads' sources and licences stand in ``assets/LICENCES.md``. ``python -m fastflow.data.anatomy
SOURCE_FOLDER`` derived the files that the functions here read from 1 mm volumes on the MNI152 grid (see
`derive_assets`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

HEADS = ("aomic_0017", "aomic_0042", "colin27", "pycortex_S1")
TISSUES = ("grey_matter", "white_matter", "csf", "bone", "soft_tissue")
GRID = (91, 109, 91)
SPACING = (2.0, 2.0, 2.0)
AFFINE = np.array([[2.0, 0, 0, -90.5], [0, 2.0, 0, -125.5], [0, 0, 2.0, -71.5], [0, 0, 0, 1]])

FloatArray = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Head:
    """A real head on the 2 mm grid.

    Attributes:
        name: one of `HEADS`.
        t1: (91, 109, 91) float32, T1-weighted intensities, white matter near 170.
        fractions: (5, 91, 109, 91) float32, share of each of `TISSUES` in a voxel; the rest is air.
    """

    name: str
    t1: FloatArray
    fractions: FloatArray


def asset_path(name: str) -> Path:
    """Where a file that ships with the package lies."""
    return Path(str(resources.files("fastflow.data") / "assets" / name))


def _voxels(path: Path) -> NDArray[Any]:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj)


@functools.cache
def load_head(name: str) -> Head:
    """A shipped head.

    Raises:
        ValueError: there is no head of that name.
    """
    if name not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {name!r}")
    return _as_head(
        name, _voxels(asset_path(f"{name}_T1w.nii.gz")), _voxels(asset_path(f"{name}_tissues.nii.gz"))
    )


def _as_head(name: str, t1: NDArray[Any], eighths: NDArray[Any]) -> Head:
    parts = eighths.astype(np.float32)
    return Head(
        name, t1.astype(np.float32), np.ascontiguousarray(np.moveaxis(parts, -1, 0)) / np.float32(8.0)
    )


@functools.cache
def load_velocity(source: str, target: str) -> FloatArray:
    """The stationary velocity field that carries one shipped head onto another.

    Returns:
        (3, 46, 55, 46) float32 on the 4 mm grid, in its voxels; `source` warped by the field's exponential
        resembles `target`.

    Raises:
        ValueError: a head is unknown, or both are the same.
    """
    if source not in HEADS or target not in HEADS or source == target:
        raise ValueError(
            f"source and target must be two of {', '.join(HEADS)}, got {source!r} and {target!r}"
        )
    with np.load(asset_path("velocities.npz")) as fields:
        if f"{source}-{target}" in fields:
            return fields[f"{source}-{target}"].astype(np.float32) / np.float32(32.0)
        return -fields[f"{target}-{source}"].astype(np.float32) / np.float32(32.0)


def coronal_mask(shape: tuple[int, int] = (184, 184)) -> NDArray[np.uint8]:
    """The default application mask: 1 where central coronal slices are bright, without the skull's dark ring.

    The shipped mask is 182 x 182 at 1 mm. Along each axis it is thinned by the smallest whole factor that
    makes it fit, and padded evenly, as slices are: 184 takes it as it is, 96 at 2 mm, 48 at 4 mm.

    Args:
        shape: (H, W) of the model's image.

    Returns:
        (H, W) uint8 of 0 and 1.

    Raises:
        ValueError: a side is smaller than 1.
    """
    if min(shape) < 1:
        raise ValueError(f"shape must be two positive integers, got {shape}")
    with Image.open(asset_path("coronal_mask.png")) as image:
        mask = (np.asarray(image) > 127).astype(np.uint8)
    for axis, size in enumerate(shape):
        factor = -(-mask.shape[axis] // size)
        mask = np.take(mask, np.arange(factor // 2, mask.shape[axis], factor), axis=axis)
        missing = size - mask.shape[axis]
        edges = [(0, 0), (0, 0)]
        edges[axis] = (missing // 2, missing - missing // 2)
        mask = np.pad(mask, edges)
    return mask


# -- deformations --------------------------------------------------------------------------------------------


def exponentiate(velocity: FloatArray, squarings: int = 3) -> FloatArray:
    """Displacement (3, X, Y, Z), in voxels, of the diffeomorphism that a stationary velocity field generates.

    Source: Arsigny et al., 2006 (scaling and squaring).
    """
    displacement = velocity / np.float32(2**squarings)
    for _ in range(squarings):
        displacement = displacement + warp(displacement, displacement)
    return displacement


def warp(image: FloatArray, displacement: FloatArray) -> FloatArray:
    """Sample an image linearly at ``x + displacement(x)``; the border continues outwards.

    Args:
        image: (X, Y, Z) or (N, X, Y, Z).
        displacement: (3, X, Y, Z), in voxels.
    """
    where = displacement + _identity(displacement.shape[1:])
    if image.ndim == 3:
        return ndimage.map_coordinates(image, where, order=1, mode="nearest", prefilter=False)
    return np.stack(
        [ndimage.map_coordinates(part, where, order=1, mode="nearest", prefilter=False) for part in image]
    )


@functools.cache
def _identity(shape: tuple[int, ...]) -> FloatArray:
    return np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in shape), indexing="ij"))


def jacobian_determinant(displacement: FloatArray) -> FloatArray:
    """Local change of volume of ``x + displacement(x)``, (X, Y, Z); positive everywhere if nothing folds."""
    gradient = np.stack([np.stack(np.gradient(part)) for part in displacement])
    gradient += np.eye(3, dtype=np.float32)[:, :, None, None, None]
    return np.asarray(np.linalg.det(np.moveaxis(gradient, (0, 1), (-2, -1))))


# -- derivation of the assets --------------------------------------------------------------------------------


def _block_mean(data: NDArray[Any], factor: int) -> NDArray[np.float64]:
    x, y, z = (n // factor for n in data.shape)
    return (
        data[: x * factor, : y * factor, : z * factor]
        .reshape(x, factor, y, factor, z, factor)
        .mean(axis=(1, 3, 5))
    )


def derive_head(t1_path: Path, labels_path: Path) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A 2 mm head from a 1 mm head and its labels (1 to 5).

    Returns:
        Intensities (X, Y, Z), and the tissues' shares in eighths (X, Y, Z, 5).
    """
    t1 = _voxels(t1_path).astype(np.float32)
    labels = _voxels(labels_path)
    shares = [np.rint(_block_mean(labels == k, 2) * 8.0) for k in range(1, len(TISSUES) + 1)]
    return np.rint(_block_mean(t1, 2)).astype(np.uint8), np.stack(shares, axis=-1).astype(np.uint8)


def register(source: Head, target: Head) -> FloatArray:
    """Velocity field on the 4 mm grid from one head to another, by demons in the log domain at 8 and 4 mm.

    Source: Vercauteren et al., 2008.
    """
    weights = np.array([0.7, 1.0, 0.35, 0.1, 0.6], dtype=np.float32)
    images = [np.tensordot(weights, head.fractions, axes=1) for head in (source, target)]
    velocity: Any = None
    for factor, iterations in ((4, 60), (2, 40)):
        moving, fixed = (_coarsen(image, factor) for image in images)
        shape = fixed.shape
        velocity = np.zeros((3, *shape), dtype=np.float32) if velocity is None else _refine(velocity, shape)
        for _ in range(iterations):
            warped = warp(moving, exponentiate(velocity, squarings=4))
            difference = fixed - warped
            gradient = np.stack(list(np.gradient(warped))).astype(np.float32)
            force = difference * gradient / ((gradient**2).sum(axis=0) + difference**2 + 1e-4)
            velocity = ndimage.gaussian_filter(
                velocity + ndimage.gaussian_filter(force, (0, 1, 1, 1)), (0, 1, 1, 1)
            )
    return np.asarray(velocity, dtype=np.float32)


def _coarsen(image: FloatArray, factor: int) -> FloatArray:
    odd = [(0, -n % factor) for n in image.shape]
    return ndimage.gaussian_filter(_block_mean(np.pad(image, odd), factor), 0.7).astype(np.float32)


def _refine(velocity: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    where = [np.linspace(0, n - 1, m) for n, m in zip(velocity.shape[1:], shape, strict=True)]
    points = np.stack(np.meshgrid(*where, indexing="ij"))
    scale = np.array(shape) / np.array(velocity.shape[1:])
    parts = [
        s * ndimage.map_coordinates(part, points, order=1) for s, part in zip(scale, velocity, strict=True)
    ]
    return np.stack(parts).astype(np.float32)


def derive_mask(sources: list[tuple[Path, Path]]) -> NDArray[np.uint8]:
    """The coronal mask (182, 182), 0 or 255, from pairs of T1w image and labels at 1 mm.

    It is the smoothed area that is brain or soft tissue, and not bone, in most heads and central slices.
    """
    votes = []
    for _, labels_path in sources:
        labels = _voxels(labels_path)
        middle = labels.shape[1] // 2
        for y in range(middle - 12, middle + 13, 4):
            plane = labels[:, y, ::-1].T
            brain = ndimage.binary_fill_holes(np.isin(plane, (1, 2, 3)))
            votes.append((brain | (plane == 5)).astype(np.float32))
    share = ndimage.gaussian_filter(np.mean(votes, axis=0), 1.5)
    mask = ndimage.binary_opening(share > 0.5, iterations=2)
    return np.where(mask, 255, 0).astype(np.uint8)


def derive_assets(source: Path, target: Path) -> None:
    """Write all assets into `target` from a folder of ``NAME_space-MNI152_{T1w,dseg}.nii.gz`` at 1 mm."""
    paths = [
        (source / f"{name}_space-MNI152_T1w.nii.gz", source / f"{name}_space-MNI152_dseg.nii.gz")
        for name in HEADS
    ]
    heads = []
    for name, pair in zip(HEADS, paths, strict=True):
        t1, shares = derive_head(*pair)
        heads.append(_as_head(name, t1, shares))
        nib.save(nib.Nifti1Image(t1, AFFINE), target / f"{name}_T1w.nii.gz")
        nib.save(nib.Nifti1Image(shares, AFFINE), target / f"{name}_tissues.nii.gz")
    Image.fromarray(derive_mask(paths)).save(target / "coronal_mask.png", optimize=True)
    fields = {
        f"{a.name}-{b.name}": np.rint(register(a, b) * 32).clip(-127, 127).astype(np.int8)
        for a, b in itertools.combinations(heads, 2)
    }
    np.savez_compressed(target / "velocities.npz", **fields)  # type: ignore[arg-type]


if __name__ == "__main__":
    derive_assets(Path(sys.argv[1]), asset_path(""))
