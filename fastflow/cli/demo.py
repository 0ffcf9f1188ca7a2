"""`fastflow demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table

from fastflow.cli._console import FAILED, print_epoch, results, stages
from fastflow.cli._options import Device, DeviceOption, Seed


def _table(*headers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=True)
    return table


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of archive, model, results and report.")
    ] = Path("demo"),
    seed: Seed = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Build the demo archive, train on it, classify its test sets, write the report.

    Takes under ten minutes on two CPU cores. Figures are of simulated scanners on real anatomy.

    Example: `fastflow demo --out demo`, then open `demo/report.html`.
    """
    from fastflow.workflow import run_demo

    with stages() as notify:
        result = run_demo(out, seed=seed, device=device.value, notify=notify, on_epoch=print_epoch)
    table = _table(
        "", "balanced\naccuracy", "histogram\nbalanced", "\naccuracy", "histogram\naccuracy", "\nbits/dim"
    )
    table.title = "Simulated scanners on real anatomy"
    for test in result.tests:
        pairs = [(test.metrics[key], test.histogram[key]) for key in ("balanced_accuracy", "accuracy")]
        table.add_row(
            test.name, *(f"{value:.3f}" for pair in pairs for value in pair), f"{test.bits_per_dim:.3f}"
        )
    recall = _table("recall", *(name for test in result.tests for name in (test.name, "histogram")))
    for name in result.summary.class_names:
        values = [
            m["per_class_recall"][name] for test in result.tests for m in (test.metrics, test.histogram)
        ]
        recall.add_row(name, *("" if value is None else f"{value:.3f}" for value in values))
    results.print(table, recall, sep="\n")
    for test in result.tests:
        if test.flagged is not None:
            typer.echo(f"{test.name}: {test.flagged:.1%} of these good scans are flagged")
    if result.distorted:
        noticed = ", ".join(f"{one.name} {one.share:.0%}" for one in result.distorted)
        typer.echo(f"distorted copies that are flagged: {noticed}")
    typer.echo(f"{result.metrics['seconds']:.0f} s; see {out / 'report.html'}")
    if result.summary.failed:
        raise typer.Exit(FAILED)
