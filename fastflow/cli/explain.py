"""`fastflow explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import progress_bar, report_errors, warn
from fastflow.cli._options import (
    Device,
    DeviceOption,
    Inputs,
    ModelFolder,
    NoLock,
    Readout,
    ReadoutOption,
)


def explain(
    inputs: Inputs,
    model: ModelFolder = Path("model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the maps.")] = Path("explanations"),
    label: Annotated[
        str | None, typer.Option(help="Class to explain; the one that is decided on by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Explain only the first so many inputs.")] = None,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier explanations.")] = False,
    no_lock: NoLock = False,
    readout: ReadoutOption = Readout.argmax,
) -> None:
    """Show which pixels the likelihood of a scan comes from, and which of them speak against the strongest
    rival.

    Writes for the middle slice of each input NAME.png, and NAME.npz with the maps in nats per pixel;
    explanations.csv has a row for each input, which says what its NAME is; inventory.json counts all inputs.

    Exit codes: 0 all inputs were explained; 1 some were not, or the run failed; 2 wrong usage or bad input.

    Example: `fastflow explain scan.nii.gz --model model --out explanations`
    """
    from fastflow.archive.explain import TABLE, explain_inputs

    with progress_bar("explaining") as progress:
        done = explain_inputs(
            inputs,
            model,
            out,
            label,
            limit,
            device.value,
            progress,
            overwrite=overwrite,
            lock=not no_lock,
            readout=readout.value,
        )
    typer.echo(f"{out}: maps written; {out / TABLE} says which is whose")
    typer.echo(done.inventory.line())
    for line in done.left_out:
        warn(line)
    for row in done.rows:
        if row["status"] == "flagged":
            warn(f"{row['input']}: {row['error_message']} [{row['error_code']}]")
    report_errors(done.errors)
