"""Safe reading of NIfTI and MGH volumes: headers are checked first, and gzip is drained to its checksum.

nibabel parses headers and orientations. It does not notice a bad CRC in a ``.nii.gz``, so the bytes are
inflated here, in bounded chunks and never beyond what the header promises.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from collections.abc import Iterator
from os import PathLike
from typing import Any

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from fastflow.data import _gzip
from fastflow.data._header import MAX_VOXELS as MAX_VOXELS
from fastflow.data._header import Header, read_header
from fastflow.data._kinds import GZIP_MAGIC, HEAD_BYTES, wrong_kind
from fastflow.data._opening import Readable, check_ending, opened, read_up_to
from fastflow.data._orientation import FLAG_CODES as FLAG_CODES
from fastflow.data._orientation import Flag as Flag
from fastflow.data.endings import VOLUME_ENDINGS
from fastflow.errors import VolumeError

# Chunks fit into half a processor's cache, so that inflated bytes are looked at while they are in it.
_CHUNK_BYTES = 1 << 19

ERROR_CODES = {
    "missing": "there is no such file",
    "not_a_file": "the path is a folder or a device",
    "unreadable": "the operating system refuses to read it",
    "empty": "the file has no bytes",
    "pointer": "the file stands for another one, whose content was not fetched (Git LFS, git-annex)",
    "wrong_kind": "the file is something else than its name says",
    "changed": "another program changed the file while it was read",
    "unsupported_format": "none of .nii, .nii.gz, .mgh, .mgz and .png",
    "header": "the header cannot be parsed or contradicts itself",
    "dims": "the volume is not three-dimensional, or a dimension is not positive",
    "four_dimensional": "the file is a series of volumes, and not PET",
    "dtype": "voxels are not real numbers (RGB, complex, unknown type)",
    "too_large": "the header promises more voxels than the limit, or than memory holds",
    "affine": "the affine is singular or not finite, so there is no orientation",
    "orientation_conflict": "sform and qform name different axes",
    "truncated": "there are fewer bytes than the header promises",
    "too_long": "there are more bytes than the header promises, or something else follows the gzip stream",
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
    check_ending(name, VOLUME_ENDINGS)
    with opened(name) as file:
        size = os.fstat(file.fileno()).st_size
        if not name.lower().endswith("z"):
            header = read_header(name, file, max_voxels, packed=False)
            _check_size(name, header, size)
            yield Scan(name, header, _chunks(name, header, file))
            return
        try:
            with _inflating(name, file) as stream:
                header = read_header(name, stream, max_voxels, packed=True)
                _check_size(name, header, size * _gzip.MAX_RATIO)
                yield Scan(name, header, _chunks(name, header, stream))
        except _gzip.BROKEN as error:
            raise _broken(name, _gzip.find_fault(file), max_voxels) from error


def _broken(name: str, fault: _gzip.Fault, max_voxels: int) -> VolumeError:
    """The error of a gzip stream; bytes after it are too many only if all voxels came before them."""
    if fault.code == "too_long":
        header = read_header(name, io.BytesIO(fault.start), max_voxels, packed=True)
        if fault.inflated < header.offset + header.bytes:
            message = "the gzip stream is corrupt: before all voxels came, it goes on as something else"
            return VolumeError(name, "crc", message)
    return VolumeError(name, fault.code, fault.message)


def _inflating(name: str, file: io.FileIO) -> Any:
    """A gzip file as a stream of its content.

    Raises:
        VolumeError: it is something else.
    """
    head = read_up_to(file, HEAD_BYTES)
    file.seek(0)
    if head[: len(GZIP_MAGIC)] == GZIP_MAGIC[: len(head)]:
        return _gzip.GzipFile(fileobj=file, mode="rb")
    message = f"is not compressed by gzip, and of no kind that is known: it begins with {head[:8]!r}"
    raise wrong_kind(name, head) or VolumeError(name, "wrong_kind", message)


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


def _chunks(name: str, header: Header, stream: Readable) -> Iterator[NDArray[Any]]:
    """Chunks of voxels; the last step reads on to the end, which also makes gzip check CRC and length."""
    skip = header.offset - header.read
    while skip > 0:
        skip -= len(_read(name, stream, min(skip, _CHUNK_BYTES)))
    for planes in _planes(header):
        # Each chunk has memory of its own, as frames and slices keep some for longer.
        block = _read(name, stream, planes * header.shape[1] * header.shape[0] * header.dtype.itemsize)
        yield np.frombuffer(block, header.dtype).reshape(planes, header.shape[1], header.shape[0])
    left = header.footer
    while block := stream.read(min(left + 1, _CHUNK_BYTES)):
        left -= len(block)
        if left < 0 or (header.padded and block.strip(b"\0")):
            raise VolumeError(name, "too_long", _too_long(header))


def _too_long(header: Header) -> str:
    message = f"holds more than the {header.bytes} bytes of voxels that its header promises"
    if header.hidden_frames == 1:
        return message
    return f"{message}: dim[0] is 3, but dim[4] is {header.hidden_frames}, as in a series of volumes"


def _read(name: str, stream: Readable, size: int) -> bytes:
    block = read_up_to(stream, size)
    if len(block) < size:
        raise VolumeError(name, "truncated", "ends before all of its voxels")
    return block
