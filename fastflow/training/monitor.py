"""What is told of a training while it goes on: a report on each step, logs, and the time that is left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fastflow.training.control import RunControl, StepReport
from fastflow.training.ledger import StepFigures
from fastflow.training.logs import ROWS_PER_EPOCH, STEPS, TENSORBOARD, EventLog, StepLog

# The pace in images per second is that of so many steps.
PACE_STEPS = 50


class Monitor:
    """Turns the figures of steps into reports, and hands them to logs and to a caller.

    Args:
        folder: of the training; receives the logs.
        control: which logs, and whom to call.
        epochs: of the training.
        steps_per_epoch: of the training.
        first_step: the number of steps that earlier processes took.
        describe: gives the phase and the learning rate of a step, counted from 0.
        writes: whether this process writes logs.
    """

    def __init__(
        self,
        folder: Path,
        control: RunControl,
        epochs: int,
        steps_per_epoch: int,
        first_step: int,
        describe: Callable[[int], tuple[str, float]],
        writes: bool = True,
    ) -> None:
        self._epochs, self._steps_per_epoch, self._first = epochs, steps_per_epoch, first_step
        self._describe, self._on_step = describe, control.on_step
        self._start = time.monotonic()
        self._images, self._taken = 0, deque([(self._start, 0)], maxlen=PACE_STEPS + 1)
        self._last = first_step
        self._every = max(1, steps_per_epoch // ROWS_PER_EPOCH)
        self._csv = StepLog(folder / STEPS, first_step) if writes else None
        events = control.tensorboard and writes
        self._events = EventLog(folder / TENSORBOARD, first_step) if events else None

    def close(self) -> None:
        """Close the logs."""
        for log in (self._csv, self._events):
            if log is not None:
                log.close()

    def count(self, images: int) -> None:
        """Take note of a step over so many images, for the pace."""
        self._images += images
        self._taken.append((time.monotonic(), self._images))

    def step(self, figures: StepFigures | None, history: Sequence[Mapping[str, float]]) -> None:
        """Report the latest step that the host knows of, once."""
        if figures is None or figures.steps <= self._last:
            return
        self._last = figures.steps
        report = self._report(figures, history)
        if report.step % self._every == 0:
            for log in (self._csv, self._events):
                if log is not None:
                    log.write(report)
        if self._on_step is not None:
            self._on_step(report)

    def epoch(self, record: Mapping[str, float]) -> None:
        """Report an epoch that has ended."""
        if self._events is not None:
            self._events.write_epoch(record, int(record["epoch"]) * self._steps_per_epoch)

    def _report(self, figures: StepFigures, history: Sequence[Mapping[str, float]]) -> StepReport:
        phase, rate = self._describe(figures.steps - 1)
        totals, steps = figures.totals, self._epochs * self._steps_per_epoch
        (first_time, first_images), (last_time, last_images) = self._taken[0], self._taken[-1]
        pace = (last_images - first_images) / max(last_time - first_time, 1e-9)
        seconds_per_step = (time.monotonic() - self._start) / max(figures.steps - self._first, 1)
        return StepReport(
            step=figures.steps,
            steps=steps,
            epoch=(figures.steps - 1) // self._steps_per_epoch + 1,
            epochs=self._epochs,
            phase=phase,
            learning_rate=rate,
            loss=figures.loss,
            bits_per_dim=figures.bits_per_dim,
            mean_bits_per_dim=totals.bits_per_dim / totals.samples
            if totals.samples
            else figures.bits_per_dim,
            images_per_second=pace,
            skipped=skipped_steps(history) + totals.skipped_steps,
            accuracy=history[-1].get("val_accuracy") if history else None,
            seconds_left=max(steps - figures.steps, 0) * seconds_per_step,
        )


def skipped_steps(history: Sequence[Mapping[str, float]]) -> int:
    """How many steps of some epochs were skipped."""
    return int(sum(record.get("skipped_steps", 0) for record in history))
