"""A training run that can be stopped between any two steps: its position, and its state on the disk."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastflow._files import write_text
from fastflow.data.slices import SliceSet
from fastflow.models.magic_flow import MagicFlow
from fastflow.training.batches import iterate_batches
from fastflow.training.config import TrainConfig
from fastflow.training.control import RunControl
from fastflow.training.devices import Ranks
from fastflow.training.fingerprint import (
    Fingerprint,
    architecture_fingerprint,
    data_fingerprint,
    preprocess_fingerprint,
    ranks_fingerprint,
    settings_fingerprint,
)
from fastflow.training.keeper import StateKeeper
from fastflow.training.logs import TENSORBOARD, is_event_file
from fastflow.training.optimizer_state import part, with_prefix
from fastflow.training.random_state import random_state, set_random_state
from fastflow.training.selection import Selection
from fastflow.training.state import (
    RunState,
    check_fingerprint,
    clear_unfinished_files,
    described_as_damaged,
    kept_weights,
    read_state,
    remove_state,
    warn_of_other_software,
    write_fingerprint,
    younger_checkpoints,
)
from fastflow.training.step import TrainingStep

EpochRecord = dict[str, float]
# The names of what a training leaves in its folder, beside the model.
HISTORY, CHECKPOINTS = "history.jsonl", "checkpoints"


class SavedRun:
    """What a training run is between two steps; `save` writes all of it, and `begin` may go on from it.

    Attributes:
        model: that is trained, on its device.
        config: how to train.
        folder: of the training.
        control: how the training is run.
        ranks: the processes that train together.
        generator: of the host, the same on all ranks; augmentation may draw from it, and the order of each
            epoch does.
        step: the training step.
        keeper: decides when a state is saved.
        selection: the best epochs so far.
        epoch: that is under way, counted from 0.
        next_step: of the epoch, counted from 0.
        order: state of `generator` from which the order of the epoch was drawn.
        earlier_seconds: that earlier processes spent on the epoch.
        started: `time.perf_counter` when this process began or went on with the epoch.
        history: the records of the epochs before.
        changes: of settings since the training began, in words.
    """

    model: MagicFlow
    config: TrainConfig
    folder: Path
    control: RunControl
    ranks: Ranks
    generator: torch.Generator
    step: TrainingStep
    keeper: StateKeeper
    selection: Selection
    epoch: int
    next_step: int
    order: Tensor
    earlier_seconds: float
    started: float
    history: list[EpochRecord]
    changes: list[str]

    def seconds(self) -> float:
        """The time that the epoch has taken so far, that of earlier processes included."""
        return self.earlier_seconds + time.perf_counter() - self.started

    def batches(self, data: SliceSet, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the epoch that are left, in the order that was drawn at its beginning."""
        now = self.generator.get_state()
        if self.next_step:
            self.generator.set_state(self.order)
        else:
            self.order = now
        left = iterate_batches(data, steps, self.config, self.generator, self.next_step, self.ranks.rows)
        if self.next_step:
            # The order is drawn with the first batch; what was drawn after it had been drawn already.
            first = next(left, None)
            self.generator.set_state(now)
            left = itertools.chain(() if first is None else (first,), left)
        yield from left

    def write_history(self) -> None:
        """Write `history.jsonl` anew."""
        if self.ranks.is_first:
            lines = (json.dumps(record) + "\n" for record in self.history)
            write_text(self.folder / HISTORY, "".join(lines))

    def begin(self, sets: Mapping[str, SliceSet]) -> None:
        """Make the folder ready for a new training, or go on with the one that is in it."""
        if self.control.resume:
            self._resume(sets)
        elif self.ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            # The best epochs of an earlier run must not pass for those of this run.
            shutil.rmtree(self.folder / CHECKPOINTS, ignore_errors=True)
            remove_state(self.folder)
            for path in (self.folder / TENSORBOARD).glob("*"):
                if is_event_file(path.name):
                    path.unlink()
            write_fingerprint(self.folder, self._fingerprint(sets))

    def _fingerprint(self, sets: Mapping[str, SliceSet]) -> Fingerprint:
        return {
            **settings_fingerprint(self.config),
            **architecture_fingerprint(self.model),
            **preprocess_fingerprint(self.model),
            **data_fingerprint(sets),
            **ranks_fingerprint(self.ranks.world_size),
        }

    def _resume(self, sets: Mapping[str, SliceSet]) -> None:
        def read() -> tuple[RunState, list[str], set[str]]:
            changes = check_fingerprint(self.folder, self._fingerprint(sets), self.control.allow_changes)
            state, notes = read_state(self.folder)
            warn_of_other_software(notes)
            clear_unfinished_files(self.folder)
            return state, changes, younger_checkpoints(self.folder / CHECKPOINTS, state)

        state, changes, younger = self.ranks.from_first(read)
        with described_as_damaged(self.folder):
            self.model.load_state_dict(part(state.tensors, "model."))
            self.step.load_state_dict(part(state.tensors, "step."))
            random = self.ranks.own_part(part(state.tensors, "random."))
            set_random_state(random, self.generator, self.model.device)
            self.order = state.tensors["order"]
        self.epoch, self.next_step, self.earlier_seconds = state.epoch, state.step, state.seconds
        self.history = [dict(record) for record in state.history]
        self.changes = [*state.changes, *(f"from {state.where()}: {text}" for text in changes)]
        # A checkpoint that is younger than the state is of an epoch that is done again, and kept again.
        for record in self.history:
            self.selection.take(record)
        for name in younger & set(self.selection.kept):
            self.selection.forget(name)
        self.keeper = StateKeeper(self.folder, self.control, state)
        self.write_history()
        if changes:
            self.save()
            if self.ranks.is_first:
                write_fingerprint(self.folder, self._fingerprint(sets))

    def save(self) -> None:
        """Write the state between two steps. All ranks must call it together."""
        random = self.ranks.all_parts(random_state(self.generator, self.model.device))
        tensors = {
            **with_prefix("model.", self.model.state_dict()),
            **with_prefix("step.", self.step.state_dict()),
            **with_prefix("random.", random),
            "order": self.order,
        }
        state = RunState(
            epoch=self.epoch,
            step=self.next_step,
            seconds=self.seconds(),
            history=self.history,
            checkpoints=kept_weights(self.folder / CHECKPOINTS),
            changes=self.changes,
            tensors=tensors,
        )
        if self.ranks.is_first:
            self.keeper.save(state)
        else:
            self.keeper.note(state)
