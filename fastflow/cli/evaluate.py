"""`fastflow evaluate`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fastflow.cli._console import FINISHED_WITH_ERRORS, stages, warn
from fastflow.cli._options import (
    Device,
    DeviceOption,
    EvaluationPrecision,
    EvaluationPrecisionOption,
    NoLock,
    takes,
)


class Engine(StrEnum):
    """The engines that score here."""

    auto = "auto"
    eager = "eager"
    compile = "compile"
    cuda_graph = "cuda_graph"


@dataclasses.dataclass(frozen=True)
class EvaluateCommand:
    """The arguments and options of `fastflow evaluate`."""

    source: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A model folder or an export; or a folder with results of `fastflow classify`.",
            show_default=False,
        ),
    ]
    manifest: Annotated[
        Path | None,
        typer.Argument(
            help="A manifest (.csv, .tsv, .jsonl), a folder of split/class/file or a BIDS dataset; for "
            "results it may be left out.",
            show_default=False,
        ),
    ] = None
    split: Annotated[
        list[str] | None,
        typer.Option(
            help="The split to evaluate, test by default; several are evaluated apart; all: all files."
        ),
    ] = None
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write figures into.")] = Path(
        "evaluation"
    )
    label: Annotated[
        str | None, typer.Option(help="The column of the manifest that holds the class; label by default.")
    ] = None
    train_manifest: Annotated[
        Path | None,
        typer.Option(help="Its split train teaches the baselines; that of MANIFEST by default."),
    ] = None
    no_baselines: Annotated[
        bool,
        typer.Option("--no-baselines", help="Fit no baseline beside the model: no volume is read again."),
    ] = False
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of the subjects for intervals.")] = 1000
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0
    batch_size: Annotated[int, typer.Option(min=1, help="Slices per pass.")] = 16
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that read files; half of the cores, up to 8, by default."),
    ] = None
    device: DeviceOption = Device.auto
    precision: EvaluationPrecisionOption = EvaluationPrecision.float32
    engine: Annotated[Engine, typer.Option(help="See `fastflow classify`.")] = Engine.auto
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the evaluation in --out: what is scored stays.")
    ] = False
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the evaluation in --out.")] = False
    no_lock: NoLock = False


@takes(EvaluateCommand)
def evaluate(options: EvaluateCommand) -> None:
    """Evaluate a model: accuracy, AUC, precision, recall, F1, kappa, calibration, bits/dim, with intervals.

    Intervals are bootstrapped by subject, and baselines stand beside it where the manifest has a
    split `train`. Of results that `fastflow classify` made, nothing is scored again. Writes metrics.json,
    metrics.csv, classes.csv and report.html.

    Exit codes: 0 done; 3 done, with files that could not be scored; 1 the run failed (--resume goes on);
    2 wrong usage or bad input.

    Example: `fastflow evaluate model archive/manifest.csv --split test --out evaluation`
    """
    # It is set before torch is loaded: threads that spin while they wait take cores from readers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fastflow.archive.evaluate import evaluate as run
    from fastflow.archive.evaluate_options import EvaluateOptions

    with stages() as notify:
        done = run(
            options.source,
            options.manifest,
            options.out,
            EvaluateOptions(
                splits=tuple(options.split) if options.split else None,
                label=options.label,
                train_manifest=options.train_manifest,
                baselines=not options.no_baselines,
                resamples=options.resamples,
                seed=options.seed,
                batch_size=options.batch_size,
                workers=options.workers,
                device=options.device.value,
                precision=options.precision.value,
                engine=options.engine.value,
                resume=options.resume,
                overwrite=options.overwrite,
                lock=not options.no_lock,
                progress=lambda what, count, total: notify(what, count, total or count),
            ),
        )
    for split, one in done.document["sets"].items():
        typer.echo(f"{split}: {one['volumes']} volumes of {one['subjects']} subjects")
        for name, decision in one["decisions"].items():
            typer.echo(f"  {name}: {_line(decision['figures'])}")
    for line in done.warnings:
        warn(line)
    typer.echo(f"{options.out}: metrics.json, metrics.csv, classes.csv, report.html")
    if done.failed:
        raise typer.Exit(FINISHED_WITH_ERRORS)


def _line(figures: Mapping[str, Mapping[str, Any]]) -> str:
    shown = {
        "accuracy": "accuracy",
        "balanced_accuracy": "balanced",
        "auc": "AUC",
        "bits_per_dim": "bits/dim",
    }
    return ", ".join(
        f"{word} {_with_interval(figures[name])}" for name, word in shown.items() if name in figures
    )


def _with_interval(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "not defined"
    ends = "" if estimate["low"] is None else f" [{estimate['low']:.3f}, {estimate['high']:.3f}]"
    return f"{estimate['value']:.3f}{ends}"
