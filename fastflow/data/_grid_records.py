"""The grids of volumes in one file of a cache, so that a header is read once. Torch-free."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path

from fastflow._files import write_text
from fastflow.data._segments import DECODING, FORMAT, State
from fastflow.data.grids import Grid
from fastflow.errors import CacheWarning

GRIDS = "grids.json"
Known = dict[str, tuple[State, Grid]]


def load_grids(folder: Path) -> Known:
    """State and grid of files by their absolute paths; none where there is no file or it is damaged."""
    path = folder / GRIDS
    if not path.is_file():
        return {}
    try:
        crc, _, text = path.read_text(encoding="utf-8").partition("\n")
        if crc != f"{zlib.crc32(text.encode()):08x}":
            raise ValueError("it has another checksum")
        document = json.loads(text)
        if (document["format"], document["decoding"]) != (FORMAT, DECODING):
            return {}
        return {
            name: ((size, mtime_ns), Grid(tuple(shape), tuple(spacing)))
            for name, size, mtime_ns, shape, spacing in document["grids"]
        }
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warnings.warn(f"{path}: is damaged and not used, headers are read again: {error}", CacheWarning, 5)
        return {}


def save_grids(folder: Path, known: Mapping[str, tuple[State, Grid]]) -> None:
    """Write what `load_grids` reads. Raises OSError where it cannot be written."""
    rows = [[name, *state, grid.shape, grid.spacing] for name, (state, grid) in known.items()]
    text = json.dumps({"format": FORMAT, "decoding": DECODING, "grids": rows})
    write_text(folder / GRIDS, f"{zlib.crc32(text.encode()):08x}\n{text}")
