"""From a volume to the 8-bit slices that a model reads: slices, grid, scaling and padding.

The published data are 8-bit images, x = 2*v/255 - 1, zero-padded evenly; volumes are brought to that form
here. The settings travel with the model, so that whatever it classifies is prepared as its training data
were.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.data import statistics
from fastflow.data._intensity import Intensities, Scaling
from fastflow.data.volume import Volume
from fastflow.errors import VolumeError

SCALINGS = ("percentile", "fixed")
# Voxel sizes are one grid's where they differ by no more than this part.
SPACING_TOLERANCE = 0.01
# `to_unit_range` turns a step of one grey level into this part of [-1, 1].
GREY_LEVEL = 2.0 / 255.0
_SPEC = re.compile(r"center(?:\+-(\d+)(?::([1-9]\d*))?)?|\d+(?:,\d+)*")


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a volume becomes slices.

    Attributes:
        size: (H, W) of the model's image; smaller slices are padded evenly with zeros, the top and left
            taking the floor.
        slices: ``"center"``, ``"center+-N"`` (2N + 1 slices), ``"center+-N:S"`` (every S-th of those, counted
            from the centre) or ``"i,j,k"``: indices along the anterior axis of the canonical volume.
        spacing: voxel size in mm that a volume must have (to 1 %), or None for any.
        grid: (X, Y, Z) that a canonical volume must have, or None for any.
        scaling: ``"percentile"`` maps 0 to 0 and the 99.9th percentile of the volume's positive voxels to
            255: magnitude images have their zero where the signal is zero, and a maximum would follow a
                single bright vessel.
            ``"fixed"`` takes values as 0 to 255 already.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    size: tuple[int, int]
    slices: str = "center"
    spacing: tuple[float, float, float] | None = None
    grid: tuple[int, int, int] | None = None
    scaling: str = "percentile"

    def __post_init__(self) -> None:
        for name, length, kind in (("size", 2, Integral), ("spacing", 3, Real), ("grid", 3, Integral)):
            value = getattr(self, name)
            if value is None and name != "size":
                continue
            number = "whole numbers" if kind is Integral else "numbers"
            if (
                not isinstance(value, tuple | list)
                or len(value) != length
                or not all(_is_positive(n, kind) for n in value)
            ):
                raise ValueError(f"{name} must be {length} positive {number}, got {value!r}")
            # NumPy's numbers cannot be written as JSON, so Python's own are kept.
            object.__setattr__(self, name, tuple(int(n) if kind is Integral else float(n) for n in value))
        if not isinstance(self.slices, str) or not _SPEC.fullmatch(self.slices):
            raise ValueError(
                f"slices must be 'center', 'center+-N', 'center+-N:S' or 'i,j,k', got {self.slices!r}"
            )
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling must be one of {', '.join(SCALINGS)}, got {self.scaling!r}")

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; `from_dict` is its inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocess:
        """Build from `to_dict`'s form.

        Raises:
            ValueError: an unknown or missing field, or a value out of range.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown or "size" not in values:
            raise ValueError(
                f"preprocessing has unknown field(s) {unknown}"
                if unknown
                else "preprocessing has no field 'size'"
            )
        return cls(**values)

    def __call__(self, volume: Volume) -> NDArray[np.uint8]:
        """Take the slices of a volume.

        Args:
            volume: in canonical orientation.

        Returns:
            (n, 1, H, W) uint8, anterior order as `slices` lists them.

        Raises:
            VolumeError: the volume is on another grid, constant, not finite, or too small or too large for
                the slices, or a slice is blank.
        """
        return self.take(volume)[0]

    def take(self, volume: Volume) -> tuple[NDArray[np.uint8], float]:
        """`(images, negative)`: the slices as a call gives them, and the share of voxels below 0."""
        indices = self.locate(volume.path, volume.data.shape, volume.spacing)
        intensities = self.intensities(volume.data.dtype, volume.data.size, Scaling())
        # Planes across the slowest axis of memory are contiguous chunks.
        for plane in np.moveaxis(volume.data, int(np.argmax(np.abs(volume.data.strides))), 0):
            intensities.add(plane)
        planes = coronal_slices(volume.data, indices)
        return self.render(volume.path, planes, Scaling(), intensities, indices), intensities.negative_share

    def locate(self, path: str, shape: Sequence[int], spacing: Sequence[float]) -> list[int]:
        """Indices of the slices along the anterior axis of a canonical volume.

        Args:
            path: the volume's file, for messages.
            shape: voxels along X, Y, Z.
            spacing: voxel size along X, Y, Z in mm.

        Raises:
            VolumeError: the volume is on another grid, or too small or too large for the slices.
        """
        if self.spacing is not None and not np.allclose(spacing, self.spacing, rtol=SPACING_TOLERANCE):
            found = " x ".join(f"{n:.3g}" for n in spacing)
            raise VolumeError(
                path, "grid_mismatch", f"voxels are {found} mm; the model was trained on {self.spacing}"
            )
        if self.grid is not None and tuple(shape) != self.grid:
            raise VolumeError(
                path, "grid_mismatch", f"grid is {tuple(shape)}; the model was trained on {self.grid}"
            )
        try:
            indices = slice_indices(self.slices, shape[1])
        except ValueError as error:
            raise VolumeError(path, "slice_range", str(error)) from error
        try:
            _missing((shape[2], shape[0]), self.size)
        except ValueError as error:
            raise VolumeError(path, "size", str(error)) from error
        return indices

    def intensities(self, dtype: np.dtype[Any], count: int, scaling: Scaling) -> Intensities:
        """The collector that sees all voxels of a volume before `render`.

        Args:
            dtype: of the stored values.
            count: voxels of the volume.
            scaling: turns stored values into intensities.
        """
        return Intensities(dtype, count, scaling, ranked=self.scaling == "percentile")

    def render(
        self,
        path: str,
        planes: NDArray[Any],
        scaling: Scaling,
        intensities: Intensities,
        indices: Sequence[int] | None = None,
    ) -> NDArray[np.uint8]:
        """8-bit images of (n, Z, X) stored values, (n, 1, H, W).

        Args:
            path: the volume's file, for messages.
            planes: stored values.
            scaling: turns them into intensities.
            intensities: of all voxels of the volume.
            indices: of the planes along the anterior axis, for messages.

        Raises:
            VolumeError: a voxel of the volume is not finite, the volume is constant, or a slice is blank, see
                `fastflow.data.statistics.blank_slice`.
        """
        if intensities.non_finite:
            raise VolumeError(path, "non_finite", f"{intensities.non_finite} voxels are NaN or infinite")
        factor = 1.0
        if self.scaling == "percentile":
            top = intensities.top()
            if top is None:
                raise VolumeError(path, "constant", "has no contrast")
            factor = 255.0 / top
        images = np.empty(planes.shape, dtype=np.uint8)
        # Images are converted one by one, as they are many where a whole volume is asked for.
        for image, plane in zip(images, planes, strict=True):
            image[...] = np.clip(np.rint(scaling.apply(plane).astype(np.float64) * factor), 0, 255)
        check_not_blank(path, images, indices)
        return pad_evenly(images, self.size)[:, None]


