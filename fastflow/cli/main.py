"""The command `fastflow`."""

from __future__ import annotations

from typing import Annotated

import typer

from fastflow import __version__
from fastflow.cli import (
    benchmark_scanners,
    calibrate,
    classify,
    crossval,
    demo,
    demo_data,
    doctor,
    evaluate,
    explain,
    export,
    index,
    plot,
    sample,
    train,
)
from fastflow.cli._console import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastflow {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Train MAGIC-Flow on an archive of brain scans and classify another by likelihood.

    Start with `fastflow demo`, or step by step:

        fastflow demo-data archive
        fastflow train archive/manifest.csv --out model
        fastflow classify archive/manifest.csv --split test --model model --out results
        fastflow export model --out deploy

    Results go to stdout, progress to stderr. Exit codes: 0 success; 1 the run failed, or inputs of `train` or
    `explain` did, or an export is not what `verify` expects; 2 wrong usage or bad input; 3 `classify` or
    `evaluate` finished, with error rows.
    """


app.command("demo")(demo.demo)
app.command("demo-data")(demo_data.demo_data)
app.command("benchmark-scanners")(benchmark_scanners.benchmark_scanners)
app.command("index")(index.index)
app.command("train")(train.train)
app.command("plot")(plot.plot)
app.command("calibrate")(calibrate.calibrate)
app.command("classify")(classify.classify)
app.command("evaluate")(evaluate.evaluate)
app.command("crossval")(crossval.crossval)
app.command("sample")(sample.sample)
app.command("explain")(explain.explain)
app.command("export")(export.export)
app.command("verify")(export.verify)
app.command("doctor")(doctor.doctor)


def run() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    run()
