"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Device(StrEnum):
    """Where the model runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(StrEnum):
    """What conditioners compute in."""

    float32 = "float32"
    mixed = "mixed"


ModelFolder = Annotated[Path, typer.Option("--model", "-m", help="Model folder, as `train` writes it.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs; auto takes a GPU if there is one.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes that read or write files.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
Inputs = Annotated[
    list[Path],
    typer.Argument(help="Files (.nii, .nii.gz, .png), folders of them, or manifests (.csv, .jsonl).", show_default=False),
]