def check_not_blank(path: str, images: NDArray[np.uint8], indices: Sequence[int] | None = None) -> None:
    """Raise where a slice shows nothing: any model would give it some label.

    Args:
        path: the file, for messages.
        images: (n, H, W), without padding.
        indices: of the slices along the anterior axis, for messages.

    Raises:
        VolumeError: a slice is blank, see `fastflow.data.statistics.blank_slice`.
    """
    blank = statistics.blank_slice(images)
    if blank is None:
        return
    place, reason = blank
    which = "the image" if indices is None else f"slice {indices[place]} along the anterior axis"
    hint = "" if indices is None else "; look at the volume there, or take other slices"
    raise VolumeError(path, "blank", f"{which} is blank: {reason}{hint}")


def _is_positive(value: object, kind: type) -> bool:
    if not isinstance(value, kind) or isinstance(value, bool):
        return False
    return 0 < float(value) < math.inf  # type: ignore[arg-type]


def coronal_slices(data: NDArray[Any], indices: Sequence[int]) -> NDArray[Any]:
    """Slices across the anterior axis, as one looks at them.

    Args:
        data: (X, Y, Z) in canonical orientation (RAS+).
        indices: along Y.

    Returns:
        (n, Z, X): row 0 is the top of the head, column 0 the patient's left.
    """
    return np.ascontiguousarray(np.moveaxis(data[:, list(indices), ::-1], (1, 2, 0), (0, 1, 2)))


def slice_indices(spec: str, length: int) -> list[int]:
    """The indices that `spec` (see `Preprocess.slices`) means along an axis of `length` voxels.

    Raises:
        ValueError: an index lies outside the axis.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"slices must be 'center', 'center+-N', 'center+-N:S' or 'i,j,k', got {spec!r}")
    if spec.startswith("center"):
        reach, stride = int(match[1] or 0), int(match[2] or 1)
        reach -= reach % stride
        # The indices stay a range, so that an absurd reach costs nothing before it is refused.
        indices: Sequence[int] = range(length // 2 - reach, length // 2 + reach + 1, stride)
        ends = [indices[0], indices[-1]]
    else:
        ends = indices = [int(part) for part in spec.split(",")]
    outside = [i for i in ends if not 0 <= i < length]
    if outside:
        raise ValueError(f"slices {spec!r} asks for index {outside[0]} of an axis of {length}")
    return list(indices)


def pad_evenly(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Zero-pad the last two axes to `size`; top and left take the floor of what is missing.

    Raises:
        ValueError: the images are larger than `size`.
    """
    missing = _missing(images.shape[-2:], size)
    edges = [(0, 0)] * (images.ndim - 2) + [(n // 2, n - n // 2) for n in missing]
    return np.pad(images, edges)


def without_padding(images: NDArray[np.uint8], content: tuple[int, int]) -> NDArray[np.uint8]:
    """The views of (h, w) that `pad_evenly` has padded; its inverse."""
    (height, width), shape = content, images.shape[-2:]
    top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    return images[..., top : top + height, left : left + width]


def _missing(shape: Sequence[int], size: tuple[int, int]) -> list[int]:
    missing = [want - got for want, got in zip(size, shape, strict=True)]
    if min(missing) < 0:
        raise ValueError(f"slices are {shape[0]} x {shape[1]}, larger than the model's {size[0]} x {size[1]}")
    return missing


def to_unit_range(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """8-bit images to [-1, 1]: ``2 * v / 255 - 1``."""
    return images.astype(np.float32) * np.float32(GREY_LEVEL) - np.float32(1.0)


def to_uint8(images: NDArray[Any]) -> NDArray[np.uint8]:
    """The nearest 8-bit images of values in [-1, 1]; values outside are clipped."""
    return np.clip(np.rint((np.asarray(images, dtype=np.float64) + 1.0) * 127.5), 0, 255).astype(np.uint8)
