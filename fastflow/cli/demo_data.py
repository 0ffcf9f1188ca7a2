"""`fastflow demo-data`."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import progress_bar
from fastflow.cli._options import Seed, Workers


class Size(StrEnum):
    """The sizes of the demo archive."""

    demo = "demo"
    tiny = "tiny"


def demo_data(
    folder: Annotated[Path, typer.Argument(help="Where the volumes and manifest.csv go.")],
    seed: Seed = 0,
    size: Annotated[Size, typer.Option(help="Number of volumes; tiny has a few per scanner.")] = Size.demo,
    workers: Workers = 2,
) -> None:
    """Write the demo archive: simulated scanners on real anatomy.

    Volumes are .nii.gz files with BIDS names; the manifest has the splits train, val, test (unseen subjects)
    and unseen_head.

    Example: `fastflow demo-data archive --seed 1`
    """
    from fastflow.data.demo import build_archive

    with progress_bar("simulating scans") as progress:
        records = build_archive(folder, seed=seed, size=size.value, workers=workers, progress=progress)
    counts = Counter(record.split for record in records)
    typer.echo(
        f"{folder / 'manifest.csv'}: {len(records)} volumes, "
        + ", ".join(f"{n} {split}" for split, n in counts.items())
    )
