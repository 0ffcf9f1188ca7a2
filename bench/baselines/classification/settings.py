"""How a rival is trained: what is the same for all of them, and what a run changes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

# They are tried in turn, and the validation set decides.
RATES = (1e-4, 3e-4, 1e-3)
# Rows of a manifest with this split are kept out of the folds and are a test of their own.
KEPT_OUT = "unseen_head"
# The rate rises over this share of the budget, then falls along a cosine to this share of its peak.
WARMUP, FLOOR = 0.05, 0.01


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long each learning rate trains.

    Attributes:
        kind: ``"images"`` counts images that a training step saw, ``"seconds"`` the time of training and
            validation together, ``"cpu_seconds"`` that of the processor, whatever else runs.
        amount: how many.

    Raises:
        ValueError: the kind is unknown, or the amount is not positive.
    """

    kind: Literal["images", "seconds", "cpu_seconds"]
    amount: float

    def __post_init__(self) -> None:
        if self.kind not in ("images", "seconds", "cpu_seconds"):
            raise ValueError(f"kind must be images, seconds or cpu_seconds, got {self.kind!r}")
        if not self.amount > 0:
            raise ValueError(f"amount must be positive, got {self.amount!r}")

    def __str__(self) -> str:
        return f"{self.amount:g} {self.kind}"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a network is trained.

    Attributes:
        budget: of each learning rate.
        rates: the learning rates that are tried.
        batch_size: images of a step.
        weight_decay: of AdamW.
        clip_norm: largest gradient norm.
        augment: a name of `fastflow.training.augment.AUGMENTS`.
        sampler: ``"balanced"`` draws every class equally often, ``"shuffle"`` every image once an epoch.
        evaluations: how often the validation set is looked at, evenly over the budget.
        patience: stop after so many evaluations without a better one; 0 never stops early.
        seed: of weights, order, augmentation and dropout.
        threads: that compute.
        precision: ``"32"``, or ``"bf16"`` to compute products in bfloat16.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    budget: Budget
    rates: tuple[float, ...] = RATES
    batch_size: int = 32
    weight_decay: float = 0.05
    clip_norm: float = 1.0
    augment: str = "shift"
    sampler: str = "balanced"
    evaluations: int = 12
    patience: int = 0
    seed: int = 0
    threads: int = 1
    precision: str = "32"

    def __post_init__(self) -> None:
        if not self.rates or any(not rate > 0 for rate in self.rates):
            raise ValueError(f"rates must be positive and at least one, got {self.rates}")
        for name in ("batch_size", "evaluations", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}")
        if self.patience < 0:
            raise ValueError(f"patience must not be negative, got {self.patience!r}")
        if self.precision not in ("32", "bf16"):
            raise ValueError(f"precision must be 32 or bf16, got {self.precision!r}")
        if self.budget.kind == "images" and self.budget.amount < self.batch_size:
            raise ValueError(f"a budget of {self.budget} is less than one batch of {self.batch_size}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, without the budget and the seed, which have places of their own."""
        values = dataclasses.asdict(self) | {"rates": list(self.rates)}
        return {name: value for name, value in values.items() if name not in ("budget", "seed")}


def rate_at(progress: float) -> float:
    """The learning rate as a share of its peak after a share of the budget."""
    if progress < WARMUP:
        return FLOOR + (1.0 - FLOOR) * progress / WARMUP
    done = min(1.0, (progress - WARMUP) / (1.0 - WARMUP))
    return FLOOR + (1.0 - FLOOR) * 0.5 * (1.0 + math.cos(math.pi * done))
