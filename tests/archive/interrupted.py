"""A small archive that runs are interrupted over, and what tests of them share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from fastflow.archive.classify import classify
from fastflow.archive.results import read_results

COUNT, BATCH, SHARD = 120, 6, 25
# Fewer than a pool of readers is started for.
FEW = 7


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_results(folder)]


def run(source: Path, model: Path, out: Path, **options: Any) -> Any:
    return classify([source], model, out, batch_size=BATCH, shard_rows=SHARD, **options)


def few(archive: Path, tmp_path: Path, count: int = FEW) -> Path:
    """A folder of a few of the scans, to be changed."""
    root = tmp_path / "few"
    root.mkdir()
    for path in sorted(archive.rglob("*.nii.gz"))[:count]:
        shutil.copy(path, root / path.name)
    return root
