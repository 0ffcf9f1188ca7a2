"""Safe reading of NIfTI volumes: the header is checked before anything is allocated, gzip streams are drained to their checksum.

nibabel parses headers and orientations. It does not notice a bad CRC in a ``.nii.gz``, so the bytes are inflated here, in bounded
chunks and never beyond what the header promises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import io
import os
import zlib
from os import PathLike
from stat import S_ISREG
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
from nibabel import orientations
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from fastflow.errors import VolumeError

MAX_VOXELS = 512**3
HEADER_BYTES = {348: nib.Nifti1Header, 540: nib.Nifti2Header}
Stream = BinaryIO | gzip.GzipFile
_CHUNK = 1 << 20

ERROR_CODES = {
    "missing": "there is no such file",
    "not_a_file": "the path is a folder or a device",
    "unreadable": "the operating system refuses to read it",
    "empty": "the file has no bytes",
    "unsupported_format": "neither .nii, .nii.gz nor .png",
    "header": "the NIfTI header cannot be parsed or contradicts itself",
    "dims": "the volume is not three-dimensional, or a dimension is not positive",
    "dtype": "voxels are not real numbers (RGB, complex, unknown type)",
    "too_large": "the header promises more voxels than the limit",
    "affine": "the affine is singular or not finite, so there is no orientation",
    "truncated": "there are fewer bytes than the header promises",
    "too_long": "there are more bytes than the header promises",
    "crc": "the gzip stream is corrupt (checksum, length or deflate error)",
    "non_finite": "a voxel is NaN or infinite",
    "constant": "all voxels are equal: there is nothing to scale",
    "grid_mismatch": "voxel size or shape is not that of the model's grid",
    "slice_range": "a requested slice lies outside the volume",
    "size": "the slice is larger than the model's image",
    "image": "the PNG is corrupt, or not 8-bit grey",
}


@dataclasses.dataclass(frozen=True)
class Volume:
    """A three-dimensional image in canonical orientation.

    Attributes:
        data: (X, Y, Z) float32; axes run to the right, to the front and up (RAS+).
        spacing: voxel size along X, Y, Z in mm.
        affine: (4, 4), voxel indices to scanner millimetres.
        path: the file it came from.
    """

    data: NDArray[np.float32]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    path: str


def read_volume(path: str | PathLike[str], max_voxels: int = MAX_VOXELS) -> Volume:
    """Read a ``.nii`` or ``.nii.gz`` volume in canonical orientation.

    Args:
        path: the file.
        max_voxels: refuse volumes whose header promises more.

    Returns:
        The volume, intensities scaled by the header's slope and intercept.

    Raises:
        VolumeError: the file cannot be used; its code is one of `ERROR_CODES`.
    """
    name = str(path)
    if not name.endswith((".nii", ".nii.gz")):
        raise VolumeError(name, "unsupported_format", "is not a .nii or .nii.gz file")
    size = check_file(name)
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(name, "rb"))
            stream: Stream = stack.enter_context(gzip.GzipFile(fileobj=raw)) if name.endswith(".gz") else raw
            header = _read_header(name, stream)
            shape, dtype, offset = _check_header(name, header, max_voxels, None if name.endswith(".gz") else size)
            voxels = _read_voxels(name, stream, shape, dtype, offset - header.sizeof_hdr)
        except (zlib.error, gzip.BadGzipFile) as error:
            raise VolumeError(name, "crc", f"the gzip stream is corrupt: {error}") from error
        except EOFError as error:
            raise VolumeError(name, "truncated", "the gzip stream ends early") from error
        except OSError as error:
            raise VolumeError(name, "unreadable", f"cannot be read: {error.strerror or error}") from error
    return _orient(name, _scale(name, voxels, header), header)


def check_file(name: str) -> int:
    """Size in bytes of a regular file.

    Raises:
        VolumeError: it is missing, empty, or a folder, pipe or device, which would block whoever opens it.
    """
    try:
        stat = os.stat(name)
    except FileNotFoundError:
        raise VolumeError(name, "missing", "there is no such file") from None
    except OSError as error:
        raise VolumeError(name, "unreadable", f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise VolumeError(name, "unreadable", f"is no file name: {error}") from error
    if not S_ISREG(stat.st_mode):
        raise VolumeError(name, "not_a_file", "is not a regular file")
    if stat.st_size == 0:
        raise VolumeError(name, "empty", "the file is empty")
    return stat.st_size


def _read_header(name: str, stream: Stream) -> Any:
    first = stream.read(4)
    sizes = {int.from_bytes(first, order) for order in ("little", "big")} & set(HEADER_BYTES)
    if len(first) < 4 or not sizes:
        raise VolumeError(name, "header", "does not start with a NIfTI-1 or NIfTI-2 header")
    size = sizes.pop()
    block = first + stream.read(size - 4)
    if len(block) < size:
        raise VolumeError(name, "truncated", f"has {len(block)} of the header's {size} bytes")
    try:
        header = HEADER_BYTES[size].from_fileobj(io.BytesIO(block), check=False)
    except (HeaderDataError, ValueError, KeyError) as error:
        raise VolumeError(name, "header", f"the header cannot be parsed: {error}") from error
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise VolumeError(name, "header", f"magic is {bytes(header['magic'])!r}, not that of a single-file NIfTI")
    header.sizeof_hdr = size
    return header


def _check_header(
    name: str, header: Any, max_voxels: int, file_size: int | None
) -> tuple[tuple[int, int, int], np.dtype[Any], int]:
    """(shape, dtype, offset of the voxels), or an error, before anything of that size is allocated."""
    dims = [int(n) for n in header["dim"]]
    count = dims[0]
    if not 3 <= count <= 7 or any(n < 1 for n in dims[1 : count + 1]) or any(n != 1 for n in dims[4 : count + 1]):
        raise VolumeError(name, "dims", f"dim is {dims[: max(1, min(count, 7)) + 1]}; three positive dimensions are accepted")
    shape = (dims[1], dims[2], dims[3])
    voxels = shape[0] * shape[1] * shape[2]
    if voxels > max_voxels:
        raise VolumeError(name, "too_large", f"the header promises {voxels} voxels; the limit is {max_voxels}")
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise VolumeError(name, "dtype", f"datatype {int(header['datatype'])} is unknown") from error
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise VolumeError(name, "dtype", f"voxels are {dtype}; integers and real floats of up to 64 bits are accepted")
    offset = float(header["vox_offset"])
    if not header.sizeof_hdr <= offset <= header.sizeof_hdr + (1 << 24) or offset != int(offset):
        raise VolumeError(name, "header", f"vox_offset is {offset}")
    if file_size is not None and file_size < offset + voxels * dtype.itemsize:
        raise VolumeError(name, "truncated", f"has {file_size} of the {int(offset) + voxels * dtype.itemsize} bytes promised")
    return shape, dtype, int(offset)


def _read_voxels(name: str, stream: Stream, shape: tuple[int, int, int], dtype: np.dtype[Any], skip: int) -> NDArray[Any]:
    while skip > 0:
        block = stream.read(min(skip, _CHUNK))
        if not block:
            raise VolumeError(name, "truncated", "ends before its voxels")
        skip -= len(block)
    voxels = np.empty(shape, dtype=dtype, order="F")
    target = memoryview(voxels.reshape(-1, order="F").view(np.uint8).data)
    done = 0
    while done < len(target):
        block = stream.read(min(_CHUNK, len(target) - done))
        if not block:
            raise VolumeError(name, "truncated", f"has {done} of {len(target)} bytes of voxels")
        target[done : done + len(block)] = block
        done += len(block)
    # Reading on to the end is what makes the gzip module check the CRC and the length.
    if stream.read(1) and isinstance(stream, gzip.GzipFile):
        raise VolumeError(name, "too_long", f"holds more than the {len(target)} bytes of voxels that its header promises")
    return voxels


def _scale(name: str, voxels: NDArray[Any], header: Any) -> NDArray[np.float32]:
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(slope) and slope != 0:
            scaled = voxels.astype(np.float64) * slope + (inter if np.isfinite(inter) else 0.0)
        else:
            scaled = voxels
        data = np.asarray(scaled, dtype=np.float32)
    if not np.isfinite(data).all():
        raise VolumeError(name, "non_finite", f"{int((~np.isfinite(data)).sum())} voxels are NaN or infinite")
    return data


def _orient(name: str, data: NDArray[np.float32], header: Any) -> Volume:
    if header["pixdim"][0] != -1:
        # The standard reads a qfac of 0 as 1; nibabel's lenient loading does so with any other value.
        header["pixdim"][0] = 1
    try:
        with np.errstate(all="ignore"):
            affine = np.asarray(header.get_best_affine(), dtype=np.float64)
            if not np.isfinite(affine).all() or not 1e-12 <= abs(np.linalg.det(affine[:3, :3])) < np.inf:
                raise ValueError("singular or not finite")
            codes = orientations.io_orientation(affine)
            if np.isnan(codes).any():
                raise ValueError("an axis has no direction")
            affine = affine @ orientations.inv_ornt_aff(codes, data.shape)
            spacing = tuple(float(n) for n in np.sqrt((affine[:3, :3] ** 2).sum(axis=0)))
        if not np.isfinite([*spacing, *affine.flat]).all():
            raise ValueError("not finite")
    except (ValueError, HeaderDataError, np.linalg.LinAlgError, orientations.OrientationError) as error:
        raise VolumeError(name, "affine", f"the affine gives no orientation: {error}") from error
    return Volume(np.asarray(orientations.apply_orientation(data, codes)), (spacing[0], spacing[1], spacing[2]), affine, name)
