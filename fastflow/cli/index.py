"""`fastflow index`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._options import Seed


def index(
    source: Annotated[
        Path, typer.Argument(help="A folder of class/file or split/class/file, or a .csv or .jsonl manifest.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The manifest to write, .csv or .jsonl.")] = Path(
        "manifest.csv"
    ),
    val: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of subjects for validation.")] = 0.15,
    test: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of subjects for testing.")] = 0.15,
    resplit: Annotated[
        bool, typer.Option("--resplit", help="Split anew where there are splits already.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """List the files of an archive in a manifest, with splits by subject: no subject is in two of them.

    The subject is the `sub-` part of a file's path, or else the file's name. Splits that are there already
    stay.

    Example: `fastflow index scans/ --out manifest.csv --val 0.1 --test 0.2`
    """
    from fastflow.archive.index import index_archive

    records = index_archive(source, out, {"train": 1.0 - val - test, "val": val, "test": test}, seed, resplit)
    typer.echo(f"{out}: {len(records)} files of {len({record.subject for record in records})} subjects")
    counts = Counter((record.label or "(no label)", record.split or "(no split)") for record in records)
    for (label, split), count in sorted(counts.items()):
        typer.echo(f"  {label}\t{split}\t{count}")
