"""Headers of NIfTI and MGH files, checked against limits before anything of that size is allocated."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from pathlib import PurePath
from typing import Any, Protocol

import nibabel as nib
import numpy as np
from nibabel import affines, orientations
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fastflow.data._intensity import Scaling
from fastflow.data.endings import ending_of
from fastflow.errors import VolumeError

MAX_VOXELS = 512**3
# Streams are read in whole planes, so the voxels of one plane are limited too.
MAX_PLANE_VOXELS = 2048**2
MAX_FRAMES = 1000
# Scan parameters and tags follow the voxels of MGH files.
MAX_FOOTER_BYTES = 16 << 20
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
}

_NIFTI = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MGH_HEADER, _MGH_OFFSET = 90, 284
_PARSING = (
    HeaderDataError,
    ValueError,
    KeyError,
    ArithmeticError,
    np.linalg.LinAlgError,
    orientations.OrientationError,
)


class Readable(Protocol):
    """A file or a stream."""

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes."""


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
class Header:
    """The promises of a file's header, within the limits.

    Attributes:
        shape: voxels along the file's axes; the first runs fastest.
        frames: volumes that follow each other; more than one for PET only.
        dtype: of the stored values, in the file's byte order.
        offset: byte at which the voxels begin.
        read: bytes of the header that have been read.
        footer: bytes that may follow the voxels in a compressed file.
        scaling: from stored values to intensities.
        axes: for each of the file's axes, the nearest canonical axis and the direction along it, 1 or -1.
        affine: (4, 4), voxel indices of the canonical volume to scanner millimetres.
        spacing: voxel size along the canonical axes in mm.
        flags: doubts about the orientation.
    """

    shape: tuple[int, int, int]
    frames: int
    dtype: np.dtype[Any]
    offset: int
    read: int
    footer: int
    scaling: Scaling
    axes: tuple[tuple[int, int], ...]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    flags: tuple[Flag, ...]

    @property
    def voxels(self) -> int:
        """Voxels of one frame."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of all frames."""
        return self.voxels * self.frames * self.dtype.itemsize

    @property
    def canonical_shape(self) -> tuple[int, int, int]:
        """Voxels along the canonical axes."""
        x, y, z = (self.shape[self.file_axis(axis)] for axis in range(3))
        return x, y, z

    def file_axis(self, canonical: int) -> int:
        """The index of the file's axis that is nearest to a canonical axis."""
        return [axis for axis, _ in self.axes].index(canonical)


def read_header(name: str, stream: Readable, max_voxels: int) -> Header:
    """Read and check the header at the beginning of a stream.

    Raises:
        VolumeError: the header cannot be parsed, or promises more than is accepted.
    """
    return (
        _read_mgh(name, stream, max_voxels)
        if ending_of(name) in (".mgh", ".mgz")
        else _read_nifti(name, stream, max_voxels)
    )


def _read_nifti(name: str, stream: Readable, max_voxels: int) -> Header:
    first = stream.read(4)
    sizes = {int.from_bytes(first, order) for order in ("little", "big")} & set(_NIFTI)
    if len(first) < 4 or not sizes:
        raise VolumeError(name, "header", "does not start with a NIfTI-1 or NIfTI-2 header")
    size = sizes.pop()
    block = first + stream.read(size - 4)
    if len(block) < size:
        raise VolumeError(name, "truncated", f"has {len(block)} of the header's {size} bytes")
    try:
        header = _NIFTI[size].from_fileobj(io.BytesIO(block), check=False)
    except _PARSING as error:
        raise VolumeError(name, "header", f"the header cannot be parsed: {error}") from error
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise VolumeError(
            name, "header", f"magic is {bytes(header['magic'])!r}, not that of a single-file NIfTI"
        )
    count = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1 : max(1, min(count, 7)) + 1]]
    if not 3 <= count <= 7:
        raise VolumeError(name, "dims", f"dim[0] is {count}; three dimensions are accepted")
    shape, frames = _check_dims(name, dims, max_voxels)
    dtype = _check_dtype(name, header, "datatype")
    offset = float(header["vox_offset"])
    if not size <= offset <= size + (1 << 24) or offset != int(offset):
        raise VolumeError(name, "header", f"vox_offset is {offset}")
    if header["pixdim"][0] != -1:
        # The standard reads a qfac of 0 as 1; nibabel's lenient loading does so with any other value.
        header["pixdim"][0] = 1
    scaling = Scaling.of_header(float(header["scl_slope"]), float(header["scl_inter"]))
    place = _orient(name, header, shape)
    flags = (*place[-1], *_check_forms(name, header, shape))
    return Header(shape, frames, dtype, int(offset), size, 0, scaling, *place[:-1], flags)


