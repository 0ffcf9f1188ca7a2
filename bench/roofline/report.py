"""The tables that ``python -m bench.roofline`` prints and writes."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.roofline.counts import Row, rows
from bench.roofline.machine import (
    BANDWIDTH,
    MAX_BYTES_OVER_PLAIN,
    MAX_LAUNCHES_OVER_PLAIN,
    MAX_OVER_NEEDED,
)
from bench.roofline.models import StepRow, step_rows

HEADINGS = (
    "name", "steps", "shape", "conditioner", "pass", "needed MB", "moved MB", "composite MB",
    "moved / needed", "moved / composite", "launches", "composite launches",
    *(f"{device} bound us" for device in BANDWIDTH),
)  # fmt: skip
STEP_HEADINGS = (
    "conditioner", "step", "shape", "dtype", "pass", "launches", "plain launches", "ratio", "MB", "plain MB",
    "bytes ratio", "products MB", "plain products MB", "ratio with products",
)  # fmt: skip
# Columns of words, to the left of those of numbers.
WORDS = 5


def _cells(row: Row) -> list[str]:
    sizes = [f"{value / 1e6:.3f}" for value in (row.needed, row.moved, row.composite)]
    ratios = [f"{row.over_needed:.3f}", f"{row.over_composite:.3f}"]
    launches = [str(row.launches), str(row.composite_launches)]
    bounds = [f"{row.bound_us(device):.2f}" for device in BANDWIDTH]
    return [row.name, row.steps, row.shape, row.dtype, row.passes, *sizes, *ratios, *launches, *bounds]


def _step_cells(row: StepRow) -> list[str]:
    launches = [str(row.fused.launches), str(row.plain.launches), f"{row.over_launches:.3f}"]
    sizes = [f"{row.fused.bytes / 1e6:.2f}", f"{row.plain.bytes / 1e6:.2f}", f"{row.over_bytes:.3f}"]
    products = [f"{row.fused_products / 1e6:.2f}", f"{row.plain_products / 1e6:.2f}", f"{row.over_all:.3f}"]
    return [row.task, str(row.step), row.shape, row.dtype, row.passes, *launches, *sizes, *products]


def _print_table(
    console: Console, title: str, headings: Sequence[str], lines: Sequence[Sequence[str]]
) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i < WORDS else "right", no_wrap=i < WORDS)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _print_targets(console: Console, found: Sequence[Row]) -> None:
    """The targets, and every half-step that misses one."""
    missed = [(row, over) for row in found if row.half_step and (over := row.misses())]
    total = sum(row.half_step for row in found)
    console.print(
        "Targets for half-steps outside of their conditioner, counted: moved <= "
        f"{MAX_OVER_NEEDED} x needed, and <= 1/3 of the composite. "
        f"{total - len(missed)} of {total} rows meet both" + ("; these miss:" if missed else ".")
    )
    for row, over in missed:
        console.print(f"  {row.name} {row.shape} {row.dtype} {row.passes}: {', '.join(over)}")
    if missed:
        console.print(
            "A mix of several channels is a launch of its own: it reads again what the coupling has written."
        )


def _print_step_targets(console: Console, found: Sequence[StepRow]) -> None:
    """The targets, and every whole half-step that misses one."""
    missed = [(row, over) for row in found if (over := row.misses())]
    console.print(
        "Targets for whole half-steps, counted outside of convolutions and matrix products: at most "
        f"{MAX_LAUNCHES_OVER_PLAIN} of the plain launches and {MAX_BYTES_OVER_PLAIN} of the plain bytes. "
        f"{len(found) - len(missed)} of {len(found)} rows meet both" + ("; these miss:" if missed else ".")
    )
    for row, over in missed:
        console.print(f"  {row.task} {row.shape} {row.dtype} {row.passes}: {', '.join(over)}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline",
        description="Counted bytes and launches, and bounds from them. Measures no time.",
    )
    parser.add_argument("--batch", type=int, default=16, help="samples (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    found, steps = rows(args.batch), step_rows(args.batch)
    console = Console(width=200, highlight=False)
    devices = ", ".join(f"{device} {bandwidth / 1e9:.0f}" for device, bandwidth in BANDWIDTH.items())
    note = f"counted at batch {args.batch}; bound = moved bytes / bandwidth ({devices} GB/s)"
    ops = [_cells(row) for row in found if not row.half_step]
    half_steps = [_cells(row) for row in found if row.half_step]
    _print_table(console, f"Ops, {note}", HEADINGS, ops)
    _print_table(console, f"\nHalf-steps outside of their conditioner, {note}", HEADINGS, half_steps)
    _print_targets(console, found)
    title = f"\nWhole half-steps, counted at batch {args.batch}"
    _print_table(console, title, STEP_HEADINGS, [_step_cells(row) for row in steps])
    _print_step_targets(console, steps)
    if args.csv:
        lines = [HEADINGS, *map(_cells, found), STEP_HEADINGS, *map(_step_cells, steps)]
        with args.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(lines)
