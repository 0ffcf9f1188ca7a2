"""Gzip streams, inflated by ISA-L where the `isal` package is installed and by zlib elsewhere."""

from __future__ import annotations

import gzip
import io
import zlib
from typing import cast

from fastflow.data._kinds import GZIP_MAGIC

# A stream that cannot be inflated to its end raises one of these.
BROKEN: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile, EOFError)
GzipFile: type[gzip.GzipFile] = gzip.GzipFile

try:
    from isal import igzip, isal_zlib
except ImportError:
    pass
else:
    GzipFile = igzip.IGzipFile
    BROKEN += (cast(type[Exception], isal_zlib.error),)

# A deflate stream cannot hold more than 258 bytes per two bits.
MAX_RATIO = 1032
_CHUNK_BYTES = 1 << 20


def find_fault(file: io.FileIO, promised: int) -> tuple[str, str]:
    """Why a file could not be inflated to its end.

    ISA-L and the standard library name the faults of a stream by different errors, so zlib walks over it.

    Args:
        file: of one or more gzip members, between and after which zeros may stand.
        promised: bytes that it should hold inflated.

    Returns:
        `(code, message)`: ``truncated`` where the stream ends early, ``too_long`` where anything else follows
        a stream that is whole, ``crc`` where it is corrupt.
    """
    file.seek(0)
    inflated, member, block = 0, None, b""
    while True:
        block = block or file.read(_CHUNK_BYTES)
        if not block:
            return ("truncated", "the gzip stream ends early") if member else _UNKNOWN
        if member is None:
            block = block.lstrip(b"\0")
            if not block:
                continue
            if block[: len(GZIP_MAGIC)] != GZIP_MAGIC[: len(block)]:
                return _after_the_stream(file, len(block), inflated >= promised)
            member = zlib.decompressobj(31)
        try:
            inflated += len(member.decompress(block, _CHUNK_BYTES))
        except zlib.error as error:
            return "crc", f"the gzip stream is corrupt: {error}"
        block = member.unused_data if member.eof else member.unconsumed_tail
        member = None if member.eof else member


_UNKNOWN = "crc", "the gzip stream is corrupt"


def _after_the_stream(file: io.FileIO, left: int, whole: bool) -> tuple[str, str]:
    """The fault of a file in which something else follows a gzip member, `left` bytes before the place."""
    end = file.tell() - left
    if whole:
        rest = file.seek(0, io.SEEK_END) - end
        return "too_long", (
            f"{rest} bytes that are not gzip follow the stream, whose checksum is right: "
            f"keep the first {end} bytes of the file"
        )
    return "crc", f"the gzip stream is corrupt: from byte {end} on, before all voxels came, it is not gzip"
