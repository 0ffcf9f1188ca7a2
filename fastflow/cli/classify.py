"""`fastflow classify`."""

from __future__ import annotations

import dataclasses
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import FINISHED_WITH_ERRORS, USAGE, fail, run_progress, warn
from fastflow.cli._options import (
    Device,
    DeviceOption,
    EvaluationPrecision,
    EvaluationPrecisionOption,
    NoLock,
    Readout,
    ReadoutOption,
    takes,
)


class Engine(StrEnum):
    """The scorer's engines, a runner that spreads the work over machines, and one that needs no PyTorch."""

    auto = "auto"
    eager = "eager"
    compile = "compile"
    cuda_graph = "cuda_graph"
    ray = "ray"
    onnx = "onnx"


class OnError(StrEnum):
    """How the run goes on after an input that cannot be used."""

    row = "row"
    fail = "fail"


class Format(StrEnum):
    """The format of the result files."""

    csv = "csv"
    parquet = "parquet"


class IdFrom(StrEnum):
    """The identity of an input in the results."""

    relpath = "relpath"
    hash = "hash"


class Combine(StrEnum):
    """How the log-likelihoods of slices become a volume's."""

    sum = "sum"
    mean = "mean"


@dataclasses.dataclass(frozen=True)
class ClassifyCommand:
    """The arguments and options of `fastflow classify`."""

    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files (.nii, .nii.gz, .mgz, .png), folders of them, BIDS datasets, "
            "or manifests (.csv, .tsv, .jsonl).",
            show_default=False,
        ),
    ] = None
    model: Annotated[
        Path,
        typer.Option(
            "--model", "-m", help="Model folder, as `train` writes it; with --engine onnx one of `export`."
        ),
    ] = Path("model")
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write results into.")] = Path("results")
    manifest: Annotated[Path | None, typer.Option(help="A manifest (.csv, .tsv, .jsonl), as an input.")] = (
        None
    )
    split: Annotated[str | None, typer.Option(help="Take only this split of manifests.")] = None
    shard: Annotated[
        str | None, typer.Option(help="i/N: the i-th of N parts, into a folder of its own below --out.")
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run that is in --out, or begin it.")
    ] = False
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Resume, and do error rows again.")] = (
        False
    )
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in --out.")] = False
    on_error: Annotated[OnError, typer.Option(help="fail: stop at the first input that cannot be used.")] = (
        OnError.row
    )
    max_errors: Annotated[int | None, typer.Option(min=0, help="Stop after more error rows than this.")] = (
        None
    )
    prior: Annotated[
        str | None, typer.Option(help="Probabilities of the labels in the model's order, e.g. 0.5,0.3,0.2.")
    ] = None
    slices: Annotated[
        str | None,
        typer.Option(help="center, center+-N or i,j,k along the anterior axis; the model's own by default."),
    ] = None
    combine: Annotated[
        Combine, typer.Option(help="A volume's log-likelihood is its slices' sum or mean.")
    ] = Combine.sum
    readout: ReadoutOption = Readout.argmax
    batch_size: Annotated[int, typer.Option(min=1, help="Slices per pass.")] = 16
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that read files; half of the cores, up to 8, by default."),
    ] = None
    device: DeviceOption = Device.auto
    precision: EvaluationPrecisionOption = EvaluationPrecision.float32
    engine: Annotated[
        Engine,
        typer.Option(
            help="compile takes minutes before the first scan and is faster from thousands of slices on; "
            "ray: a Ray cluster; onnx: --model is an export, which ONNX Runtime runs."
        ),
    ] = Engine.auto
    reject_below: Annotated[
        float | None,
        typer.Option(
            help="Flag rows unknown_scanner whose scanner_p is below, e.g. 0.05, as such a share of known "
            "scanners' rows is too. Nothing is flagged by default."
        ),
    ] = None
    format: Annotated[Format, typer.Option(help="Format of the result files.")] = Format.csv
    id_from: Annotated[IdFrom, typer.Option(help="hash: rows hold a hash in place of the path.")] = (
        IdFrom.relpath
    )
    no_lock: NoLock = False
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the inputs, load the model, write nothing.")
    ] = False


@takes(ClassifyCommand)
def classify(options: ClassifyCommand) -> None:
    """Classify scans by likelihood: status, prediction, log-likelihoods, posterior, as CSV or Parquet.

    Every input gets a row, one that cannot be used with the reason. Where a manifest knows labels, the
    accuracy is printed.

    Exit codes: 0 all inputs were classified; 3 finished, with error rows; 1 the run failed (what it had done
    stays: --resume); 2 wrong usage or bad input.

    Example: `fastflow classify archive/manifest.csv --split test --model model --out results`
    """
    # It is set before torch is loaded: threads that spin while they wait take cores from readers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from fastflow.archive.classify import classify as run
    from fastflow.archive.classify import describe, parse_prior, plan

    sources = options.inputs or []
    if not sources and options.manifest is None:
        fail("nothing to classify: give INPUTS or --manifest", USAGE)
    if options.dry_run:
        found = plan(
            sources,
            options.model,
            manifest=options.manifest,
            split=options.split,
            shard=options.shard,
            slices=options.slices,
            engine=options.engine.value,
            readout=options.readout.value,
        )
        typer.echo(f"{found.total} inputs, {found.bytes / 1e6:.1f} MB, {found.missing} of them no file")
        typer.echo(", ".join(f"{kind} {count}" for kind, count in found.kinds.items()))
        typer.echo(
            f"classes {', '.join(found.class_names)}; slices {found.slices}; nothing was read or written"
        )
        if found.inventory.left_out:
            typer.echo(found.inventory.line())
        for path in found.first:
            typer.echo(f"  {path}")
        return
    with run_progress("classifying") as progress:
        summary = run(
            sources,
            options.model,
            options.out,
            prior=parse_prior(options.prior),
            batch_size=options.batch_size,
            workers=options.workers,
            device=options.device.value,
            split=options.split,
            progress=progress,
            precision=options.precision.value,
            engine=options.engine.value,
            manifest=options.manifest,
            shard=options.shard,
            resume=options.resume,
            retry_failed=options.retry_failed,
            overwrite=options.overwrite,
            on_error=options.on_error.value,
            max_errors=options.max_errors,
            format=options.format.value,
            id_from=options.id_from.value,
            slices=options.slices,
            combine=options.combine.value,
            readout=options.readout.value,
            lock=not options.no_lock,
            reject_below=options.reject_below,
        )
    typer.echo(describe(summary))
    for error in summary.errors:
        warn(error)
    if summary.failed:
        raise typer.Exit(FINISHED_WITH_ERRORS)
