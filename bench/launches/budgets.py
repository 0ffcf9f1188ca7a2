"""The table of launches: a row for each case and class, whose counts are budgets. Needs no torch."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.files import write_csv

TABLE = Path(__file__).parents[1] / "launches.csv"
# A count that is lower than its budget by more than this share should become the budget.
SLACK = 0.02


class Row(NamedTuple):
    """The launches of a class in a case; a row of the table.

    Attributes:
        case: such as ``classification training float32``.
        name: of the class.
        forward: launches of the forward pass.
        backward: launches of the backward pass, and of what follows it.
        triton: those that are Triton kernels.
        conv: those that are convolutions.
        gemm: those that are matrix products of ATen.
        other: those that are other ops of ATen.
        launches: all of them, the budget.
        device_kernels: kernels on the device, where an op is known to start several.
        reason: why the budget was raised.
    """

    case: str
    name: str
    forward: int
    backward: int
    triton: int
    conv: int
    gemm: int
    other: int
    launches: int
    device_kernels: int
    reason: str = ""


class Verdict(NamedTuple):
    """Lines about counts that are above their budgets, and about counts that are far below."""

    over: list[str]
    under: list[str]


Table = dict[tuple[str, str], Row]


def as_table(rows: Iterable[Row]) -> Table:
    """Rows by case and class."""
    return {(row.case, row.name): row for row in rows}


def read_table(path: Path = TABLE) -> Table:
    """The stored rows; none where there is no table."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return as_table(
            Row(*(int(value) if value.isdigit() else value for value in line.values()))  # type: ignore[arg-type]
            for line in csv.DictReader(file)
        )


def write_table(table: Mapping[tuple[str, str], Row], path: Path = TABLE) -> None:
    """Write the rows in the order in which they come."""
    write_csv(path, Row._fields, table.values())


def totals(rows: Iterable[Row]) -> dict[str, int]:
    """Launches of each case."""
    sums: dict[str, int] = {}
    for row in rows:
        sums[row.case] = sums.get(row.case, 0) + row.launches
    return sums


def compare(counted: Table, budgets: Table) -> Verdict:
    """Hold counts against the budgets of the same cases; a class without a budget may have no launches."""
    found, allowed = totals(counted.values()), totals(budgets.values())
    pairs = {f"{case}, in all": (count, allowed.get(case, 0)) for case, count in found.items()}
    for key, row in counted.items():
        pairs[f"{row.case}, {row.name}"] = row.launches, budgets[key].launches if key in budgets else 0
    for key, row in budgets.items():
        if row.case in found and key not in counted:
            pairs[f"{row.case}, {row.name}"] = 0, row.launches
    lines = {
        f"{name}: {count} launches, budget {most}": (count, most) for name, (count, most) in pairs.items()
    }
    over = [line for line, (count, most) in lines.items() if count > most]
    under = [line for line, (count, most) in lines.items() if count < (1 - SLACK) * most]
    return Verdict(over, under)


def updated(counted: Table, budgets: Table, reason: str = "") -> Table:
    """The budgets with those of the counted cases replaced.

    Raises:
        ValueError: a budget would rise and no reason is given.
    """
    over = compare(counted, budgets).over
    known = {row.case for row in budgets.values()}
    raised = [line for line in over if line.split(",")[0] in known]
    if raised and not reason:
        raise ValueError("budgets would rise, which needs --allow-more REASON:\n  " + "\n  ".join(raised))
    cases = {row.case for row in counted.values()}
    kept = {key: row for key, row in budgets.items() if row.case not in cases}
    return kept | {key: _with_reason(row, budgets, reason) for key, row in counted.items()}


def _with_reason(row: Row, budgets: Table, reason: str) -> Row:
    if all(case != row.case for case, _ in budgets):
        return row
    before = budgets.get((row.case, row.name))
    if before is None or row.launches > before.launches:
        return row._replace(reason=reason)
    return row._replace(reason=before.reason)
