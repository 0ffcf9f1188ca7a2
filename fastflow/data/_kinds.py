"""Kinds of files, which are told by first bytes where a name promises something else."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import zlib

from fastflow.data.endings import CONVERT, GREY_PNG, HINTS, ending_of
from fastflow.errors import VolumeError

# So many of a file's first bytes tell its kind.
HEAD_BYTES = 4096
GZIP_MAGIC = b"\x1f\x8b"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        text: its name after "is", and what to do with it.
        code: the error code of such a file under a wrong name.
        endings: of its name where it is read, plain and compressed by gzip; None where it is not read.
    """

    text: str
    code: str = "wrong_kind"
    endings: tuple[str, str | None] | None = None


_NIFTI = Kind("NIfTI", endings=(".nii", ".nii.gz"))
_MGH = Kind("MGH volume", endings=(".mgh", ".mgz"))
_PNG = Kind("PNG image", endings=(".png", None))
_PAIR = Kind(f"the header of a .hdr/.img pair: {CONVERT}, together with its .img")
_ANALYZE = Kind(
    f"an Analyze 7.5 header, which states no orientation: {CONVERT} where it is known how the subject lay"
)
_GZIP = Kind("compressed by gzip: decompress it")
_ZEROS = Kind(
    "zeros where its header should be: its space was reserved, and its content never written; copy it again"
)
_DOWNLOAD = "such as a server sends in place of a file: download it again"
_HTML = Kind(f"an HTML page, {_DOWNLOAD}")
_XML = Kind(f"XML text, {_DOWNLOAD}")
_JSON = Kind("JSON text: name the image that it describes")
_TEXT = Kind("plain text: look into it, it may say why")
_ANNEX = Kind(
    "a git-annex pointer, not the file: fetch the file by 'git annex get' or 'datalad get'", "pointer"
)
_LFS = Kind("a Git LFS pointer, not the file: fetch the file by 'git lfs pull'", "pointer")

