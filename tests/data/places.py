"""Folders of empty files for tests of what a folder is."""

from __future__ import annotations

import json
from pathlib import Path


def touch(root: Path, *names: str) -> Path:
    """Make empty files below a folder."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def write(root: Path, **files: str) -> Path:
    """Write files whose names have `_` for `.` in their ending."""
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (root / f"{stem}.{ending}").write_text(content, encoding="utf-8")
    return root


def describe(root: Path, **fields: str) -> Path:
    """Make a folder a BIDS dataset."""
    root.mkdir(parents=True, exist_ok=True)
    description = {"Name": "n", "BIDSVersion": "1.10.0"} | fields
    (root / "dataset_description.json").write_text(json.dumps(description))
    return root
