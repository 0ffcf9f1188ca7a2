"""`fastflow explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import progress_bar, report_errors
from fastflow.cli._options import Device, DeviceOption, Inputs, ModelFolder


def explain(
    inputs: Inputs,
    model: ModelFolder = Path("model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the maps.")] = Path("explanations"),
    label: Annotated[
        str | None, typer.Option(help="Class to explain; the most likely one by default.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Explain only the first so many inputs.")] = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Show which pixels the likelihood of a scan comes from, and which of them speak against the strongest
    rival.

    Writes for the middle slice of each input NAME.png, and NAME.npz with the maps in nats per pixel.

    Example: `fastflow explain scan.nii.gz --model model --out explanations`
    """
    from fastflow.archive.explain import explain as run

    with progress_bar("explaining") as progress:
        errors = run(inputs, model, out, label, limit, device.value, progress)
    typer.echo(f"{out}: maps written")
    report_errors(errors)
