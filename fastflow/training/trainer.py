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
from lightning_fabric import Fabric
from torch import Tensor

from fastflow._files import write_text
from fastflow.data.slices import SliceSet
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.training import objective as objectives
from fastflow.training.batches import iterate_batches
from fastflow.training.config import TrainConfig as TrainConfig
from fastflow.training.metrics import SampleMean, evaluate_accuracy
from fastflow.training.metrics import evaluate_bits_per_dim as evaluate_bits_per_dim
from fastflow.training.metrics import middle_slices as middle_slices

EpochRecord = dict[str, float]


def train(
    model: MagicFlow,
    train_set: SliceSet,
    val_set: SliceSet | None,
    config: TrainConfig,
    folder: str | PathLike[str],
    watch: Mapping[str, SliceSet] | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
    device: str = "auto",
) -> list[EpochRecord]:
    """Train `model` in place and leave the best checkpoint in `folder`.

    Args:
        model: a new model, or one to train further.
        train_set: labelled 8-bit slices.
        val_set: labelled slices of other subjects that choose the checkpoint; None keeps the last epoch.
        config: how to train.
        folder: receives the model, ``history.jsonl`` (one JSON object per epoch) and, under ``checkpoints/``,
            the best epoch by validation loss and by validation accuracy.
        watch: further sets whose bits/dim are recorded each epoch and never influence anything.
        progress: called after each epoch with its record.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        One record per epoch: ``epoch``, ``seconds``, ``learning_rate``, ``train_bits_per_dim``, and with a
        validation set ``val_bits_per_dim``, ``val_accuracy`` (of single slices); ``<name>_bits_per_dim`` for
        each watched set.

    Raises:
        ValueError: a set is empty, has unknown labels or does not fit the model.
        FloatingPointError: the loss is no longer finite.
    """
    watch = dict(watch or {})
    for name, data in {"train_set": train_set, "val_set": val_set, **watch}.items():
        if data is not None:
            _check_set(name, data, model.config)
    with _cpu_threads(config.threads):
        run = _Run(model, config, Path(folder), device)
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