def _read_mgh(name: str, stream: Readable, max_voxels: int) -> Header:
    block = stream.read(_MGH_HEADER)
    if len(block) < _MGH_HEADER:
        raise VolumeError(name, "truncated", f"has {len(block)} of the header's {_MGH_HEADER} bytes")
    if int.from_bytes(block[:4]) != 1:
        raise VolumeError(name, "header", "does not start with an MGH header of version 1")
    try:
        header = MGHHeader(block, check=False)
    except _PARSING as error:
        raise VolumeError(name, "header", f"the header cannot be parsed: {error}") from error
    shape, frames = _check_dims(name, [int(n) for n in header["dims"]], max_voxels)
    dtype = _check_dtype(name, header, "type")
    place = _orient(name, header, shape)
    flags: tuple[Flag, ...] = place[-1]
    # nibabel fills in the default orientation and sets the flag, so the stored bytes are looked at.
    if not any(block[28:30]):
        flags = (*flags, Flag("no_orientation", "goodRASFlag is 0; a coronal volume is assumed"))
    return Header(
        shape, frames, dtype, _MGH_OFFSET, _MGH_HEADER, MAX_FOOTER_BYTES, Scaling(), *place[:-1], flags
    )


def is_pet(name: str) -> bool:
    """Whether the name of a file or of its folder marks it as a PET series in the manner of BIDS."""
    path = PurePath(name)
    return path.parent.name == "pet" or path.name.split(".")[0].endswith("_pet")


def _check_dims(name: str, dims: list[int], max_voxels: int) -> tuple[tuple[int, int, int], int]:
    """The (shape, frames) that stored dimensions mean.

    Raises:
        VolumeError: they are out of the limits.
    """
    if min(dims) < 1:
        raise VolumeError(name, "dims", f"dimensions are {dims}; three positive ones are accepted")
    shape, frames = (dims[0], dims[1], dims[2]), (dims[3] if len(dims) > 3 else 1)
    if any(n != 1 for n in dims[4:]):
        raise VolumeError(name, "dims", f"dimensions are {dims}; three are accepted, and frames of PET")
    if frames > 1 and not is_pet(name):
        raise VolumeError(
            name, "four_dimensional", f"has {frames} frames; only those of PET (..._pet or pet/...) are used"
        )
    voxels = math.prod(dims)
    if voxels > max_voxels:
        raise VolumeError(
            name, "too_large", f"the header promises {voxels} voxels; the limit is {max_voxels}"
        )
    if frames > MAX_FRAMES:
        raise VolumeError(
            name, "too_large", f"the header promises {frames} frames; the limit is {MAX_FRAMES}"
        )
    if shape[0] * shape[1] > MAX_PLANE_VOXELS:
        raise VolumeError(
            name, "too_large", f"a plane has {shape[0]} x {shape[1]} voxels; the limit is {MAX_PLANE_VOXELS}"
        )
    return shape, frames


def _check_dtype(name: str, header: Any, field: str) -> np.dtype[Any]:
    try:
        dtype: np.dtype[Any] = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise VolumeError(name, "dtype", f"{field} {int(header[field])} is unknown") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise VolumeError(
            name, "dtype", f"voxels are {dtype}; integers and real floats of up to 64 bits are accepted"
        )
    return dtype


Place = tuple[tuple[tuple[int, int], ...], NDArray[np.float64], tuple[float, float, float], tuple[Flag, ...]]


def _orient(name: str, header: Any, shape: tuple[int, int, int]) -> Place:
    """(axes, affine, spacing, flags) of a `Header`."""
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
            codes = _axes(affine)
            tilt = np.degrees(np.nanmax(affines.obliquity(affine)))
            affine = affine @ orientations.inv_ornt_aff(codes, shape)
            spacing = tuple(float(n) for n in np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))
        if not np.isfinite([*spacing, *affine.flat]).all():
            raise ValueError("not finite")
    except _PARSING as error:
        raise VolumeError(name, "affine", f"the affine gives no orientation: {error}") from error
    flags = (
        (Flag("oblique", f"an axis is {tilt:.0f} degrees off the scanner's"),) if tilt > MAX_OBLIQUITY else ()
    )
    return (
        tuple((int(axis), int(flip)) for axis, flip in codes),
        affine,
        (spacing[0], spacing[1], spacing[2]),
        flags,
    )


def _axes(affine: NDArray[np.float64]) -> NDArray[Any]:
    if not np.isfinite(affine).all() or not 1e-12 <= abs(np.linalg.det(affine[:3, :3])) < np.inf:
        raise ValueError("singular or not finite")
    codes = np.asarray(orientations.io_orientation(affine))
    if np.isnan(codes).any():
        raise ValueError("an axis has no direction")
    return codes


def _check_forms(name: str, header: Any, shape: tuple[int, int, int]) -> list[Flag]:
    """Doubts about sform and qform.

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
    sform = np.asarray(header.get_sform(), dtype=np.float64)
    try:
        with np.errstate(all="ignore"):
            qform = np.asarray(header.get_qform(), dtype=np.float64)
            agree = np.array_equal(_axes(sform), _axes(qform))
    except _PARSING as error:
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
