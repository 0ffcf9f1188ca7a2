"""The options of an evaluation: their values, their defaults and what they accept. Torch-free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from os import PathLike

from fastflow.archive.options import check_device, pick_workers
from fastflow.evaluation.bootstrap import RESAMPLES

Progress = Callable[[str, int, int | None], None]


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
    """How to evaluate.

    Attributes:
        splits: each is evaluated apart; ``"all"`` is every file. When None, the split ``test`` where there is
            one, the split that was classified, or all files where the manifest has no splits.
        label: the column of the manifest that holds the class.
        train_manifest: its split ``train`` teaches the baselines; that of the evaluated manifest when None.
        baselines: put them into the table.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        batch_size: slices per pass.
        workers: processes that read files; see `pick_workers` when None.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        precision: see `fastflow.models.scoring.LabelScorer`.
        engine: see `fastflow.archive.classify.classify`.
        resume: go on with an evaluation that was interrupted: what is scored stays.
        overwrite: replace an earlier evaluation.
        lock: hold the folder.
        progress: called with what is done, how much of it, and the total (None until it is known).

    Raises:
        ValueError: an option does not fit; the message names it.
    """

    splits: tuple[str, ...] | None = None
    label: str | None = None
    train_manifest: str | PathLike[str] | None = None
    baselines: bool = True
    resamples: int = RESAMPLES
    seed: int = 0
    batch_size: int = 16
    workers: int | None = None
    device: str = "auto"
    precision: str = "float32"
    engine: str = "auto"
    resume: bool = False
    overwrite: bool = False
    lock: bool = True
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise ValueError("overwrite starts anew, resume goes on: give one of them")
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")
        if self.train_manifest is not None and not self.baselines:
            raise ValueError("train_manifest is for the baselines, which are left out (--no-baselines)")
        check_device(self.device)
        pick_workers(self.workers)

    def tell(self, what: str, done: int, total: int | None) -> None:
        """Call `progress`, if there is one."""
        if self.progress is not None:
            self.progress(what, done, total)
