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
    table = _table("", "", "balanced\naccuracy", "\naccuracy", "\nbits/dim")
    table.title = "Simulated scanners on real anatomy"
    for test in result.tests:
        classifiers = (("flow", test.metrics), ("grain LDA", test.grain), ("histogram", test.histogram))
        for name, metrics in classifiers:
            if metrics is not None:
                figures = (f"{metrics[key]:.3f}" for key in ("balanced_accuracy", "accuracy"))
                own = (test.name, f"{test.bits_per_dim:.3f}") if name == "flow" else ("", "")
                table.add_row(own[0], name, *figures, own[1])
    recall = _table(
        "recall",
        *(name.replace(" ", "\n") for test in result.tests for name in (test.name, "grain LDA", "histogram")),
    )
    for name in result.summary.class_names:
        values = [
            None if metrics is None else metrics["per_class_recall"][name]
            for test in result.tests
            for metrics in (test.metrics, test.grain, test.histogram)
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