class _Run:
    """One training run: the state that `train` keeps between epochs."""

    def __init__(self, model: MagicFlow, config: TrainConfig, folder: Path, device: str) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.fabric = Fabric(accelerator=device, devices=1, precision=config.precision)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        self.best = {"accuracy": -math.inf, "loss": math.inf}
        self.kept = {"accuracy": 0, "loss": 0}
        self.negatives = objectives.HardNegatives(model.config.num_classes)
        folder.mkdir(parents=True, exist_ok=True)
        # The best epochs of an earlier run must not pass for those of this run.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        self.flow, self.optimizer = self.fabric.setup(model, optimizer)
        self.average: torch.optim.swa_utils.AveragedModel | None = None

    # -- epochs ----------------------------------------------------------------------------------------------

    def fit(
        self,
        train_set: SliceSet,
        val_set: SliceSet | None,
        watch: Mapping[str, SliceSet],
        progress: Callable[[EpochRecord], None] | None,
    ) -> list[EpochRecord]:
        steps = max(1, len(train_set) // self.config.batch_size)
        schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: self._rate(step / steps))
        history: list[EpochRecord] = []
        for epoch in range(self.config.epochs):
            start = time.perf_counter()
            record: EpochRecord = {"epoch": epoch + 1, "learning_rate": float(schedule.get_last_lr()[0])}
            record["train_bits_per_dim"] = self._train_epoch(train_set, steps, schedule)
            record |= self._evaluate(val_set, watch)
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            self._keep(record)
            self._write_history(history)
            if progress is not None:
                progress(record)
        return history

    def _rate(self, epoch: float) -> float:
        """Learning rate after `epoch` (fractional) epochs, as a fraction of the peak."""
        c = self.config
        if epoch < c.warmup_epochs:
            return 0.01 + 0.99 * epoch / c.warmup_epochs
        floor = min(1.0, c.min_learning_rate / c.learning_rate)
        done = min(1.0, (epoch - c.warmup_epochs) / max(c.epochs - c.warmup_epochs, 1e-9))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    def _train_epoch(
        self, data: SliceSet, steps: int, schedule: torch.optim.lr_scheduler.LRScheduler
    ) -> float:
        self.flow.train()
        mean = SampleMean(self.fabric)
        dequantize = self.model.config.dequantize == "uniform"
        for x, y in iterate_batches(data, steps, self.config, dequantize, self.generator, self.fabric.device):
            if not self.model.initialized:
                self.model.initialize(x, y)
            log_probs = self._step(x, y)
            schedule.step()
            self._update_average()
            mean.update(objectives.bits_per_dim(log_probs, self.model.config.num_dims))
        return mean.compute()

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        """One step of the optimizer; returns log p(x|y) (B,)."""
        loss, log_probs = self._loss(x, y)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {float(loss)}; lower learning_rate ({self.config.learning_rate}) "
                "or set dequantize"
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.flow, self.optimizer, max_norm=self.config.clip_norm)
        self.optimizer.step()
        return log_probs.detach()

    def _update_average(self) -> None:
        if not self.config.ema:
            return
        if self.average is None:
            # The copy is made after the first step, as it must find ActNorm initialised.
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema)
            self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=decay)
        self.average.update_parameters(self.model)

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        c, classes = self.config, self.model.config.num_classes
        if c.objective == "likelihood" or classes == 1:
            return objectives.likelihood_loss(self.flow, x, y)
        if c.objective == "pairwise":
            wrong = self.negatives.draw(y, self.generator)
            loss, lp, logistic = objectives.pairwise_loss(
                self.flow, x, y, wrong, c.contrast_weight, c.contrast_temperature
            )
            self.negatives.update(y, wrong, logistic)
            return loss, lp
        return objectives.hybrid_loss(self.flow, x, y, classes, c.contrast_weight, c.contrast_temperature)

    # -- evaluation and checkpoints --------------------------------------------------------------------------

    @property
    def candidate(self) -> MagicFlow:
        """The weights that are evaluated and kept: the average where there is one."""
        if self.average is None:
            return self.model
        module = self.average.module
        assert isinstance(module, MagicFlow)
        return module

    @torch.no_grad()
    def _evaluate(self, val_set: SliceSet | None, watch: Mapping[str, SliceSet]) -> EpochRecord:
        model = self.candidate.eval()
        record: EpochRecord = {}
        for name, data in (({"val": val_set} if val_set is not None else {}) | dict(watch)).items():
            record[f"{name}_bits_per_dim"] = evaluate_bits_per_dim(model, *middle_slices(data))
        if val_set is not None:
            record["val_accuracy"] = evaluate_accuracy(model, *middle_slices(val_set), self.fabric)
        return record

    def _keep(self, record: EpochRecord) -> None:
        """Save the epoch where it is the best so far; among equal accuracies the lower loss is the better."""
        checkpoints = self.folder / "checkpoints"
        loss = record.get("val_bits_per_dim")
        if loss is None:
            return
        if loss < self.best["loss"]:
            self.best["loss"], self.kept["loss"] = loss, int(record["epoch"])
            self.candidate.save(checkpoints / "loss")
        score = record["val_accuracy"] - 1e-6 * loss
        if score > self.best["accuracy"]:
            self.best["accuracy"], self.kept["accuracy"] = score, int(record["epoch"])
            self.candidate.save(checkpoints / "accuracy")

    def _write_history(self, history: list[EpochRecord]) -> None:
        write_text(self.folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in history))

    def finish(self) -> None:
        """Put the selected epoch into the model and into the folder."""
        kept = self.kept[self.config.select]
        chosen = self.folder / "checkpoints" / self.config.select
        self.model.load_state_dict(
            MagicFlow.load(chosen).state_dict() if kept else self.candidate.state_dict()
        )
        kept = kept or self.config.epochs
        self.model.metadata["training"] = dataclasses.asdict(self.config) | {"kept_epoch": kept}
        self.model.eval().save(self.folder)
