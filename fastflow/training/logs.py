"""Logs of a training: ``steps.csv``, and event files for TensorBoard."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastflow._files import write_text
from fastflow.training.control import StepReport

STEPS, TENSORBOARD = "steps.csv", "tensorboard"
COLUMNS = ("step", "epoch", "learning_rate", "phase", "loss", "bits_per_dim", "images_per_second", "skipped")
# An epoch has about so many rows.
ROWS_PER_EPOCH = 50


class StepLog:
    """``steps.csv``: a row for every so many steps, each of which is in the file at once.

    Args:
        path: the file.
        after: the step after which it goes on; later rows of an earlier process are cut off. 0 begins anew.
    """

    def __init__(self, path: Path, after: int) -> None:
        write_text(path, "".join(_rows_up_to(path, after)))
        self._stream = path.open("a", encoding="utf-8", newline="")

    def write(self, report: StepReport) -> None:
        """Add a row."""
        values = (getattr(report, name) for name in COLUMNS)
        self._stream.write(_row(f"{v:.7g}" if isinstance(v, float) else v for v in values))
        self._stream.flush()

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _row(values: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(values)
    return text.getvalue()


def _rows_up_to(path: Path, after: int) -> list[str]:
    """The header and the whole rows of an earlier process up to a step."""
    rows = [_row(COLUMNS)]
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[1:]
    except OSError:
        return rows
    for line in lines:
        step = line.partition(",")[0]
        if not (line.endswith("\n") and step.isdigit() and int(step) <= after):
            break
        rows.append(line)
    return rows


def is_event_file(name: str) -> bool:
    """Whether a name is that of an event file of TensorBoard."""
    return name.startswith("events.out.tfevents.")


def check_tensorboard() -> None:
    """Raise ValueError where the package for event files is not installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f"event files for TensorBoard need the package tensorboard ({error}); "
            "pip install 'fastflow[tensorboard]', or leave tensorboard out (--tensorboard)"
        ) from error


class EventLog:
    """Event files for TensorBoard.

    Args:
        folder: for the files.
        after: the step after which the log goes on; events of an earlier process that come later are hidden.

    Raises:
        ValueError: the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, after: int) -> None:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after + 1 if after else None)

    def write(self, report: StepReport) -> None:
        """Add the figures of a step."""
        for name in ("learning_rate", "loss", "bits_per_dim", "images_per_second", "skipped"):
            value = float(getattr(report, name))
            if math.isfinite(value):
                self._writer.add_scalar(f"step/{name}", value, report.step)

    def write_epoch(self, record: Mapping[str, float], step: int) -> None:
        """Add the record of an epoch, which ended with this step."""
        for name, value in record.items():
            if name != "epoch":
                self._writer.add_scalar(f"epoch/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left, and close the file."""
        self._writer.close()
