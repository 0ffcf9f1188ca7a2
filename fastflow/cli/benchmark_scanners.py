"""`fastflow benchmark-scanners`."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import progress_bar
from fastflow.cli._options import Seed, Workers


class Size(StrEnum):
    """The sizes of the benchmark's archive."""

    paper = "paper"
    third = "third"
    tiny = "tiny"


def benchmark_scanners(
    folder: Annotated[Path, typer.Argument(help="Where the volumes and manifest.csv go.")],
    seed: Seed = 0,
    size: Annotated[
        Size, typer.Option(help="Number of volumes: the paper's 1,352, a third of them, or six a scanner.")
    ] = Size.paper,
    workers: Workers = 2,
) -> None:
    """Write the archive of the scanner benchmark: seven simulated scanners in the paper's numbers.

    The scanners differ in bias field, resolution, geometry and contrast, and hardly in grain; two of them are
    nearly alike. One subject in six was scanned twice. The manifest has the splits of the first of five folds
    and `unseen_head`, whose anatomy is in no other split.

    Example: `fastflow benchmark-scanners scanners && fastflow crossval scanners/manifest.csv --out folds`
    """
    from fastflow.data.demo.benchmark import build_benchmark

    with progress_bar("simulating scans") as progress:
        records = build_benchmark(folder, seed, size.value, workers, progress)
    splits = Counter(record.split for record in records)
    labels = Counter(record.label for record in records)
    typer.echo(
        f"{folder / 'manifest.csv'}: {len(records)} volumes, "
        + ", ".join(f"{n} {split}" for split, n in splits.items())
        + "; "
        + ", ".join(f"{label} {n}" for label, n in sorted(labels.items()))
    )
