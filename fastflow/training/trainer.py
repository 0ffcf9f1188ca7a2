"""The training loop, on Lightning Fabric: one process on a CPU, one or several devices, the same code.

Source of the defaults: the published recipe (Adam, linear warm-up from 1 %, cosine to 1e-5, gradient norm clipped at 1, best
checkpoint by validation loss and by validation accuracy).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from fastflow._files import write_text
from fastflow.data.slices import SliceSet
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.training import objective as objectives
from fastflow.training.augment import AUGMENTS

Choice = Literal["accuracy", "loss"]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the published recipe for classification.

    Attributes:
        epochs: passes over the training slices.
        batch_size: slices per step, over all devices.
        learning_rate: peak of the schedule.
        warmup_epochs: linear warm-up from 1 % of the peak; may be a fraction.
        min_learning_rate: end of the cosine.
        clip_norm: largest gradient norm.
        objective: ``"likelihood"``, ``"pairwise"`` or ``"hybrid"`` (see `fastflow.training.objective`).
        contrast_weight: weight of the discriminative term of the last two.
        contrast_temperature: nats of log-odds that count as one logit in it.
        augment: ``"paper"``, ``"shift"`` (whole pixels only) or ``"none"``.
        sampler: ``"shuffle"``, or ``"balanced"`` to draw every class equally often.
        ema: decay of the exponential average of the weights that is evaluated and kept; 0 keeps the weights themselves.
        select: which best checkpoint becomes the model: ``"accuracy"`` or ``"loss"`` on the validation set.
        precision: a Fabric precision, ``"32-true"`` or ``"bf16-mixed"``.
        seed: of shuffling, augmentation, dequantisation and dropout.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    epochs: int = 300
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_epochs: float = 8.0
    min_learning_rate: float = 1e-5
    clip_norm: float = 1.0
    objective: str = "likelihood"
    contrast_weight: float = 1.0
    contrast_temperature: float = 1.0
    augment: str = "paper"
    sampler: str = "shuffle"
    ema: float = 0.0
    select: Choice = "accuracy"
    precision: str = "32-true"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("objective", objectives.OBJECTIVES),
            ("augment", tuple(AUGMENTS)),
            ("sampler", ("shuffle", "balanced")),
            ("select", ("accuracy", "loss")),
            ("precision", ("32-true", "bf16-mixed", "64-true")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, minimum in (("epochs", 1), ("batch_size", 1), ("warmup_epochs", 0), ("contrast_weight", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "min_learning_rate", "clip_norm", "contrast_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema!r}")

    @classmethod
    def demo(cls, **changes: Any) -> TrainConfig:
        """A recipe for minutes instead of days: balanced classes, averaged weights, a light pairwise term, whole-pixel shifts.

        Tried on the demo archive: with a pairwise weight of 0.5 and more the likelihood hardly moves (per nat, the term then
        outweighs bits/dim by two orders), with 0.03 the classes separate late. Rotations interpolate, and so blur the very grain
        by which scanners differ.
        """
        values: dict[str, Any] = {
            "epochs": 7,
            "batch_size": 24,
            "learning_rate": 2e-3,
            "warmup_epochs": 0.2,
            "objective": "pairwise",
            "contrast_weight": 0.1,
            "contrast_temperature": 10.0,
            "augment": "shift",
            "sampler": "balanced",
            "ema": 0.97,
        }
        return cls(**{**values, **changes})

    @classmethod
    def paper(cls, task: str = "classification", **changes: Any) -> TrainConfig:
        """The published recipe for a task."""
        if task == "generation":
            changes = {"batch_size": 8, "learning_rate": 4e-4, "warmup_epochs": 5.0, "select": "loss", **changes}
        return cls(**changes)


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
        folder: receives the model, ``history.jsonl`` (one JSON object per epoch) and, under ``checkpoints/``, the best epoch by
            validation loss and by validation accuracy.
        watch: further sets whose bits/dim are recorded each epoch and never influence anything.
        progress: called after each epoch with its record.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.

    Returns:
        One record per epoch: ``epoch``, ``seconds``, ``learning_rate``, ``train_bits_per_dim``, and with a validation set
        ``val_bits_per_dim``, ``val_accuracy`` (of single slices); ``<name>_bits_per_dim`` for each watched set.

    Raises:
        ValueError: a set is empty, has unknown labels or does not fit the model.
        FloatingPointError: the loss is no longer finite.
    """
    watch = dict(watch or {})
    for name, data in {"train_set": train_set, "val_set": val_set, **watch}.items():
        if data is not None:
            _check_set(name, data, model.config)
    run = _Run(model, config, Path(folder), device)
    history = run.fit(train_set, val_set, watch, progress)
    run.finish()
    return history


def _check_set(name: str, data: SliceSet, config: FlowConfig) -> None:
    if len(data) == 0:
        raise ValueError(f"{name} has no slices")
    if tuple(data.images.shape[1:]) != config.input_shape:
        raise ValueError(f"{name} has images {tuple(data.images.shape[1:])}, but the model takes {config.input_shape}")
    if data.labels.min() < 0 or data.labels.max() >= config.num_classes:
        raise ValueError(f"{name} has labels from {data.labels.min()} to {data.labels.max()}, not 0 to {config.num_classes - 1}")


