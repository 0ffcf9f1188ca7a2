"""Training under the protocol: validation chooses everything, the test set is looked at once, at the end."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bench.baselines.classification.settings import Budget, Settings, rate_at
from fastflow.data.slices import SliceSet
from fastflow.evaluation.metrics import negative_log_likelihood
from fastflow.training.augment import AUGMENTS
from fastflow.training.batches import iterate_batches
from fastflow.training.config import TrainConfig

# Images of a pass without gradients.
SCORED_AT_ONCE = 64


@dataclasses.dataclass
class Trained:
    """A network after one learning rate's budget.

    Attributes:
        rate: the learning rate.
        score: the best evaluation's balanced accuracy on the validation volumes, and its negative NLL.
        weights: of the best evaluation.
        images: that training steps saw.
        seconds: of training and validation.
        cpu_seconds: the processor's time in them.
        train_seconds: of the training steps alone.
        evaluations: what each looked at.
    """

    rate: float
    score: tuple[float, float] = (-1.0, -np.inf)
    weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    train_seconds: float = 0.0
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values without the weights."""
        return {
            "rate": self.rate,
            "val_balanced_accuracy": self.score[0],
            "val_nll": -self.score[1],
            "images": self.images,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "train_seconds": self.train_seconds,
            "evaluations": self.evaluations,
        }


def search(
    build: Callable[[], nn.Module],
    train: SliceSet,
    val: SliceSet,
    settings: Settings,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[nn.Module, Trained, list[Trained]]:
    """Train with each learning rate and keep the one that is best on the validation volumes.

    Args:
        build: makes a network with its first weights; called with the same seed for each learning rate.
        train: labelled slices.
        val: labelled slices, which choose the evaluation and the learning rate.
        settings: how.
        say: told about each evaluation.

    Returns:
        The network in evaluation mode, its training, and the trainings of all learning rates.
    """
    torch.set_num_threads(settings.threads)
    best: Trained | None = None
    tried = []
    for rate in settings.rates:
        torch.manual_seed(settings.seed)
        model = build().to(memory_format=torch.channels_last)
        trained = train_network(model, train, val, settings, rate, say)
        tried.append(trained)
        if best is None or trained.score > best.score:
            best = trained
    assert best is not None
    model = build().to(memory_format=torch.channels_last)
    model.load_state_dict(best.weights)
    return model.eval(), best, tried


def train_network(
    model: nn.Module,
    train: SliceSet,
    val: SliceSet,
    settings: Settings,
    rate: float,
    say: Callable[[str], None] = lambda line: None,
) -> Trained:
    """Train a network with one learning rate until its budget is spent.

    Args:
        model: its weights are changed; maps (B, 1, H, W) in [-1, 1] to (B, K) logits.
        train: labelled slices.
        val: labelled slices.
        settings: how.
        rate: peak of the learning rate.
        say: told about each evaluation.

    Raises:
        FloatingPointError: a loss is not finite at the first step.
    """
    augment = AUGMENTS[settings.augment]
    moving = torch.Generator().manual_seed(settings.seed + 1)
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=rate)
    clock = _Clock(settings.budget)
    result = Trained(rate)
    without_gain = 0
    model.train()
    for images, labels in _batches(train, settings):
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_at(clock.progress(result.images))
        x = _to_unit_range(images)
        x = x if augment is None else augment(x, moving)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        if torch.isfinite(norm):
            optimizer.step()
        elif not result.images:
            raise FloatingPointError(f"the gradients of the first step are not finite: loss {float(loss)}")
        result.images += len(labels)
        done = clock.spent(result.images, len(labels))
        due = len(result.evaluations) + 1 <= clock.progress(result.images) * settings.evaluations
        if not (due or done):
            continue
        with clock.pause_training():
            gained = _evaluate(model, val, settings, result)
        without_gain = 0 if gained else without_gain + 1
        last = result.evaluations[-1]
        say(
            f"rate {rate:g}: {result.images} images, {clock.seconds:.0f} s, validation "
            f"{last['val_balanced_accuracy']:.3f} (NLL {last['val_nll']:.3f})"
        )
        if done or clock.progress(result.images) >= 1 or 0 < settings.patience <= without_gain:
            break
    result.seconds, result.cpu_seconds = clock.seconds, clock.cpu_seconds
    result.train_seconds = clock.train_seconds
    return result


class _Clock:
    """How much of a budget is spent."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._start, self._cpu_start, self._evaluating = time.perf_counter(), time.process_time(), 0.0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def cpu_seconds(self) -> float:
        return time.process_time() - self._cpu_start

    @property
    def train_seconds(self) -> float:
        return self.seconds - self._evaluating

    def progress(self, images: int) -> float:
        """The share of the budget that is spent."""
        kind = self._budget.kind
        spent = images if kind == "images" else self.seconds if kind == "seconds" else self.cpu_seconds
        return spent / self._budget.amount

    def spent(self, images: int, batch: int) -> bool:
        """Whether another batch would go beyond the budget."""
        if self._budget.kind == "images":
            return images + batch > self._budget.amount
        return self.progress(images) >= 1

    def pause_training(self) -> _Clock:
        return self

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self._evaluating += time.perf_counter() - self._began


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only, as is usual for all of these networks."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _batches(train: SliceSet, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without an end, drawn as the flow's trainer draws them."""
    config = TrainConfig(batch_size=settings.batch_size, sampler=settings.sampler, seed=settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    steps = max(1, len(train) // settings.batch_size)
    while True:
        yield from iterate_batches(train, steps, config, order)


def _to_unit_range(images: Tensor) -> Tensor:
    return images.float().mul_(2.0 / 255.0).sub_(1.0)


def _evaluate(model: nn.Module, val: SliceSet, settings: Settings, result: Trained) -> bool:
    """Look at the validation set; True where it is the best look so far, whose weights are kept then."""
    probabilities = volume_probabilities(model, val, settings.precision)
    model.train()
    labels = val.volume_labels
    right = probabilities.argmax(axis=1) == labels
    recall = [right[labels == k].mean() for k in np.unique(labels)]
    nll = negative_log_likelihood(labels, probabilities)
    score = (float(np.mean(recall)), -nll)
    result.evaluations.append({"images": result.images, "val_balanced_accuracy": score[0], "val_nll": nll})
    if score <= result.score:
        return False
    result.score, result.weights = score, copy.deepcopy(model.state_dict())
    return True


@torch.no_grad()
def volume_probabilities(model: nn.Module, data: SliceSet, precision: str = "32") -> NDArray[np.float64]:
    """(V, K): the mean over each volume's slices of the network's probabilities."""
    model.eval()
    rows = []
    for start in range(0, len(data), SCORED_AT_ONCE):
        x = _to_unit_range(torch.from_numpy(data.images[start : start + SCORED_AT_ONCE]))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(x.contiguous(memory_format=torch.channels_last))
        rows.append(logits.double().softmax(dim=1).numpy())
    each = np.concatenate(rows)
    total = np.zeros((len(data.paths), each.shape[1]))
    np.add.at(total, data.volumes, each)
    return total / np.bincount(data.volumes, minlength=len(total))[:, None]
