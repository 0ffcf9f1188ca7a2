"""The training loop, on Lightning Fabric.

Source of the defaults: the published recipe (Adam, linear warm-up from 1 %, cosine to 1e-5, gradient norm
clipped at 1, best checkpoint by validation loss and by validation accuracy).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch

from fastflow._files import write_text
from fastflow.data.slices import SliceSet
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.numerics import float32_products
from fastflow.training.batches import iterate_batches
from fastflow.training.config import TrainConfig as TrainConfig
from fastflow.training.devices import Ranks, check_ranks, joined
from fastflow.training.metrics import SampleMean, evaluate_accuracy
from fastflow.training.metrics import evaluate_bits_per_dim as evaluate_bits_per_dim
from fastflow.training.metrics import middle_slices as middle_slices
from fastflow.training.step import TrainingStep

EpochRecord = dict[str, float]
# The names of what a training leaves in its folder, beside the model.
HISTORY, CHECKPOINTS = "history.jsonl", "checkpoints"


def train(
    model: MagicFlow,
    train_set: SliceSet,
    val_set: SliceSet | None,
    config: TrainConfig,
    folder: str | PathLike[str],
    watch: Mapping[str, SliceSet] | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
    device: str = "auto",
    ranks: Ranks | None = None,
) -> list[EpochRecord]:
    """Train `model` in place and leave the best checkpoint in `folder`.

    Args:
        model: a new model, or one to train further.
        train_set: labelled 8-bit slices.
        val_set: labelled slices of other subjects that choose the checkpoint; None keeps the last epoch.
        config: how to train.
        folder: receives the model, ``history.jsonl`` (one JSON object per epoch) and, under ``checkpoints/``,
            the best epoch by validation loss and, of more than one class, by validation accuracy.
        watch: further sets whose bits/dim are recorded each epoch and never influence anything.
        progress: called after each epoch with its record.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        ranks: the processes that train together, where `joined` has made them already; all call this with
            the same arguments. The first one alone writes files and reports progress.

    Returns:
        One record per epoch: ``epoch``, ``seconds``, ``learning_rate``, ``train_bits_per_dim``, and with a
        validation set ``val_bits_per_dim`` and, of more than one class, ``val_accuracy`` (of single slices);
        ``<name>_bits_per_dim`` for each watched set. ``skipped_steps`` counts the steps of an epoch that
        were not finite, where there are any; they change no weight and are in no mean.

    Raises:
        ValueError: a set is empty, has unknown labels or does not fit the model, the engine is
            ``"cuda_graph"`` and the device is no CUDA device, or devices do not share a batch evenly.
        FloatingPointError: the loss or its gradients were not finite in ``config.max_skipped`` steps in a
            row, or in all steps of an epoch.
        OtherProcessError: another process of the training has failed; the message is its own.
    """
    if ranks is None:
        with joined(config, device) as ranks:
            return train(model, train_set, val_set, config, folder, watch, progress, device, ranks)
    watch = dict(watch or {})
    for name, data in {"train_set": train_set, "val_set": val_set, **watch}.items():
        if data is not None:
            _check_set(name, data, model.config)
    _check_shares(model.config, config, ranks, len(train_set))
    with _cpu_threads(config.threads), float32_products(tf32=config.precision == "tf32"):
        run = _Run(model, config, Path(folder), ranks)
        history = run.fit(train_set, val_set, watch, progress)
        run.finish()
    return history


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


class _Run:
    """One training run: the state that `train` keeps between epochs."""

    def __init__(self, model: MagicFlow, config: TrainConfig, folder: Path, ranks: Ranks) -> None:
        self.model, self.config, self.folder, self.ranks = model, config, folder, ranks
        self.fabric = ranks.fabric
        # One generator is the same on all ranks; what each draws by itself differs from rank to rank.
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(ranks.seed(config.seed))
        ranks.share_weights(model)
        self.best = {"accuracy": -math.inf, "loss": math.inf}
        self.kept = {"accuracy": 0, "loss": 0}
        # The model itself is placed and cast; the wrapper is not called, as it would round images to the
        # dtype of conditioners.
        self.fabric.setup_module(model)
        self.step = TrainingStep(model, config, self.generator, self.fabric.autocast, ranks=ranks)
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            # The best epochs of an earlier run must not pass for those of this run.
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)

    # -- epochs ----------------------------------------------------------------------------------------------

    def fit(
        self,
        train_set: SliceSet,
        val_set: SliceSet | None,
        watch: Mapping[str, SliceSet],
        progress: Callable[[EpochRecord], None] | None,
    ) -> list[EpochRecord]:
        steps = max(1, len(train_set) // self.config.batch_size)
        history: list[EpochRecord] = []
        for epoch in range(self.config.epochs):
            start = time.perf_counter()
            record: EpochRecord = {"epoch": epoch + 1, "learning_rate": self._rate(epoch * steps, steps)}
            record |= self._train_epoch(train_set, epoch, steps)
            record |= self._evaluate(val_set, watch)
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            self._keep(record)
            self._write_history(history)
            if progress is not None and self.ranks.is_first:
                progress(record)
        return history

    def _rate(self, step: int, steps: int) -> float:
        """Learning rate of a step, with so many steps in an epoch."""
        return self.config.learning_rate * self.config.rate(step / steps)

    def _train_epoch(self, data: SliceSet, epoch: int, steps: int) -> EpochRecord:
        self.model.train()
        batches = iterate_batches(data, steps, self.config, self.generator, rows=self.ranks.rows)
        for i, batch in enumerate(batches):
            self.step.set_learning_rate(self._rate(epoch * steps + i, steps))
            self.step(*batch)
        totals = self.step.take_totals()
        mean = SampleMean(self.fabric)
        mean.add(totals.bits_per_dim, totals.samples)
        record: EpochRecord = {"train_bits_per_dim": mean.compute()}
        if totals.skipped_steps:
            record["skipped_steps"] = totals.skipped_steps
        return record

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
            record["val_accuracy"] = evaluate_accuracy(model, *middle_slices(val_set), self.ranks)
        return record

    def _keep(self, record: EpochRecord) -> None:
        """Save the epoch where it is the best so far; among equal accuracies the lower loss is the better."""
        checkpoints = self.folder / CHECKPOINTS
        loss = record.get("val_bits_per_dim")
        if loss is None:
            return
        if loss < self.best["loss"]:
            self.best["loss"], self.kept["loss"] = loss, int(record["epoch"])
            self._save(checkpoints / "loss")
        if "val_accuracy" not in record:
            return
        score = record["val_accuracy"] - 1e-6 * loss
        if score > self.best["accuracy"]:
            self.best["accuracy"], self.kept["accuracy"] = score, int(record["epoch"])
            self._save(checkpoints / "accuracy")

    def _save(self, folder: Path) -> None:
        if self.ranks.is_first:
            self.candidate.save(folder)

    def _write_history(self, history: list[EpochRecord]) -> None:
        if not self.ranks.is_first:
            return
        write_text(self.folder / HISTORY, "".join(json.dumps(record) + "\n" for record in history))

    def finish(self) -> None:
        """Put the selected epoch into the model and into the folder."""
        select = self.config.select if self.model.config.num_classes > 1 else "loss"
        kept = self.kept[select]
        chosen = self.folder / CHECKPOINTS / select
        if self.ranks.is_first:
            self.model.load_state_dict(
                MagicFlow.load(chosen).state_dict() if kept else self.candidate.state_dict()
            )
        self.ranks.share_weights(self.model)
        kept = kept or self.config.epochs
        settings = dataclasses.asdict(self.config) | {"select": select}
        self.model.metadata["training"] = settings | {"kept_epoch": kept}
        self.model.eval()
        if self.ranks.is_first:
            self.model.save(self.folder)
