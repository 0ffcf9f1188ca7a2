"""Volumes written field by field, so that they can also be wrong, and what becomes of them."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from fastflow.data.volume import ERROR_CODES, Volume, read_volume
from fastflow.errors import VolumeError

AFFINE = np.array([[2.0, 0, 0, -5], [0, 2.5, 0, -6], [0, 0, 3.0, -7], [0, 0, 0, 1]])
SHAPE = (5, 4, 3)
DATA = np.arange(60, dtype=np.int16).reshape(SHAPE) - 7


def nifti(
    data: np.ndarray = DATA, *, version: int = 1, order: str = "<", tail: bytes = b"", **fields: Any
) -> bytes:
    """A single-file NIfTI written field by field, so that it can also be wrong."""
    header = {1: nib.Nifti1Header, 2: nib.Nifti2Header}[version](endianness=order)
    header.set_data_dtype(data.dtype)
    header.set_data_shape(data.shape)
    header.set_sform(AFFINE, code=1)
    header["vox_offset"] = header.sizeof_hdr + 4
    for name, value in fields.items():
        header[name] = value
    return (
        header.binaryblock + b"\0" * 4 + data.astype(data.dtype.newbyteorder(order)).tobytes(order="F") + tail
    )


def store(folder: Path, content: bytes, name: str = "scan.nii") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(content, mtime=0) if name.endswith("z") else content)
    return path


def outcome(path: Path, max_voxels: int = 1000) -> Volume | VolumeError:
    """The result of `read_volume`, or its error; other exceptions and broken promises fail the test."""
    try:
        volume = read_volume(path, max_voxels)
    except VolumeError as error:
        caught = error
    else:
        return _sound(volume, max_voxels)
    assert caught.code in ERROR_CODES
    assert caught.path == str(path)
    return caught


def _sound(volume: Volume, max_voxels: int) -> Volume:
    assert volume.data.ndim == 3
    assert volume.data.size <= max_voxels
    assert volume.data.dtype == np.float32
    assert np.isfinite(volume.data).all()
    assert np.isfinite(volume.affine).all()
    assert np.isfinite(volume.spacing).all() and min(volume.spacing) > 0
    return volume


def code_of(path: Path, max_voxels: int = 1000) -> str:
    result = outcome(path, max_voxels)
    assert isinstance(result, VolumeError), "the file was read"
    return result.code


def mgh(
    data: np.ndarray = DATA,
    affine: np.ndarray = AFFINE,
    tail: bytes = b"",
    changes: dict[int, bytes] | None = None,
) -> bytes:
    content = bytearray(nib.MGHImage(data, affine).to_bytes() + tail)
    for start, value in (changes or {}).items():
        content[start : start + len(value)] = value
    return bytes(content)
