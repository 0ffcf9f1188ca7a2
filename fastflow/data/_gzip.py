"""Gzip streams, inflated by ISA-L where the `isal` package is installed and by zlib elsewhere."""

from __future__ import annotations

import contextlib
import gzip
import zlib
from typing import cast

# A corrupt stream raises one of these; a stream that ends early raises EOFError.
CORRUPT: tuple[type[Exception], ...] = (zlib.error, gzip.BadGzipFile)
GzipFile: type[gzip.GzipFile] = gzip.GzipFile

try:
    from isal import igzip, isal_zlib
except ImportError:
    pass
else:
    GzipFile = igzip.IGzipFile
    CORRUPT += (cast(type[Exception], isal_zlib.error),)

# A deflate stream cannot hold more than 258 bytes per two bits.
MAX_RATIO = 1032
_CHUNK_BYTES = 1 << 20


def has_garbage(name: str) -> bool:
    """Whether a stream that seems to end early has a corrupt part.

    ISA-L takes a few bytes of garbage for a stream that was cut short; the standard library tells the two
    apart.
    """
    with contextlib.suppress(EOFError, OSError), gzip.open(name) as stream:
        try:
            while stream.read(_CHUNK_BYTES):
                pass
        except CORRUPT:
            return True
    return False