class _Run:
    """One training run: what `train` keeps between epochs."""

    def __init__(self, model: MagicFlow, config: TrainConfig, folder: Path, device: str) -> None:
        self.model, self.config, self.folder = model, config, folder
        self.fabric = Fabric(accelerator=device, devices=1, precision=config.precision)  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(config.seed)
        torch.manual_seed(config.seed)
        self.best = {"accuracy": -math.inf, "loss": math.inf}
        self.kept = {"accuracy": 0, "loss": 0}
        self.augment = AUGMENTS[config.augment]
        self.rivals = objectives.Rivals(model.config.num_classes)
        folder.mkdir(parents=True, exist_ok=True)
        # An earlier run's best epochs must not pass for this one's.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
        self.flow, self.optimizer = self.fabric.setup(model, optimizer)
        self.average: torch.optim.swa_utils.AveragedModel | None = None

    # -- epochs ---------------------------------------------------------------------------------------------------------

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

    def _train_epoch(self, data: SliceSet, steps: int, schedule: torch.optim.lr_scheduler.LRScheduler) -> float:
        self.flow.train()
        mean = MeanMetric().to(self.fabric.device)
        for x, y in self._batches(data, steps):
            if not self.model.initialized:
                self.model.initialize(x, y)
            loss, log_probs = self._loss(x, y)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss became {float(loss)}; lower learning_rate ({self.config.learning_rate}) or set dequantize"
                )
            self.optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
            self.fabric.clip_gradients(self.flow, self.optimizer, max_norm=self.config.clip_norm)
            self.optimizer.step()
            schedule.step()
            self._update_average()
            mean.update(objectives.bits_per_dim(log_probs.detach(), self.model.config.num_dims))
        return float(mean.compute())

    def _update_average(self) -> None:
        if not self.config.ema:
            return
        if self.average is None:
            # Not before the first step: the copy must find ActNorm initialised.
            decay = torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema)
            self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=decay)
        self.average.update_parameters(self.model)

    def _batches(self, data: SliceSet, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.from_numpy(data.labels)
        size = self.config.batch_size
        if self.config.sampler == "balanced":
            weights = 1.0 / torch.bincount(labels).clamp_min(1)[labels].double()
            order = torch.multinomial(weights, max(len(data), size), replacement=True, generator=self.generator)
        else:
            order = torch.randperm(len(data), generator=self.generator)
        for step in range(steps):
            index = order[step * size : (step + 1) * size]
            x = from_uint8(torch.from_numpy(data.images[index.numpy()]).to(self.fabric.device))
            if self.augment is not None:
                x = self.augment(x, self.generator)
            if self.model.config.dequantize == "uniform":
                x = objectives.dequantize(x, self.generator if x.device.type == "cpu" else None)
            yield x, labels[index].to(self.fabric.device)

    def _loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        c, classes = self.config, self.model.config.num_classes
        if c.objective == "likelihood" or classes == 1:
            return objectives.likelihood_loss(self.flow, x, y)
        if c.objective == "pairwise":
            wrong = self.rivals.draw(y, self.generator)
            loss, lp, logistic = objectives.pairwise_loss(self.flow, x, y, wrong, c.contrast_weight, c.contrast_temperature)
            self.rivals.update(y, wrong, logistic)
            return loss, lp
        return objectives.hybrid_loss(self.flow, x, y, classes, c.contrast_weight, c.contrast_temperature)

    # -- evaluation and checkpoints -------------------------------------------------------------------------------------

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
            images, labels = middle_slices(val_set)
            metric = MulticlassAccuracy(num_classes=model.config.num_classes, average="micro").to(self.fabric.device)
            for part, y in zip(
                np.array_split(images, -(-len(images) // 32)), np.array_split(labels, -(-len(images) // 32)), strict=True
            ):
                x = from_uint8(torch.from_numpy(part).to(self.fabric.device))
                metric.update(model.log_prob_all(x).argmax(dim=1), torch.from_numpy(y).to(self.fabric.device))
            record["val_accuracy"] = float(metric.compute())
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
        self.model.load_state_dict(MagicFlow.load(chosen).state_dict() if kept else self.candidate.state_dict())
        kept = kept or self.config.epochs
        self.model.metadata["training"] = dataclasses.asdict(self.config) | {"kept_epoch": kept}
        self.model.eval().save(self.folder)


def middle_slices(data: SliceSet) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The middle slice of each volume: (images (V, C, H, W), labels (V,)). Enough to watch a run by."""
    order = np.argsort(data.volumes, kind="stable")
    _, first, count = np.unique(data.volumes[order], return_index=True, return_counts=True)
    chosen = order[first + count // 2]
    return data.images[chosen], data.labels[chosen]


@torch.no_grad()
def evaluate_bits_per_dim(
    model: MagicFlow, images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any], batch_size: int = 64, seed: int = 0
) -> float:
    """Mean bits/dim of 8-bit slices under their own labels, with a seeded draw of the dequantisation noise the model uses.

    Args:
        model: the flow, in evaluation mode.
        images: (N, C, H, W) uint8.
        labels: (N,) integers.
        batch_size: images per pass.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for start in range(0, len(images), batch_size):
        x = from_uint8(torch.from_numpy(images[start : start + batch_size]))
        if model.config.dequantize == "uniform":
            x = objectives.dequantize(x, generator)
        y = torch.from_numpy(labels[start : start + batch_size])
        lp = model.log_prob(x.to(model.device), y.to(model.device))
        total += float(objectives.bits_per_dim(lp, model.config.num_dims).double().sum())
    return total / len(images)
