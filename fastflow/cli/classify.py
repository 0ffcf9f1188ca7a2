"""`fastflow classify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import progress_bar, report_errors
from fastflow.cli._options import Device, DeviceOption, Engine, Inputs, ModelFolder, Precision, Workers


def classify(
    inputs: Inputs,
    model: ModelFolder = Path("model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="CSV file to write, a row per input.")] = Path("results.csv"),
    prior: Annotated[str | None, typer.Option(help="Probabilities of the labels in the model's order, e.g. 0.5,0.3,0.2.")] = None,
    split: Annotated[str | None, typer.Option(help="Take only this split of manifests.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Slices per pass.")] = 16,
    workers: Workers = 1,
    device: DeviceOption = Device.auto,
    precision: Annotated[
        Precision, typer.Option(help="mixed: conditioners in bfloat16 where the device computes in it.")
    ] = Precision.float32,
    engine: Annotated[
        Engine, typer.Option(help="compile takes minutes before the first scan and is faster from thousands of slices on.")
    ] = Engine.auto,
) -> None:
    """Classify scans by likelihood: status, prediction, log-likelihoods and posterior of each, as CSV.

    A file that cannot be used gets a row with the reason, and the exit code is 1. Where a manifest knows labels, the
    accuracy is printed.

    Example: `fastflow classify archive/manifest.csv --split test --model model --out results.csv`
    """
    from fastflow.archive.classify import classify as run
    from fastflow.archive.classify import describe, parse_prior

    with progress_bar("classifying") as progress:
        summary = run(
            inputs,
            model,
            out,
            parse_prior(prior),
            batch_size,
            workers,
            device.value,
            split,
            progress,
            precision.value,
            engine.value,
        )
    typer.echo(describe(summary))
    report_errors([row.error for row in summary.rows if row.error])
