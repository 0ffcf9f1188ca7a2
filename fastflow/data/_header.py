"""Headers of NIfTI and MGH files, checked against limits before anything of that size is allocated."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import PurePath
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fastflow.data._intensity import Scaling
from fastflow.data._kinds import HEAD_BYTES, wrong_kind
from fastflow.data._opening import Readable, read_up_to
from fastflow.data._orientation import PARSING, Place, check_forms, orient
from fastflow.data._orientation import Flag as Flag
from fastflow.data.endings import ending_of
from fastflow.errors import VolumeError

MAX_VOXELS = 512**3
# Streams are read in whole planes, so the voxels of one plane are limited too.
MAX_PLANE_VOXELS = 2048**2
MAX_FRAMES = 1000
# Scan parameters and tags follow the voxels of MGH files.
MAX_FOOTER_BYTES = 16 << 20
# Tapes and block devices fill their last block with zeros.
MAX_PADDING_BYTES = 4096
MAX_EXTENSION_BYTES = 16 << 20
_NIFTI = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
_MGH_HEADER, _MGH_OFFSET = 90, 284
# The codes of lengths in a NIfTI header's xyzt_units, and their size in mm.
_UNITS = {1: ("metres", 1e3), 2: ("mm", 1.0), 3: ("microns", 1e-3)}


@dataclasses.dataclass(frozen=True)
class Header:
    """The promises of a file's header, within the limits.

    Attributes:
        shape: voxels along the file's axes; the first runs fastest.
        frames: volumes that follow each other; more than one for PET only.
        dtype: of the stored values, in the file's byte order.
        offset: byte at which the voxels begin.
        read: bytes of the header that have been read.
        footer: bytes that may follow the voxels.
        padded: whether those must be zeros.
        hidden_frames: frames that a NIfTI's dim[4] names where dim[0] leaves it out.
        scaling: from stored values to intensities.
        axes: for each of the file's axes, the nearest canonical axis and the direction along it, 1 or -1.
        affine: (4, 4), voxel indices of the canonical volume to scanner millimetres.
        spacing: voxel size along the canonical axes in mm.
        unit: of the lengths in the file; None where it names none, and mm are assumed.
        flags: doubts about the orientation.
    """

    shape: tuple[int, int, int]
    frames: int
    dtype: np.dtype[Any]
    offset: int
    read: int
    footer: int
    padded: bool
    hidden_frames: int
    scaling: Scaling
    axes: tuple[tuple[int, int], ...]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    unit: str | None
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


def read_header(name: str, stream: Readable, max_voxels: int, packed: bool) -> Header:
    """Read and check the header at the beginning of a stream.

    Args:
        name: of the file.
        stream: at its beginning.
        max_voxels: refuse headers that promise more, frames included.
        packed: whether the stream is inflated from gzip, for messages.

    Raises:
        VolumeError: the header cannot be parsed, or promises more than is accepted.
    """
    read = _read_mgh if ending_of(name) in (".mgh", ".mgz") else _read_nifti
    try:
        return read(name, stream, max_voxels)
    except _UnlikeHeader as unlike:
        head = unlike.start + read_up_to(stream, HEAD_BYTES - len(unlike.start))
        raise wrong_kind(name, head, packed) or VolumeError(name, "header", unlike.message) from None


class _UnlikeHeader(Exception):
    """A stream begins unlike the header of the format that its name promises.

    Attributes:
        start: the bytes that were read.
        message: what is wrong with them, should they be of no kind that is known.
    """

    def __init__(self, start: bytes, message: str) -> None:
        self.start, self.message = start, message


def _read_nifti(name: str, stream: Readable, max_voxels: int) -> Header:
    first = read_up_to(stream, 4)
    sizes = {int.from_bytes(first, order) for order in ("little", "big")} & set(_NIFTI)
    if len(first) < 4 or not sizes:
        raise _UnlikeHeader(first, "does not start with a NIfTI-1 or NIfTI-2 header")
    size = sizes.pop()
    block = first + read_up_to(stream, size - 4)
    if len(block) < size:
        raise VolumeError(name, "truncated", f"has {len(block)} of the header's {size} bytes")
    try:
        header = _NIFTI[size].from_fileobj(io.BytesIO(block), check=False)
    except PARSING as error:
        raise VolumeError(name, "header", f"the header cannot be parsed: {error}") from error
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise _UnlikeHeader(
            block, f"magic is {bytes(header['magic'])!r}, not that of a single-file NIfTI: n+1 or n+2"
        )
    count = int(header["dim"][0])
    dims = [int(n) for n in header["dim"][1:]]
    if not 3 <= count <= 7:
        raise VolumeError(name, "dims", f"dim[0] is {count}; three dimensions are accepted")
    shape, frames = _check_dims(name, dims[:count], max_voxels)
    dtype = _check_dtype(name, header, "datatype")
    offset = _voxel_offset(name, float(header["vox_offset"]), size + 4)
    flags = _settle_pixdim(header)
    unit, mm = _UNITS.get(int(header["xyzt_units"]) & 7, (None, 1.0))
    place = orient(name, header, shape, mm)
    return Header(
        shape=shape,
        frames=frames,
        dtype=dtype,
        offset=offset,
        read=size,
        # A whole volume more is never padding, however small it is.
        footer=min(MAX_PADDING_BYTES, math.prod(shape) * dtype.itemsize - 1),
        padded=True,
        hidden_frames=max(1, dims[3]) if count == 3 else 1,
        scaling=Scaling.of_header(float(header["scl_slope"]), float(header["scl_inter"])),
        axes=place.axes,
        affine=place.affine,
        spacing=place.spacing,
        unit=unit,
        flags=(*place.flags, *check_forms(name, header, shape, mm), *flags),
    )


def _voxel_offset(name: str, stored: float, least: int) -> int:
    """The byte at which the voxels of a single-file NIfTI begin; an offset of 0 stands for the least.

    Raises:
        VolumeError: it lies inside the header, is no whole number, or is absurdly far away.
    """
    if stored == 0:
        return least
    if not least <= stored <= least + MAX_EXTENSION_BYTES:
        raise VolumeError(
            name,
            "header",
            f"vox_offset is {stored:g}; voxels begin between byte {least} and {least + MAX_EXTENSION_BYTES}",
        )
    if stored != int(stored):
        raise VolumeError(name, "header", f"vox_offset is {stored:g}, which is no whole number of bytes")
    return int(stored)


def _settle_pixdim(header: Any) -> list[Flag]:
    """Repair the voxel sizes of a header as nibabel does when it loads one, and name a doubt that is left."""
    if header["pixdim"][0] != -1:
        # The standard reads a qfac of 0 as 1; nibabel's lenient loading does so with any other value.
        header["pixdim"][0] = 1
    sizes = header["pixdim"][1:4].copy()
    header["pixdim"][1:4] = np.abs(sizes)
    if int(header["sform_code"]) != 0 or not (sizes < 0).any():
        return []
    return [
        Flag("negative_spacing", f"pixdim is {', '.join(f'{n:g}' for n in sizes)}, and there is no sform")
    ]


def _read_mgh(name: str, stream: Readable, max_voxels: int) -> Header:
    block = read_up_to(stream, _MGH_HEADER)
    if int.from_bytes(block[:4]) != 1:
        raise _UnlikeHeader(block, "does not start with an MGH header of version 1")
    if len(block) < _MGH_HEADER:
        raise VolumeError(name, "truncated", f"has {len(block)} of the header's {_MGH_HEADER} bytes")
    try:
        header = MGHHeader(block, check=False)
    except PARSING as error:
        raise VolumeError(name, "header", f"the header cannot be parsed: {error}") from error
    shape, frames = _check_dims(name, [int(n) for n in header["dims"]], max_voxels)
    dtype = _check_dtype(name, header, "type")
    place: Place = orient(name, header, shape)
    flags = place.flags
    # nibabel fills in the default orientation and sets the flag, so the stored bytes are looked at.
    if not any(block[28:30]):
        flags = (*flags, Flag("no_orientation", "goodRASFlag is 0; a coronal volume is assumed"))
    return Header(
        shape=shape,
        frames=frames,
        dtype=dtype,
        offset=_MGH_OFFSET,
        read=_MGH_HEADER,
        footer=MAX_FOOTER_BYTES,
        padded=False,
        hidden_frames=1,
        scaling=Scaling(),
        axes=place.axes,
        affine=place.affine,
        spacing=place.spacing,
        unit="mm",
        flags=flags,
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
