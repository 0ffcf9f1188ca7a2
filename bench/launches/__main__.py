"""The command; see the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench import fake_gpu
from bench.launches import budgets
from bench.launches.classes import CLASSES

if TYPE_CHECKING:
    from bench.launches.counter import LaunchCounter


def rows_of(case: str, counter: LaunchCounter) -> list[budgets.Row]:
    """The rows of a case that was counted, one for each class that has launches."""
    found = []
    for name in CLASSES:
        counts = {key: count for key, count in counter.found.items() if key.name == name}
        if counts:
            by = {
                value: sum(count for key, count in counts.items() if value in key[1:])
                for value in ("forward", "backward", "triton", "conv", "gemm", "other")
            }
            kernels = sum(count for key, count in counter.kernels.items() if key.name == name)
            found.append(budgets.Row(case, name, *by.values(), sum(counts.values()), kernels))
    return found


def show(rows: Sequence[budgets.Row]) -> None:
    """Print the rows of a case and their sums."""
    columns = ("forward", "backward", "triton", "conv", "gemm", "other", "launches", "device_kernels")
    print(f"\n{rows[0].case}, counted\n{'':26}" + "".join(f"{name:>10}" for name in columns))
    sums = [sum(getattr(row, column) for row in rows) for column in columns]
    for name, values in [*((r.name, [getattr(r, c) for c in columns]) for r in rows), ("all", sums)]:
        print(f"{name:26}" + "".join(f"{value:>10,}" for value in values), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    parser.add_argument("cases", nargs="*", help="names in the table, all when left out")
    parser.add_argument("--update", action="store_true", help="write the counts into the table")
    parser.add_argument("--allow-more", metavar="REASON", default="", help="why budgets may rise")
    parser.add_argument("--names", action="store_true", help="print kernels and ops of each class")
    options = parser.parse_args()
    fake_gpu.load()
    from bench.launches.cases import CASES, count

    if unknown := set(options.cases) - set(CASES):
        parser.error(f"cases are {', '.join(CASES)}; got {', '.join(sorted(unknown))}")
    counted: list[budgets.Row] = []
    for name in options.cases or CASES:
        counter = count(CASES[name])
        rows = rows_of(name, counter)
        show(rows)
        counted += rows
        if options.names:
            for (group, direction, op), times in counter.names.most_common():
                print(f"  {times:6} {direction:9} {op:40} {group}")
    table, stored = budgets.as_table(counted), budgets.read_table()
    if options.update:
        try:
            new = budgets.updated(table, stored, options.allow_more)
        except ValueError as error:
            print(error)
            return 1
        order = {(case, name): at for at, (case, name) in enumerate((c, n) for c in CASES for n in CLASSES)}
        budgets.write_table(dict(sorted(new.items(), key=lambda item: order.get(item[0], -1))))
        return 0
    over, under = budgets.compare(table, stored)
    for line in over:
        print(f"OVER   {line}")
    for line in under:
        print(f"UNDER  {line}; lower the budget by `python -m bench.launches --update`")
    return 1 if over else 0


if __name__ == "__main__":
    fake_gpu.leave(main())
