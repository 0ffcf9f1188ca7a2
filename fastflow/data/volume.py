"""Safe reading of NIfTI and MGH volumes: headers are checked first, and gzip is drained to its checksum.

nibabel parses headers and orientations. It does not notice a bad CRC in a ``.nii.gz``, so the bytes are
inflated here, in bounded chunks and never beyond what the header promises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import mmap
import os
from collections.abc import Iterator
from os import PathLike
from stat import S_ISREG
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from fastflow.data import _gzip
from fastflow.data._header import FLAG_CODES as FLAG_CODES
from fastflow.data._header import MAX_VOXELS as MAX_VOXELS
from fastflow.data._header import Flag as Flag
from fastflow.data._header import Header, Readable, read_header
from fastflow.data.endings import VOLUME_ENDINGS, ending_of
from fastflow.errors import VolumeError

# Chunks fit into half a processor's cache, so that inflated bytes are looked at while they are in it.
_CHUNK_BYTES = 1 << 19

ERROR_CODES = {
    "missing": "there is no such file",
    "not_a_file": "the path is a folder or a device",
    "unreadable": "the operating system refuses to read it",
    "empty": "the file has no bytes",
    "unsupported_format": "none of .nii, .nii.gz, .mgh, .mgz and .png",
    "header": "the header cannot be parsed or contradicts itself",
    "dims": "the volume is not three-dimensional, or a dimension is not positive",
    "four_dimensional": "the file is a series of volumes, and not PET",
    "dtype": "voxels are not real numbers (RGB, complex, unknown type)",
    "too_large": "the header promises more voxels than the limit, or than memory holds",
    "affine": "the affine is singular or not finite, so there is no orientation",
    "orientation_conflict": "sform and qform name different axes",
    "truncated": "there are fewer bytes than the header promises",
    "too_long": "there are more bytes than the header promises",
    "crc": "the gzip stream is corrupt (checksum, length or deflate error)",
    "non_finite": "a voxel is NaN or infinite",
    "constant": "all voxels are equal: there is nothing to scale",
    "blank": "a slice, or the PNG, shows nothing: nearly all of its pixels have one grey level",
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
        flags: doubts about the file.
    """

    data: NDArray[np.float32]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    path: str
    flags: tuple[Flag, ...] = ()


def read_volume(path: str | PathLike[str], max_voxels: int = MAX_VOXELS) -> Volume:
    """Read a ``.nii``, ``.nii.gz``, ``.mgh`` or ``.mgz`` volume in canonical orientation.

    Frames of PET become their median. Memory: 4 bytes per voxel and some chunks; with frames, also all frames
    as they are stored, and those of one plane as float32, twice.

    Args:
        path: the file.
        max_voxels: refuse files whose header promises more, frames included.

    Returns:
        The volume, intensities scaled by the header's slope and intercept.

    Raises:
        VolumeError: the file cannot be used; its code is one of `ERROR_CODES`.
    """
    with open_scan(str(path), max_voxels) as scan:
        return scan.volume()


