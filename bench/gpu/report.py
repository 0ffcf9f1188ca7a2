"""The time that is left and the table of figures."""

from __future__ import annotations

import csv
import importlib.metadata
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.files import write_csv
from bench.measuring import DEVICE, device_name

TABLE = Path(__file__).parents[1] / "gpu.csv"


class Key(NamedTuple):
    """The subject of a figure, apart from the machine.

    Attributes:
        item: such as ``training``.
        task: ``classification`` or ``generation``, or the shape of an op.
        engine: what ran: ``reference``, ``eager``, ``cuda_graph``, ``compile``.
        precision: such as ``float32``.
        batch: images.
    """

    item: str
    task: str
    engine: str = ""
    precision: str = "float32"
    batch: int = 0


class Figure(NamedTuple):
    """A number with its unit, and words beside it."""

    value: float
    unit: str
    note: str = ""


HEADER = ("device", "torch", "triton", "cuda", "preset", *Key._fields, *Figure._fields)


class Report:
    """Runs items while there is time, prints what they find and keeps it in the table.

    Args:
        preset: of the models.
        seconds: for all items together. An item that has begun is not stopped.
        table: path of the table; None writes none.

    Attributes:
        skipped: names of the items that there was no time for.
        failed: names of the items that raised an error.
    """

    def __init__(self, preset: str, seconds: float, table: Path | None) -> None:
        self._machine = (device_name(), torch.__version__, _triton(), torch.version.cuda or "", preset)
        self._end, self._table = time.monotonic() + seconds, table
        self.skipped: list[str] = []
        self.failed: list[str] = []
        # The words of a row before its figures are its key.
        self._rows: dict[tuple[str, ...], tuple[str, ...]] = {}
        if table is not None and table.exists():
            with table.open(newline="", encoding="utf-8") as file:
                for line in list(csv.reader(file))[1:]:
                    self._rows[tuple(line[: -len(Figure._fields)])] = tuple(line)

    @property
    def seconds_left(self) -> float:
        """Seconds until no item begins any more."""
        return self._end - time.monotonic()

    def attempt(
        self, name: str, work: Callable[[], Iterator[tuple[Key, Figure]]], seconds: float = 0.0
    ) -> None:
        """Run an item, unless fewer than `seconds` are left; a failure is printed and hides no other item."""
        if self.seconds_left < seconds:
            self.skipped.append(name)
            print(f"{name}: skipped, {max(0.0, self.seconds_left):.0f} s are left", flush=True)
            return
        try:
            for key, figure in work():
                self._add(key, figure)
        except Exception:
            self.failed.append(name)
            print(f"{name}: FAILED\n{traceback.format_exc(limit=-3)}", flush=True)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()

    def _add(self, key: Key, figure: Figure) -> None:
        words = " ".join(str(value) for value in key if value)
        print(f"{words}: {figure.value:.4g} {figure.unit} {figure.note}".rstrip(), flush=True)
        if self._table is not None:
            about = (*self._machine, *map(str, key))
            self._rows[about] = (*about, f"{figure.value:.6g}", figure.unit, figure.note)
            write_csv(self._table, HEADER, self._rows.values())


def _triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""
