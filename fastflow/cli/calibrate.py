"""`fastflow calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import progress_bar, report_errors
from fastflow.cli._options import Device, DeviceOption, NoLock, Seed, Workers


def calibrate(
    model: Annotated[Path, typer.Argument(help="Model folder, as `train` writes it.", show_default=False)],
    manifest: Annotated[
        Path, typer.Argument(help="Manifest with the splits train and val.", show_default=False)
    ],
    label: Annotated[str | None, typer.Option(help="Column of the manifest that holds the class.")] = None,
    slices: Annotated[
        str | None, typer.Option(help="Slices that become the model's; its own by default.")
    ] = None,
    volumes: Annotated[
        int, typer.Option(min=0, help="Training volumes of each class that are scored; 0 takes val alone.")
    ] = 60,
    seed: Seed = 0,
    workers: Workers = 1,
    device: DeviceOption = Device.auto,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the model's temperature and read-out; needed.")
    ] = False,
    no_lock: NoLock = False,
) -> None:
    """Fit a model's temperature and Gaussian read-out anew, on volumes of the splits val and train.

    Weights stay as they are; config.json is replaced whole. Prints balanced accuracy, NLL and ECE of each
    way to decide, on validation volumes that it was not fitted to.

    Exit codes: 0 calibrated; 1 some files could not be read, or the run failed; 2 wrong usage or bad input.

    Example: `fastflow calibrate model archive/manifest.csv --overwrite`
    """
    from fastflow.archive.calibrate import calibrate_model, calibration_lines
    from fastflow.data.listing import list_records

    with progress_bar("reading volumes") as progress:
        calibrated, errors = calibrate_model(
            model,
            list_records(manifest, label).records,
            slices,
            volumes,
            seed,
            workers,
            device.value,
            overwrite,
            not no_lock,
            progress,
        )
    typer.echo(f"{model}: calibrated, temperature {calibrated.temperature:.4g}")
    for line in calibration_lines(calibrated.metadata):
        typer.echo(line)
    report_errors(errors)
