"""Locks of output folders, see `fastflow._locks`. Torch-free."""

from __future__ import annotations

from fastflow._locks import LOCK, locked
from fastflow._locks import is_leftover as is_temporary

__all__ = ["LOCK", "is_temporary", "locked"]
