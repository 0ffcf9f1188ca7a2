"""How a training is run and watched: what changes no number of it."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from fastflow.errors import TrainingInterrupted


@dataclasses.dataclass(frozen=True)
class StepReport:
    """A step of a training, as the host knows of it: on a GPU, one step late.

    Attributes:
        step: number of the step, counted from 1 over all epochs.
        steps: of the whole training.
        epoch: number of the epoch, counted from 1.
        epochs: of the whole training.
        phase: the objective of the step.
        learning_rate: of the step.
        loss: of the step.
        bits_per_dim: mean over the step's images; NaN where the step was skipped.
        mean_bits_per_dim: mean over the images of the epoch so far.
        images_per_second: over the latest steps.
        skipped: steps of the whole training whose loss or gradients were not finite.
        accuracy: of the latest validation; None before the first, and of one class.
        seconds_left: until the end of the training, at the pace of this process; validation included.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    phase: str
    learning_rate: float
    loss: float
    bits_per_dim: float
    mean_bits_per_dim: float
    images_per_second: float
    skipped: int
    accuracy: float | None
    seconds_left: float


@dataclasses.dataclass(frozen=True)
class RunControl:
    """How a training is run; two trainings that differ in nothing else have the same weights.

    Attributes:
        resume: go on with the unfinished training in the folder, from the state that was saved last.
        allow_changes: where it is resumed, some settings may differ from those it was begun with
            (`fastflow.training.fingerprint.CHANGEABLE`); the model's metadata then list the changes.
        save_seconds: seconds from one state to the next; None saves states at the ends of epochs only. Where
            saving is slow, states are rarer, so that it takes no more than a twentieth of the time.
        save_steps: steps from one state to the next, beside `save_seconds`; None for no such rule.
        keep_state: leave the state in the folder when the training has ended.
        tensorboard: write event files for TensorBoard into ``tensorboard/``.
        on_step: called after each step.
    """

    resume: bool = False
    allow_changes: bool = False
    save_seconds: float | None = 300.0
    save_steps: int | None = None
    keep_state: bool = False
    tensorboard: bool = False
    on_step: Callable[[StepReport], None] | None = None

    def __post_init__(self) -> None:
        if self.save_seconds is not None and not self.save_seconds >= 0:
            raise ValueError(f"save_seconds must be at least 0 or None, got {self.save_seconds!r}")
        if self.save_steps is not None and self.save_steps < 1:
            raise ValueError(f"save_steps must be at least 1 or None, got {self.save_steps!r}")
        if self.allow_changes and not self.resume:
            raise ValueError(
                "allow_changes is for a training that is resumed; set resume too, or leave it out"
            )


class StopRequests:
    """SIGINT and SIGTERM, held back until a training has saved its state; a second one stops at once.

    Handlers are set in the main thread only, and only where Python's own or the system's are in place: a
    program that handles these signals, or ignores them, goes on to do so.

    Args:
        what_stays: says in words what a stop at once leaves behind.

    Attributes:
        signum: the signal that asked for a stop; 0 where none did.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, what_stays: Callable[[], str]) -> None:
        self.signum = 0
        self._what_stays = what_stays
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for signum in self.SIGNALS:
                if signal.getsignal(signum) in (signal.SIG_DFL, signal.default_int_handler):
                    self._before[signum] = signal.signal(signum, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before.clear()

    def _ask(self, signum: int, _: FrameType | None) -> None:
        if self.signum:
            raise TrainingInterrupted(signum, f"stopped at once; {self._what_stays()}")
        self.signum = signum
