"""`fastflow plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import warn


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Model folders, finished or still in training.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML page to write.")] = Path("curves.html"),
    png: Annotated[Path | None, typer.Option(help="PNG file to write the curves into as well.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
) -> None:
    """Draw the training curves of several runs into one page, with their best epochs and their settings.

    Example: `fastflow plot model-a model-b --out curves.html`
    """
    from fastflow.evaluation.curves import write_curves
    from fastflow.evaluation.run_logs import read_runs

    found = read_runs(runs)
    for run in found:
        for line in run.warnings:
            warn(line)
    write_curves(out, found, png, overwrite)
    typer.echo(f"{out}: {len(found)} run{'s' if len(found) > 1 else ''}" + (f", {png}" if png else ""))
