"""Gzip streams, inflated by ISA-L where the `isal` package is installed and by zlib elsewhere."""

from __future__ import annotations

import dataclasses
import gzip
import io
import zlib
from typing import cast

from fastflow.data._kinds import GZIP_MAGIC, HEAD_BYTES

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


@dataclasses.dataclass(frozen=True)
class Fault:
    """Why a file cannot be inflated to its end.

    Attributes:
        code: ``truncated`` where the stream ends early, ``crc`` where it is corrupt, ``too_long`` where
            something else follows a gzip member.
        message: the same in words.
        inflated: bytes that come out before the fault.
        start: the first of them, `HEAD_BYTES` where there are so many.
    """

    code: str
    message: str
    inflated: int
    start: bytes


def find_fault(file: io.FileIO) -> Fault:
    """Walk over a file from its beginning to its fault.

    ISA-L and the standard library name the faults of a stream by different errors, and read ahead to
    different places; this walk by zlib does not depend on either.

    Args:
        file: of one or more gzip members, between and after which zeros may stand.
    """
    file.seek(0)
    inflated, start, member, block = 0, b"", None, b""
    while True:
        block = block or file.read(_CHUNK_BYTES)
        if not block:
            code, message = ("truncated", "the gzip stream ends early") if member else _UNKNOWN
            return Fault(code, message, inflated, start)
        if member is None:
            block = block.lstrip(b"\0")
            if not block:
                continue
            if block[: len(GZIP_MAGIC)] != GZIP_MAGIC[: len(block)]:
                return Fault("too_long", _rest(file, file.tell() - len(block)), inflated, start)
            member = zlib.decompressobj(31)
        try:
            content = member.decompress(block, _CHUNK_BYTES)
        except zlib.error as error:
            return Fault("crc", f"the gzip stream is corrupt: {error}", inflated, start)
        inflated, start = inflated + len(content), start + content[: HEAD_BYTES - len(start)]
        block = member.unused_data if member.eof else member.unconsumed_tail
        member = None if member.eof else member


_UNKNOWN = "crc", "the gzip stream is corrupt"


def _rest(file: io.FileIO, end: int) -> str:
    return (
        f"{file.seek(0, io.SEEK_END) - end} bytes that are not gzip follow the stream, whose checksum is "
        f"right: keep the first {end} bytes of the file"
    )
