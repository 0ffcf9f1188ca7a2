"""The training loop, on Lightning Fabric.

Source of the defaults: the published recipe (Adam, linear warm-up from 1 %, cosine to 1e-5, gradient norm
clipped at 1, best checkpoint by validation loss and by validation accuracy).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch

from fastflow.data.slices import SliceSet
from fastflow.errors import TrainingInterrupted
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.numerics import float32_products
from fastflow.training.config import TrainConfig as TrainConfig
from fastflow.training.control import RunControl, StopRequests
from fastflow.training.devices import Ranks, check_ranks, joined
from fastflow.training.keeper import StateKeeper
from fastflow.training.metrics import evaluate_bits_per_dim as evaluate_bits_per_dim
from fastflow.training.metrics import evaluate_labels
from fastflow.training.metrics import middle_slices as middle_slices
from fastflow.training.monitor import Monitor, skipped_steps
from fastflow.training.phases import mean_passes
from fastflow.training.saved_run import CHECKPOINTS as CHECKPOINTS
from fastflow.training.saved_run import HISTORY as HISTORY
from fastflow.training.saved_run import EpochRecord as EpochRecord
from fastflow.training.saved_run import SavedRun
from fastflow.training.selection import Selection
from fastflow.training.state import check_resumable, remove_state
from fastflow.training.step import TrainingStep

# Ranks agree every so many steps on whether to save or to stop.
AGREEMENT_STEPS = 8


def train(
    model: MagicFlow,
    train_set: SliceSet,
    val_set: SliceSet | None,
    config: TrainConfig,
    folder: str | PathLike[str],
    watch: Mapping[str, SliceSet] | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
    device: str = "auto",
    resume: bool = False,
    control: RunControl | None = None,
    ranks: Ranks | None = None,
) -> list[EpochRecord]:
    """Train `model` in place and leave the best checkpoint in `folder`.

    Args:
        model: a new model, or one to train further.
        train_set: labelled 8-bit slices.
        val_set: labelled slices of other subjects that choose the checkpoint; None keeps the last epoch.
        config: how to train.
        folder: receives the model, ``history.jsonl`` (one JSON object per epoch) and, under ``checkpoints/``,
            the best epoch by validation loss and, of more than one class, by validation accuracy and by both.
        watch: further sets whose bits/dim are recorded each epoch and never influence anything.
        progress: called after each epoch with its record.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        resume: go on with the unfinished training in `folder`, as ``control.resume`` does. `model` is a new
            one, made as that of the training was.
        control: how the training is saved, logged and watched; see `RunControl`.
        ranks: the processes that train together, where `joined` has made them already; all call this with
            the same arguments. The first one alone writes files and reports progress.

    Returns:
        One record per epoch: ``epoch``, ``seconds``, ``learning_rate``, ``train_bits_per_dim``, ``phase``
        (the number of the phase that it ends in, from 1), ``passes`` (mean number of passes through the flow
        that its steps made for each image), and with a validation set ``val_bits_per_dim`` and, of more than
        one class, ``val_accuracy``, ``val_balanced_accuracy`` and ``val_nll`` (of single slices, see
        `evaluate_labels`); ``<name>_bits_per_dim`` for each watched set. ``skipped_steps`` counts the steps
        of an epoch that were not finite, and ``skipped_steps_so_far`` those of the training, where the epoch
        has any; they change no weight and are in no mean.

    Raises:
        ValueError: a set is empty, has unknown labels or does not fit the model, the engine is
            ``"cuda_graph"`` and the device is no CUDA device, or devices do not share a batch evenly.
        FloatingPointError: the loss or its gradients were not finite in ``config.max_skipped`` steps in a
            row, or in all steps of an epoch. The last state that was saved stays in the folder.
        ResumeError: there is nothing to resume, its state is damaged, or data, settings or the architecture
            differ from those of the state; no step was taken.
        TrainingInterrupted: SIGINT or SIGTERM stopped the training after a step, whose state was saved.
        OtherProcessError: another process of the training has failed; the message is its own.
    """
    control = control or RunControl()
    control = dataclasses.replace(control, resume=resume or control.resume)
    if ranks is None:
        with joined(config, device) as ranks:
            return train(
                model, train_set, val_set, config, folder, watch, progress, control=control, ranks=ranks
            )
    watch = dict(watch or {})
    for name, data in {"train_set": train_set, "val_set": val_set, **watch}.items():
        if data is not None:
            _check_set(name, data, model.config)
    _check_shares(model.config, config, ranks, len(train_set))
    if control.resume:
        ranks.from_first(lambda: check_resumable(folder))
    sets = {"train": train_set, **({} if val_set is None else {"val": val_set}), **watch}
    with _cpu_threads(config.threads), float32_products(tf32=config.precision == "tf32"):
        run = _Run(model, config, Path(folder), ranks, control)
        run.begin(sets)
        run.fit(train_set, val_set, watch, progress)
        run.finish()
    return run.history


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with so many threads of a CPU; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_set(name: str, data: SliceSet, config: FlowConfig) -> None:
    if len(data) == 0:
        raise ValueError(f"{name} has no slices")
    if tuple(data.images.shape[1:]) != config.input_shape:
        raise ValueError(
            f"{name} has images {tuple(data.images.shape[1:])}, but the model takes {config.input_shape}"
        )
    if data.labels.min() < 0 or data.labels.max() >= config.num_classes:
        raise ValueError(
            f"{name} has labels from {data.labels.min()} to {data.labels.max()}, "
            f"not 0 to {config.num_classes - 1}"
        )


def _check_shares(flow: FlowConfig, config: TrainConfig, ranks: Ranks, slices: int) -> None:
    check_ranks(config, ranks)
    if slices < ranks.world_size:
        raise ValueError(f"train_set has {slices} slices, fewer than the {ranks.world_size} devices")
    if flow.norm == "batch" and ranks.world_size * config.accumulate > 1:
        raise ValueError(
            "norm='batch' takes its statistics from a whole batch: train on one device with accumulate 1, or "
            "take norm='group'"
        )


class _Run(SavedRun):
    """One training run: the loop over epochs, and what is evaluated and kept."""

    def __init__(
        self, model: MagicFlow, config: TrainConfig, folder: Path, ranks: Ranks, control: RunControl
    ) -> None:
        self.model, self.config, self.folder, self.ranks = model, config, folder, ranks
        self.control = control if ranks.is_first else dataclasses.replace(control, on_step=None)
        # One generator is the same on all ranks; what each draws by itself differs from rank to rank.
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(ranks.seed(config.seed))
        ranks.share_weights(model)
        self.selection = Selection(config.select_tolerance)
        self.epoch, self.next_step, self.order = 0, 0, self.generator.get_state()
        self.earlier_seconds, self.started = 0.0, time.perf_counter()
        self.history, self.changes = [], []
        # The model itself is placed and cast; the wrapper is not called, as it would round images to the
        # dtype of conditioners.
        ranks.fabric.setup_module(model)
        self.step = TrainingStep(model, config, self.generator, ranks.fabric.autocast, ranks=ranks)
        self.keeper = StateKeeper(folder, control)

    # -- epochs ----------------------------------------------------------------------------------------------

    def fit(
        self,
        train_set: SliceSet,
        val_set: SliceSet | None,
        watch: Mapping[str, SliceSet],
        progress: Callable[[EpochRecord], None] | None,
    ) -> None:
        steps = max(1, len(train_set) // self.config.batch_size)
        self.started = time.perf_counter()
        with StopRequests(self.keeper.what_stays) as self.stops, self._watched(steps):
            while self.epoch < self.config.epochs:
                record = self._run_epoch(train_set, val_set, watch, steps)
                self.monitor.epoch(record)
                if progress is not None and self.ranks.is_first:
                    progress(record)
                self._stop_if_asked()

    @contextlib.contextmanager
    def _watched(self, steps: int) -> Iterator[None]:
        """Report steps to logs and the caller, and say after a failure what there is to go on from."""
        figures = self.step.figures
        self.monitor = Monitor(
            self.folder,
            self.control,
            *(self.config.epochs, steps, 0 if figures is None else figures.steps),
            lambda step: (self._objective(step, steps), self._rate(step, steps)),
            self.ranks.is_first,
        )
        try:
            yield
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}; {self.keeper.after_failure()}") from error
        finally:
            self.monitor.close()

    def _run_epoch(
        self, train_set: SliceSet, val_set: SliceSet | None, watch: Mapping[str, SliceSet], steps: int
    ) -> EpochRecord:
        epoch = self.epoch
        record: EpochRecord = {"epoch": epoch + 1, "learning_rate": self._rate(epoch * steps, steps)}
        record |= self._train_epoch(train_set, epoch, steps)
        record |= self._evaluate(val_set, watch)
        record["seconds"] = self.seconds()
        self.history.append(record)
        self._keep(record)
        self.write_history()
        self.epoch, self.next_step, self.earlier_seconds = epoch + 1, 0, 0.0
        self.started = time.perf_counter()
        self.save()
        return record

    def _rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, with so many steps in an epoch."""
        factor = self.config.moment(step, self.config.epochs * steps).rate
        return factor * self.config.learning_rate * self.config.rate(step / steps)

    def _objective(self, step: int, steps: int) -> str:
        """The objective of a step, with so many steps in an epoch."""
        return self.config.phases[self.config.moment(step, self.config.epochs * steps).phase].objective

    def _train_epoch(self, data: SliceSet, epoch: int, steps: int) -> EpochRecord:
        self.model.train()
        total = self.config.epochs * steps
        for batch in self.batches(data, steps):
            step = epoch * steps + self.next_step
            self.step.set_moment(self.config.moment(step, total))
            self.step.set_learning_rate(self._rate(step, steps))
            self.step(*batch)
            self.next_step += 1
            self.monitor.count(len(batch[1]))
            self._after_step()
        self.step.flush()
        self.monitor.step(self.step.figures, self.history)
        totals = self.step.take_totals()
        record: EpochRecord = {"train_bits_per_dim": totals.bits_per_dim / totals.samples}
        span = range(epoch * steps, (epoch + 1) * steps)
        record["phase"] = self.config.moment(span[-1], total).phase + 1
        record["passes"] = mean_passes(self.config.phases, span, total, self.model.config.num_classes)
        if totals.skipped_steps:
            record["skipped_steps"] = totals.skipped_steps
            record["skipped_steps_so_far"] = skipped_steps(self.history) + totals.skipped_steps
        return record

    def _after_step(self) -> None:
        """Report the step; save the state where it is time to, and where a signal asked for a stop."""
        figures = self.step.figures
        self.monitor.step(figures, self.history)
        due = self.keeper.due()
        if self.ranks.world_size > 1 and self.next_step % AGREEMENT_STEPS:
            return
        # Weights are good after a skipped step too, but a state amid several would only be skipped through.
        good = figures is None or not figures.skipped_in_a_row
        if self.ranks.highest(self.stops.signum):
            self._stop_if_asked(saves=True)
        elif self.ranks.highest(int(due and good)):
            self.save()

    def _stop_if_asked(self, saves: bool = False) -> None:
        signum = self.ranks.highest(self.stops.signum)
        if signum:
            if saves:
                self.save()
            raise TrainingInterrupted(signum, f"stopped; {self.keeper.what_stays()}")

    # -- evaluation and checkpoints --------------------------------------------------------------------------

    @property
    def candidate(self) -> MagicFlow:
        """The weights that are evaluated and kept: the average where there is one."""
        return self.model if self.step.average is None else self.step.average.model()

    @torch.no_grad()
    def _evaluate(self, val_set: SliceSet | None, watch: Mapping[str, SliceSet]) -> EpochRecord:
        model = self.candidate.eval()
        record: EpochRecord = {}
        for name, data in (({"val": val_set} if val_set is not None else {}) | dict(watch)).items():
            record[f"{name}_bits_per_dim"] = evaluate_bits_per_dim(
                model, *middle_slices(data), ranks=self.ranks
            )
        # One class is always the likeliest, so its accuracy would say nothing.
        if val_set is not None and self.model.config.num_classes > 1:
            figures = evaluate_labels(model, *middle_slices(val_set), self.ranks)
            record |= {f"val_{name}": value for name, value in figures.items()}
        return record

    def _keep(self, record: EpochRecord) -> None:
        """Save the epoch for every rule by which it is the best so far."""
        for rule in self.selection.take(record):
            if self.ranks.is_first:
                self.candidate.save(self.folder / CHECKPOINTS / rule)

    def finish(self) -> None:
        """Put the selected epoch into the model and into the folder."""
        select = self.config.select if self.model.config.num_classes > 1 else "loss"
        kept = self.selection.kept[select]
        chosen = self.folder / CHECKPOINTS / select
        if self.ranks.is_first:
            self.model.load_state_dict(
                MagicFlow.load(chosen).state_dict() if kept else self.candidate.state_dict()
            )
        self.ranks.share_weights(self.model)
        kept = kept or self.config.epochs
        settings = dataclasses.asdict(self.config) | {"select": select}
        changes = {"changes": self.changes} if self.changes else {}
        self.model.metadata["training"] = settings | {"kept_epoch": kept} | changes
        self.model.eval()
        if not self.ranks.is_first:
            return
        self.model.save(self.folder)
        if not self.control.keep_state:
            remove_state(self.folder)
