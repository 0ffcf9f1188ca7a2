"""Options that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Options = TypeVar("Options")


class Device(StrEnum):
    """The devices that a model can run on."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Readout(StrEnum):
    """How log-likelihoods become a label: the largest one, or the model's Gaussian read-out of all."""

    argmax = "argmax"
    gaussian = "gaussian"


class Precision(StrEnum):
    """The precisions of exports."""

    float32 = "float32"
    mixed = "mixed"


class EvaluationPrecision(StrEnum):
    """The precisions of scoring and sampling."""

    float32 = "float32"
    tf32 = "tf32"
    mixed = "mixed"


EvaluationPrecisionOption = Annotated[
    EvaluationPrecision,
    typer.Option(
        help="tf32: a GPU may round factors of products to 10 bits. mixed: conditioners in bfloat16 where "
        "the device computes in it."
    ),
]

ModelFolder = Annotated[Path, typer.Option("--model", "-m", help="Model folder, as `train` writes it.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the model runs; auto takes a GPU if there is one.")]
ReadoutOption = Annotated[
    Readout,
    typer.Option(
        help="How log-likelihoods become a label: argmax takes the largest, gaussian the read-out that was "
        "calibrated with the model."
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Processes that read or write files.")]
Seed = Annotated[int, typer.Option(help="Equal seeds give equal results.")]
NoLock = Annotated[
    bool,
    typer.Option(
        "--no-lock",
        help="Take no lock, for file systems that have none; see to it that nothing else writes there.",
    ),
]
Inputs = Annotated[
    list[Path],
    typer.Argument(
        help="Files (.nii, .nii.gz, .png), folders of them, or manifests (.csv, .tsv, .jsonl).",
        show_default=False,
    ),
]


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Turn a function of one dataclass into a command whose arguments and options are the fields."""
    hints = get_type_hints(options, include_extras=True)
    parameters = []
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        parameters.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[field.name]
            )
        )

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**values: Any) -> None:
            function(options(**values))

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = hints
        return command

    return decorate
