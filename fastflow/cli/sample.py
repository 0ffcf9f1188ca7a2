"""`fastflow sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._options import (
    Device,
    DeviceOption,
    EvaluationPrecision,
    EvaluationPrecisionOption,
    ModelFolder,
    NoLock,
    Seed,
)


def sample(
    model: ModelFolder = Path("model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the pictures.")] = Path("samples"),
    label: Annotated[
        list[str] | None, typer.Option(help="Class to draw; repeat for several. All by default.")
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images per class.")] = 4,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Below 1: smoother, more typical images.")
    ] = 1.0,
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
    precision: EvaluationPrecisionOption = EvaluationPrecision.float32,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace earlier samples.")] = False,
    no_lock: NoLock = False,
) -> None:
    """Draw images from a model: one PNG each, grid.png of all, and samples.npz.

    samples.csv says of which class each file is, and how it was drawn.

    Example: `fastflow sample --model model --out samples --count 8 --temperature 0.8`
    """
    from fastflow.archive.sample import sample as run

    files = run(
        model,
        out,
        label,
        count,
        temperature,
        seed,
        device.value,
        precision.value,
        overwrite=overwrite,
        lock=not no_lock,
    )
    typer.echo(f"{out}: {len(files)} files, see {files[0]}")