# A kind of file has these bytes at this place.
_MAGICS: tuple[tuple[int, bytes, Kind], ...] = (
    (0, GZIP_MAGIC, _GZIP),
    (0, PNG_MAGIC, _PNG),
    (0, b"version https://git-lfs.github.com/", _LFS),
    (0, b"version https://hawser.github.com/", _LFS),
    (0, b"BZh", Kind(HINTS[".nii.bz2"])),
    (0, b"\x28\xb5\x2f\xfd", Kind(HINTS[".nii.zst"])),
    (0, b"\xfd7zXZ\x00", Kind(HINTS[".nii.xz"])),
    (0, b"\x04\x22\x4d\x18", Kind("compressed by LZ4: decompress it, or compress it with gzip")),
    (0, b"\x1f\x9d", Kind("compressed by compress (.Z): decompress it, or compress it with gzip")),
    (0, b"PK\x03\x04", Kind(HINTS[".nii.zip"])),
    (0, b"PK\x05\x06", Kind("an empty ZIP archive")),
    (0, b"7z\xbc\xaf\x27\x1c", Kind("a 7-Zip archive: unpack it")),
    (0, b"Rar!\x1a\x07", Kind("a RAR archive: unpack it")),
    (257, b"ustar", Kind("a tar archive: unpack it")),
    (128, b"DICM", Kind(HINTS[".dcm"])),
    (0, b"\x89HDF\r\n\x1a\n", Kind(f"HDF5, or MINC 2: {CONVERT}")),
    (0, b"CDF\x01", Kind(f"netCDF, or MINC 1: {CONVERT}")),
    (0, b"CDF\x02", Kind(f"netCDF, or MINC 1: {CONVERT}")),
    (0, b"NRRD000", Kind(HINTS[".nrrd"])),
    (0, b"ObjectType =", Kind(HINTS[".mha"])),
    (0, b"\x93NUMPY", Kind(HINTS[".npy"])),
    (0, b"\xff\xd8\xff", Kind(HINTS[".jpg"])),
    (0, b"II*\x00", Kind(HINTS[".tif"])),
    (0, b"MM\x00*", Kind(HINTS[".tif"])),
    (0, b"GIF8", Kind(f"GIF: {GREY_PNG}")),
    (14, b"\x28\x00\x00\x00", Kind(HINTS[".bmp"])),
    (8, b"WEBP", Kind(f"WebP: {GREY_PNG}")),
    (0, b"%PDF-", Kind("a PDF document")),
    (
        0,
        b"\x00\x05\x16\x07",
        Kind("an AppleDouble file of macOS, which holds no image: leave out names in '._'"),
    ),
    (0, b"\x00\x05\x16\x00", Kind("an AppleSingle file of macOS: unpack it")),
)


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file with these first bytes, `HEAD_BYTES` where it has so many; None if unknown."""
    if not head:
        return None
    return _volume_kind(head) or _magic_kind(head) or _text_kind(head)


def _volume_kind(head: bytes) -> Kind | None:
    size = {int.from_bytes(head[:4], order) for order in ("little", "big")} & {348, 540}
    if size:
        magic = head[344:347] if 348 in size else head[4:7]
        if magic in (b"n+1", b"n+2"):
            return _NIFTI
        if magic in (b"ni1", b"ni2"):
            return _PAIR
        # Analyze has the least of all voxels where NIfTI has its magic, which programs leave at 0.
        return _ANALYZE if 348 in size and len(head) >= 348 and not any(magic) else None
    if int.from_bytes(head[:4]) == 1 and len(head) >= 24:
        dims = [int.from_bytes(head[at : at + 4]) for at in range(4, 20, 4)]
        known = int.from_bytes(head[20:24]) <= 10
        return _MGH if known and all(1 <= n < 1 << 16 for n in dims) else None
    return _ZEROS if len(head) >= 4 and not head.strip(b"\0") else None


def _magic_kind(head: bytes) -> Kind | None:
    return next((kind for at, magic, kind in _MAGICS if head.startswith(magic, at)), None)


def _text_kind(head: bytes) -> Kind | None:
    try:
        # The last character may be cut.
        text = head[:-3].decode() if len(head) >= HEAD_BYTES else head.decode()
    except UnicodeDecodeError:
        return None
    if len(text) < 4 or re.search(r"[^\t\n\f\r -\x7e\x80-\U0010ffff]", text):
        return None
    text = text.lstrip("\ufeff \t\r\n").lower()
    if ".git/annex/objects/" in text[:1024] or text.startswith("/annex/objects/"):
        return _ANNEX
    if "<html" in text or text.startswith("<!doctype html"):
        return _HTML
    if text.startswith("<"):
        return _XML
    return _JSON if text.startswith(("{", "[")) else _TEXT


def wrong_kind(name: str, head: bytes, packed: bool = False) -> VolumeError | None:
    """The error of a file that is not what its name says; None where its kind is not known.

    Args:
        name: of the file.
        head: its first bytes.
        packed: whether they were inflated from a gzip stream.
    """
    kind = kind_of(head)
    if kind is None:
        return None
    if kind is _GZIP and not packed:
        with contextlib.suppress(zlib.error):
            inside = wrong_kind(name, zlib.decompressobj(31).decompress(head, HEAD_BYTES), packed=True)
            if inside is not None:
                return inside
    return VolumeError(name, kind.code, _message(name, kind, packed))


def _message(name: str, kind: Kind, packed: bool) -> str:
    if kind.endings is None:
        return f"is compressed by gzip, and its content is {kind.text}" if packed else f"is {kind.text}"
    if kind.endings[1] is None:
        what = f"a {kind.text}"
    else:
        article = "an" if kind is _MGH else "a"
        what = f"{article} {kind.text} compressed by gzip" if packed else f"an uncompressed {kind.text}"
    ending = kind.endings[packed]
    if ending is None:
        return f"is compressed by gzip, and its content is {what}: decompress it"
    if ending == ending_of(name):
        return f"is {what}, but cannot be read as one"
    return f"is {what}: rename it to {ending}"
