"""How to train: the settings, and the recipes of the paper and of the demo."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from fastflow.errors import did_you_mean
from fastflow.training import objective as objectives
from fastflow.training.augment import AUGMENTS
from fastflow.training.phases import Moment, Phase, check_schedule, moment, phase_from_dict

Choice = Literal["accuracy", "loss", "both"]


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
        schedule: objectives in turn, in place of `objective`, each for a share of the steps; ``()`` is one
            phase of `objective`. `contrast_weight` and `contrast_temperature` hold where a phase has none.
        augment: ``"paper"``, ``"shift"`` (whole pixels only) or ``"none"``.
        sampler: ``"shuffle"``, or ``"balanced"`` to draw every class equally often.
        ema: decay of the exponential average of the weights that is evaluated and kept; 0 keeps the weights.
        select: which best checkpoint becomes the model: ``"accuracy"``, ``"loss"`` or ``"both"`` on the
            validation set (see `fastflow.training.selection`); of one class, the loss decides.
        select_tolerance: of ``"both"``, bits/dim above the lowest that are accepted, as a share of it.
        precision: ``"32-true"`` is float32 throughout: on a CUDA device, neither convolutions nor matrix
            products use TF32. ``"tf32"`` allows both to. ``"bf16-mixed"`` computes conditioners in bfloat16
            and the rest as ``"32-true"``; ``"64-true"`` computes in float64.
        engine: ``"auto"`` replays the training step as a CUDA graph on a CUDA device, and runs it eagerly
            elsewhere and where it cannot be captured; ``"eager"`` and ``"cuda_graph"`` ask for one of them.
        max_skipped: a step whose loss or gradients are not finite changes no weight; training stops after so
            many in a row.
        seed: of shuffling, augmentation, dequantisation and dropout.
        accumulate: micro-batches of a step, whose gradients are added up: each holds ``batch_size / devices /
            accumulate`` slices, which decides the memory that a step takes.
        devices: of a machine, with a process for each; None for one, or as many as torchrun has started.
        num_nodes: machines that take part.
        threads: of a CPU that training computes with, None for as many as torch has. Gradients are sums that
            ATen splits over threads: their last bits, and so the model that a seed gives, depend on it.
        calibration_volumes: training volumes of each class that are scored at most to fit the read-out; 0
            fits it to the validation volumes alone.

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
    schedule: tuple[Phase, ...] = ()
    augment: str = "paper"
    sampler: str = "shuffle"
    ema: float = 0.0
    select: Choice = "accuracy"
    select_tolerance: float = 0.01
    precision: str = "32-true"
    engine: str = "auto"
    max_skipped: int = 10
    seed: int = 0
    threads: int | None = None
    accumulate: int = 1
    devices: int | None = None
    num_nodes: int = 1
    calibration_volumes: int = 60

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(self.schedule))
        check_schedule(self.schedule)
        for name, allowed in (
            ("objective", objectives.OBJECTIVES),
            ("augment", tuple(AUGMENTS)),
            ("sampler", ("shuffle", "balanced")),
            ("select", ("accuracy", "loss", "both")),
            ("precision", ("32-true", "tf32", "bf16-mixed", "64-true")),
            ("engine", ("auto", "eager", "cuda_graph")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name, minimum in (
            ("epochs", 1),
            ("batch_size", 1),
            ("max_skipped", 1),
            ("accumulate", 1),
            ("num_nodes", 1),
            ("warmup_epochs", 0),
            ("contrast_weight", 0),
            ("select_tolerance", 0),
            ("calibration_volumes", 0),
        ):
            if getattr(self, name) < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {getattr(self, name)!r}")
        for name in ("threads", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {value!r}")
        for name in ("learning_rate", "min_learning_rate", "clip_norm", "contrast_temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must lie in [0, 1), got {self.ema!r}")

    def rate(self, epoch: float) -> float:
        """Learning rate after `epoch` (fractional) epochs, as a fraction of the peak."""
        if epoch < self.warmup_epochs:
            return 0.01 + 0.99 * epoch / self.warmup_epochs
        floor = min(1.0, self.min_learning_rate / self.learning_rate)
        done = min(1.0, (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9))
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * done))

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases of the training, each with its weight and temperature."""
        return tuple(
            dataclasses.replace(
                phase,
                weight=self.contrast_weight if phase.weight is None else phase.weight,
                temperature=self.contrast_temperature if phase.temperature is None else phase.temperature,
            )
            for phase in self.schedule or (Phase(self.objective),)
        )

    def moment(self, step: int, steps: int) -> Moment:
        """What a step, counted from 0, of so many steps of the whole training does."""
        return moment(self.phases, step, steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """Settings from the JSON form of `dataclasses.asdict`.

        Raises:
            ValueError: a key is unknown, for which the nearest is offered, or a field is out of range.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(
                    f"{name!r} is no setting of training{did_you_mean(name, known)}; there are "
                    f"{', '.join(known)}"
                )
        phases = [
            phase if isinstance(phase, Phase) else phase_from_dict(phase)
            for phase in values.get("schedule", ())
        ]
        return cls(**{**values, "schedule": tuple(phases)})

    @classmethod
    def demo(cls, **changes: Any) -> TrainConfig:
        """A recipe for minutes instead of days.

        Its classes are balanced, its weights averaged, its pairwise term is light, and its shifts are of
        whole pixels. On the demo archive, the likelihood hardly moves with a pairwise weight of 0.5 and more
        (per nat, the term then outweighs bits/dim by two orders), and the classes separate late with 0.03.
        Rotations interpolate, and so blur the very grain by which scanners differ.

        One thread computes, as the ops are so small that two are no faster on an idle machine. Beside another
        busy process, a step would take two threads four times as long: they spin while they wait.
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
            "threads": 1,
        }
        return cls(**{**values, **changes})

    @classmethod
    def paper(cls, task: str = "classification", **changes: Any) -> TrainConfig:
        """The published recipe for a task."""
        if task == "generation":
            changes = {
                "batch_size": 8,
                "learning_rate": 4e-4,
                "warmup_epochs": 5.0,
                "select": "loss",
                **changes,
            }
        return cls(**changes)
