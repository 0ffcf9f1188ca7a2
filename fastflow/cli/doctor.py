"""`fastflow doctor`."""

from __future__ import annotations

import typer
from rich.table import Table

from fastflow.cli._console import FAILED, results


def doctor() -> None:
    """Show what fastflow finds on this machine: versions, GPU, and which implementation of the ops runs.

    Example: `fastflow doctor`
    """
    from fastflow.diagnosis import diagnose

    table = Table(show_header=False, box=None, pad_edge=False)
    facts = diagnose()
    for name, value in facts.items():
        table.add_row(name, value)
    results.print(table)
    if any(value == "missing" for value in facts.values()):
        raise typer.Exit(FAILED)
