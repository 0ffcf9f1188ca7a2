"""How a training on an archive is run and watched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypedDict

from fastflow.archive.training_data import Reading, UsableFiles
from fastflow.training.control import RunControl, StepReport
from fastflow.training.trainer import EpochRecord


@dataclasses.dataclass(frozen=True)
class TrainingRun(RunControl):
    """How a training on an archive is run; two that differ in nothing else give the same model.

    Attributes:
        reading: called with the number of files read and their total, or a `Reading`, which also has a cache.
        progress: called after each epoch.
        counted: called before the first epoch with what was found and what of it can be used, also where
            that is too little.
        overwrite: replace an earlier model or unfinished training; other files are never replaced.
        lock: keep other runs out of the folder.
    """

    reading: Callable[[int, int], None] | Reading | None = None
    progress: Callable[[EpochRecord], None] | None = None
    counted: Callable[[UsableFiles], None] | None = None
    overwrite: bool = False
    lock: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overwrite and self.resume:
            raise ValueError("overwrite starts anew, resume goes on: give one of them")


class TrainingRunFields(TypedDict, total=False):
    """The fields of `TrainingRun`, as keywords."""

    resume: bool
    allow_changes: bool
    save_seconds: float | None
    save_steps: int | None
    keep_state: bool
    tensorboard: bool
    on_step: Callable[[StepReport], None] | None
    reading: Callable[[int, int], None] | Reading | None
    progress: Callable[[EpochRecord], None] | None
    counted: Callable[[UsableFiles], None] | None
    overwrite: bool
    lock: bool
