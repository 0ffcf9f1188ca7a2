"""`fastflow index`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import warn
from fastflow.cli._options import Seed, takes


@dataclasses.dataclass(frozen=True)
class IndexOptions:
    """Arguments and options of the command."""

    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of class/file or split/class/file, a BIDS dataset, or a .csv, .tsv or .jsonl "
            "manifest."
        ),
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="The manifest to write, .csv, .tsv or .jsonl.")] = (
        Path("manifest.csv")
    )
    label: Annotated[
        str | None,
        typer.Option(
            help="The field of a BIDS dataset (participants.tsv, sessions.tsv or sidecars), or the column of "
            "a manifest, that holds the class; none: no labels."
        ),
    ] = None
    val: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of subjects for validation.")] = 0.15
    test: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of subjects for testing.")] = 0.15
    resplit: Annotated[bool, typer.Option("--resplit", help="Split anew where there are splits already.")] = (
        False
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the manifest that is in --out.")] = (
        False
    )
    seed: Seed = 0


@takes(IndexOptions)
def index(options: IndexOptions) -> None:
    """List the files of an archive in a manifest, with splits by subject: no subject is in two of them.

    The subject is the `sub-` part of a file's path, or else the file's name; a manifest may name it. Splits
    that are there already stay. What is left out is counted, and the counts stand in OUT.inventory.json.

    Example: `fastflow index scans/ --out manifest.csv --val 0.1 --test 0.2`
    """
    from fastflow.archive.index import describe_classes, write_index

    shares = {"train": 1.0 - options.val - options.test, "val": options.val, "test": options.test}
    listing = write_index(
        options.source, options.out, shares, options.seed, options.resplit, options.label, options.overwrite
    )
    records = listing.records
    subjects = len({record.subject for record in records})
    typer.echo(f"{options.out}: {len(records)} files of {subjects} subjects")
    for line in describe_classes(records):
        typer.echo(line)
    typer.echo(listing.inventory.line())
    for message in (*listing.inventory.details(), *listing.warnings):
        warn(message)
