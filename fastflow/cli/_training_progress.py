"""Progress of a training: a bar on a terminal, a line for each epoch everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fastflow.cli._console import messages

if TYPE_CHECKING:
    from fastflow.training.control import StepReport


class TrainingBar:
    """One bar, for the files that are read first and then for the steps of all epochs."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._is_terminal = progress, messages.is_terminal
        self._reading: TaskID | None = None
        self._training: TaskID | None = None

    def reading(self, done: int, total: int) -> None:
        """Show how many files are read."""
        if self._reading is None:
            self._reading = self._progress.add_task("reading volumes", total=total, figures="")
            if not self._is_terminal:
                messages.print("reading volumes ...", highlight=False)
        self._progress.update(self._reading, completed=done, total=total, figures=f"{done}/{total}")

    def step(self, report: StepReport) -> None:
        """Show a step."""
        if not self._is_terminal:
            return
        if self._training is None:
            self._training = self._progress.add_task("", total=report.steps, figures="")
        self._progress.update(
            self._training,
            description=f"epoch {report.epoch}/{report.epochs}, step {report.step}/{report.steps}",
            completed=report.step,
            figures=figures(report),
        )


def figures(report: StepReport) -> str:
    """The figures of a step in a line: bits/dim, accuracy, pace, time left, and skipped steps if any."""
    parts = [f"{report.mean_bits_per_dim:.4g} bits/dim"]
    if report.accuracy is not None:
        parts.append(f"accuracy {report.accuracy:.3g}")
    parts.append(f"{report.images_per_second:.3g} images/s")
    if report.skipped:
        parts.append(f"{report.skipped} skipped")
    return f"{', '.join(parts)}, {timedelta(seconds=round(report.seconds_left))} left"


@contextmanager
def training_bar() -> Iterator[TrainingBar]:
    """A bar on stderr while the block runs; nothing is drawn where there is no terminal."""
    columns = (
        *(TextColumn("{task.description}"), BarColumn()),
        *(TextColumn("{task.fields[figures]}"), TimeElapsedColumn()),
    )
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as progress:
        yield TrainingBar(progress)
