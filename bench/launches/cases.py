"""The cases that are counted: both tasks of the paper's model, at the sizes of the paper."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bench.fake_gpu.tensors import CLASSES, DEVICE, build_model, fake_gpu, to_fake_gpu
from bench.fake_gpu.training import captured_step
from bench.launches.counter import LaunchCounter
from fastflow import FlowConfig, MagicFlow
from fastflow.models.sampling import Sampler
from fastflow.models.scoring import LabelScorer
from fastflow.training.config import TrainConfig
from fastflow.training.objective import likelihood_loss

BATCH = 16
TASKS = ("classification", "generation")


class Case(NamedTuple):
    """One case: what runs, of which task, and in which form."""

    task: str
    work: str
    form: str = "float32"

    @property
    def name(self) -> str:
        """The name in the table."""
        return " ".join((self.task, self.work, self.form))


CASES = {
    case.name: case
    for task in TASKS
    for case in (
        Case(task, "training step"),
        Case(task, "training"),
        Case(task, "training", "bfloat16"),
        Case(task, "training", "reversible"),
        Case(task, "sample"),
        Case(task, "sampler"),
        Case(task, "scoring"),
    )
}


@contextlib.contextmanager
def _prepared(case: Case) -> Iterator[tuple[MagicFlow, LaunchCounter]]:
    config = FlowConfig.paper(CLASSES, case.task, reversible=case.form == "reversible")
    model = build_model(config)
    with fake_gpu(), LaunchCounter() as counter:
        to_fake_gpu(model)
        counter.clear()
        yield model, counter


def _training(case: Case) -> LaunchCounter:
    with _prepared(case) as (model, counter):
        x, y = _batch(model)
        model.train()
        counter.clear()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case.form == "bfloat16"):
            loss, _ = likelihood_loss(model, x, y)
        counter.direction = "backward"
        loss.backward()
    return counter


def _training_step(case: Case) -> LaunchCounter:
    counter = LaunchCounter()
    training = TrainConfig(batch_size=BATCH, ema=0.97)
    with captured_step(FlowConfig.paper(CLASSES, case.task), training, counter) as function, counter:
        # The first call makes the state of the optimizer and the average.
        function()
        counter.clear()
        counter.direction = "forward"
        function()
    return counter


def _sample(case: Case) -> LaunchCounter:
    with _prepared(case) as (model, counter):
        _, y = _batch(model)
        model.eval()
        counter.clear()
        model.sample(y)
    return counter


def _sampler(case: Case) -> LaunchCounter:
    with _prepared(case) as (model, counter):
        _, y = _batch(model)
        sampler = Sampler(model.eval(), engine="eager")
        counter.clear()
        sampler(y)
    return counter


def _scoring(case: Case) -> LaunchCounter:
    with _prepared(case) as (model, counter):
        x, _ = _batch(model)
        scorer = LabelScorer(model.eval(), engine="eager", max_rows=BATCH * CLASSES)
        counter.clear()
        scorer.score(x)
    return counter


def _batch(model: MagicFlow) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (BATCH, *model.config.input_shape)
    return torch.empty(shape, device=DEVICE), torch.zeros(BATCH, dtype=torch.int64, device=DEVICE)


WORKS: dict[str, Callable[[Case], LaunchCounter]] = {
    "training step": _training_step,
    "training": _training,
    "sample": _sample,
    "sampler": _sampler,
    "scoring": _scoring,
}


def count(case: Case) -> LaunchCounter:
    """The launches of a case."""
    return WORKS[case.work](case)
