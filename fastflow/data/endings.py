"""Endings of file names: which are read, and what to do with those that are not. Case does not matter."""

from __future__ import annotations

import os
from os import PathLike

VOLUME_ENDINGS = (".nii", ".nii.gz", ".mgz", ".mgh")
IMAGE_ENDINGS = (".png",)
ENDINGS = (*VOLUME_ENDINGS, *IMAGE_ENDINGS)

CONVERT = "convert it to .nii.gz"
GREY_PNG = "save it as an 8-bit grey .png"
# Files with these endings may hold images, and are counted where they are passed over.
HINTS = {
    ".hdr": f"half of a .hdr/.img pair: {CONVERT}",
    ".img": f"half of a .hdr/.img pair: {CONVERT}",
    ".hdr.gz": f"half of a .hdr/.img pair: {CONVERT}",
    ".img.gz": f"half of a .hdr/.img pair: {CONVERT}",
    ".nii.bz2": "compressed by bzip2: decompress it, or compress it with gzip",
    ".nii.zst": "compressed by Zstandard: decompress it, or compress it with gzip",
    ".nii.xz": "compressed by xz: decompress it, or compress it with gzip",
    ".nii.zip": "a ZIP archive: unpack it",
    ".dcm": f"DICOM: {CONVERT}, for example with dcm2niix",
    ".ima": f"DICOM: {CONVERT}, for example with dcm2niix",
    ".mnc": f"MINC: {CONVERT}",
    ".nrrd": f"NRRD: {CONVERT}",
    ".mha": f"MetaImage: {CONVERT}",
    ".mhd": f"MetaImage: {CONVERT}",
    ".jpg": f"JPEG, which loses detail: {GREY_PNG}",
    ".jpeg": f"JPEG, which loses detail: {GREY_PNG}",
    ".tif": f"TIFF: {GREY_PNG}",
    ".tiff": f"TIFF: {GREY_PNG}",
    ".bmp": f"BMP: {GREY_PNG}",
    ".npy": f"a NumPy array: {CONVERT}",
    ".npz": f"NumPy arrays: {CONVERT}",
}


def ending_of(path: str | PathLike[str]) -> str | None:
    """The one of `ENDINGS` that a file's name has, in lower case; None where it has another or none."""
    return _longest(path, ENDINGS)


def unread_ending_of(path: str | PathLike[str]) -> str | None:
    """The key of `HINTS` that a file's name ends with; None for others and those that are read."""
    return None if ending_of(path) else _longest(path, tuple(HINTS))


def is_image(path: str | PathLike[str]) -> bool:
    """Whether a file's name is that of a single slice, not of a volume."""
    return ending_of(path) in IMAGE_ENDINGS


def without_ending(path: str | PathLike[str]) -> str:
    """A path without the ending that is read; other endings stay, as DICOM identifiers are full of dots."""
    name = os.fspath(path)
    return name[: len(name) - len(ending_of(name) or "")]


def _longest(path: str | PathLike[str], endings: tuple[str, ...]) -> str | None:
    # The longest ending of the two tables has nine characters.
    tail = os.fspath(path)[-16:].lower()
    if not tail.endswith(endings):
        return None
    return max((ending for ending in endings if tail.endswith(ending)), key=len)