@dataclasses.dataclass(frozen=True)
class Scan:
    """A file whose header has been accepted, and whose voxels can be read once.

    Attributes:
        path: the file.
        header: what it promises.
        chunks: (k, Y, X) arrays of whole planes, stored values in the file's byte order, last axis first. No
            chunk spans frames. All chunks must be taken: only the end of the iterator checks the CRC and the
            bytes that follow.
    """

    path: str
    header: Header
    chunks: Iterator[NDArray[Any]]

    def volume(self) -> Volume:
        """Read the voxels.

        Raises:
            VolumeError: a voxel is NaN or infinite.
        """
        header = self.header
        stored = self._medians() if header.frames > 1 else map(header.scaling.apply, self.chunks)
        data = np.empty(header.shape[::-1], dtype=np.float32)
        plane = non_finite = 0
        for chunk in stored:
            data[plane : plane + len(chunk)] = chunk
            non_finite += int((~np.isfinite(chunk)).sum())
            plane += len(chunk)
        if non_finite:
            raise VolumeError(self.path, "non_finite", f"{non_finite} voxels are NaN or infinite")
        canonical = orientations.apply_orientation(data.T, np.array(header.axes))
        return Volume(np.asarray(canonical), header.spacing, header.affine, self.path, header.flags)

    def _medians(self) -> Iterator[NDArray[np.float32]]:
        """Planes of the median frame.

        Frames are kept as they are stored, so that nothing is allocated on the promise of a false header.
        """
        frames: list[list[NDArray[Any]]] = [[] for _ in range(self.header.frames)]
        plane = 0
        for chunk in self.chunks:
            frames[plane // self.header.shape[2]].append(chunk)
            plane += len(chunk)
        step = max(1, _CHUNK_BYTES // (self.header.frames * self.header.shape[1] * self.header.shape[0]))
        for chunks in zip(*frames, strict=True):
            for first in range(0, len(chunks[0]), step):
                series = np.stack(
                    [self.header.scaling.apply(chunk[first : first + step]) for chunk in chunks]
                )
                with np.errstate(all="ignore"):
                    median = np.median(series, axis=0)
                # Values that are not finite pass through a median only by accident.
                median[~np.isfinite(series).all(axis=0)] = np.nan
                yield median


@contextlib.contextmanager
def open_scan(name: str, max_voxels: int = MAX_VOXELS) -> Iterator[Scan]:
    """Open a volume for reading; errors of files and streams in the body become `VolumeError`.

    Raises:
        VolumeError: the file cannot be used; its code is one of `ERROR_CODES`.
    """
    if ending_of(name) not in VOLUME_ENDINGS:
        raise VolumeError(name, "unsupported_format", f"is none of {', '.join(VOLUME_ENDINGS)}")
    check_file(name)
    with contextlib.ExitStack() as stack:
        try:
            raw = stack.enter_context(open(name, "rb", buffering=0))
            size = os.fstat(raw.fileno()).st_size
            if name.lower().endswith("z"):
                stream = stack.enter_context(_gzip.GzipFile(fileobj=raw, mode="rb"))
                header = read_header(name, stream, max_voxels)
                _check_size(name, header, size * _gzip.MAX_RATIO)
                chunks = _inflated(name, header, stream)
            else:
                header = read_header(name, raw, max_voxels)
                _check_size(name, header, size)
                chunks = _mapped(header, _map(name, raw.fileno(), header.offset + header.bytes))
            yield Scan(name, header, chunks)
        except _gzip.CORRUPT as error:
            raise VolumeError(name, "crc", f"the gzip stream is corrupt: {error}") from error
        except EOFError as error:
            if _gzip.has_garbage(name):
                raise VolumeError(
                    name, "crc", "the gzip stream is corrupt: garbage where a stream should begin"
                ) from error
            raise VolumeError(name, "truncated", "the gzip stream ends early") from error
        except OSError as error:
            raise VolumeError(name, "unreadable", f"cannot be read: {error.strerror or error}") from error
        except MemoryError as error:
            raise VolumeError(name, "too_large", "needs more memory than there is") from error


def check_file(name: str) -> int:
    """Size in bytes of a regular file.

    Raises:
        VolumeError: it is missing, empty, or a folder, a pipe or a device, which would block its reader.
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


def _check_size(name: str, header: Header, most: int) -> None:
    """Refuse a file that cannot hold what its header promises."""
    promised = header.offset + header.bytes
    if most < promised:
        raise VolumeError(name, "truncated", f"has at most {most} of the {promised} bytes promised")


def _planes(header: Header) -> Iterator[int]:
    """The number of planes of each chunk."""
    most = max(1, _CHUNK_BYTES // (header.shape[0] * header.shape[1] * header.dtype.itemsize))
    for _ in range(header.frames):
        for first in range(0, header.shape[2], most):
            yield min(most, header.shape[2] - first)


def _map(name: str, file: int, length: int) -> mmap.mmap:
    try:
        return mmap.mmap(file, length, access=mmap.ACCESS_READ)
    except ValueError as error:
        # The file was long enough a moment ago, so another program has cut it.
        raise VolumeError(name, "truncated", f"became shorter while it was opened: {error}") from error


def _mapped(header: Header, mapped: mmap.mmap) -> Iterator[NDArray[Any]]:
    """Chunks of an uncompressed file, read where they are looked at; bytes after the voxels are ignored."""
    offset = header.offset
    for planes in _planes(header):
        count = planes * header.shape[1] * header.shape[0]
        yield np.frombuffer(mapped, header.dtype, count, offset).reshape(
            planes, header.shape[1], header.shape[0]
        )
        offset += count * header.dtype.itemsize


def _inflated(name: str, header: Header, stream: Readable) -> Iterator[NDArray[Any]]:
    """Chunks of a compressed file; the last step checks the end of the stream."""
    skip = header.offset - header.read
    while skip > 0:
        skip -= len(_read(name, stream, min(skip, _CHUNK_BYTES)))
    for planes in _planes(header):
        block = _read(name, stream, planes * header.shape[1] * header.shape[0] * header.dtype.itemsize)
        yield np.frombuffer(block, header.dtype).reshape(planes, header.shape[1], header.shape[0])
    # Only reading on to the end makes the stream check the CRC and the length.
    left = header.footer
    while block := stream.read(min(left + 1, _CHUNK_BYTES)):
        left -= len(block)
        if left < 0:
            raise VolumeError(
                name,
                "too_long",
                f"holds more than the {header.bytes} bytes of voxels that its header promises",
            )


def _read(name: str, stream: Readable, size: int) -> bytes:
    block = stream.read(size)
    if len(block) < size:
        raise VolumeError(name, "truncated", "ends before all of its voxels")
    return block
