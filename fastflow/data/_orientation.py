"""Where the voxels of a header lie: axes, affine and voxel size in millimetres, and doubts about them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import affines, orientations
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fastflow.errors import VolumeError

# The limits are an angle in degrees and a distance in mm.
MAX_OBLIQUITY = 15.0
MAX_DISAGREEMENT = 2.0

FLAG_CODES = {
    "oblique": (
        f"the axes lie more than {MAX_OBLIQUITY:g} degrees off the scanner's; slices follow the voxels"
    ),
    "forms_disagree": (
        f"sform and qform place a corner of the volume more than {MAX_DISAGREEMENT:g} mm apart; "
        "the sform is used"
    ),
    "no_orientation": "the header states no orientation; the format's default is assumed",
    "orientation_code": "sform_code or qform_code is none of NIfTI's",
    "negative_spacing": (
        "there is no sform, and a voxel size in pixdim is negative; its absolute value is used"
    ),
}

PARSING = (
    HeaderDataError,
    ValueError,
    KeyError,
    ArithmeticError,
    np.linalg.LinAlgError,
    orientations.OrientationError,
)


@dataclasses.dataclass(frozen=True)
class Flag:
    """A doubt about a file that is used nevertheless.

    Attributes:
        code: a short stable identifier, one of `FLAG_CODES`.
        message: what was found.
    """

    code: str
    message: str


@dataclasses.dataclass(frozen=True)
class Place:
    """Where voxels lie; `Header` says more of `axes`, `affine` and `spacing`."""

    axes: tuple[tuple[int, int], ...]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    flags: tuple[Flag, ...]


def orient(name: str, header: Any, shape: tuple[int, int, int], unit: float = 1.0) -> Place:
    """The axes, affine and voxel size that a header states.

    Args:
        name: of the file, for messages.
        header: of nibabel.
        shape: voxels along the file's axes.
        unit: of the header's lengths, in mm.

    Raises:
        VolumeError: the affine is singular or not finite.
    """
    try:
        with np.errstate(all="ignore"):
            affine = _in_mm(header.get_best_affine(), unit)
            codes = _axes(affine)
            tilt = np.degrees(np.nanmax(affines.obliquity(affine)))
            affine = affine @ orientations.inv_ornt_aff(codes, shape)
            x, y, z = (float(n) for n in np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))
        if not np.isfinite([x, y, z, *affine.flat]).all():
            raise ValueError("not finite")
    except PARSING as error:
        raise VolumeError(name, "affine", f"the affine gives no orientation: {error}") from error
    flags = (
        (Flag("oblique", f"an axis is {tilt:.0f} degrees off the scanner's"),) if tilt > MAX_OBLIQUITY else ()
    )
    return Place(tuple((int(axis), int(flip)) for axis, flip in codes), affine, (x, y, z), flags)


def _in_mm(affine: Any, unit: float) -> NDArray[np.float64]:
    return np.diag([unit, unit, unit, 1.0]) @ np.asarray(affine, dtype=np.float64)


def _axes(affine: NDArray[np.float64]) -> NDArray[Any]:
    if not np.isfinite(affine).all() or not 1e-12 <= abs(np.linalg.det(affine[:3, :3])) < np.inf:
        raise ValueError("singular or not finite")
    codes = np.asarray(orientations.io_orientation(affine))
    if np.isnan(codes).any():
        raise ValueError("an axis has no direction")
    return codes


def check_forms(name: str, header: Any, shape: tuple[int, int, int], unit: float) -> list[Flag]:
    """Doubts about a NIfTI header's sform and qform, with arguments as `orient` takes them.

    Raises:
        VolumeError: the two forms name different axes.
    """
    codes = {form: int(header[f"{form}_code"]) for form in ("sform", "qform")}
    said = " and ".join(f"{form}_code is {code}" for form, code in codes.items())
    flags = [] if all(0 <= code <= 5 for code in codes.values()) else [Flag("orientation_code", said)]
    if not any(codes.values()):
        flags.append(Flag("no_orientation", said))
    if not all(codes.values()):
        return flags
    sform = _in_mm(header.get_sform(), unit)
    try:
        with np.errstate(all="ignore"):
            qform = _in_mm(header.get_qform(), unit)
            agree = np.array_equal(_axes(sform), _axes(qform))
    except PARSING as error:
        return [*flags, Flag("forms_disagree", f"the qform cannot be computed: {error}")]
    if not agree:
        names = ["".join(nib.aff2axcodes(form)) for form in (sform, qform)]
        raise VolumeError(
            name, "orientation_conflict", f"axes are {names[0]} by the sform, {names[1]} by the qform"
        )
    corners = np.array(
        [[*corner, 1] for corner in itertools.product(*((0, n - 1) for n in shape))], dtype=np.float64
    )
    with np.errstate(all="ignore"):
        apart = float(np.linalg.norm((corners @ (sform - qform).T)[:, :3], axis=1).max())
    if not apart <= MAX_DISAGREEMENT:
        flags.append(Flag("forms_disagree", f"sform and qform are up to {apart:.3g} mm apart"))
    return flags
