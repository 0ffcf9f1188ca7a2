"""The functions that training captures, on fake tensors, for the lint."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import torch

from bench.capture_lint.lint import CaptureLint, Finding, lint
from bench.fake_gpu.tensors import CLASSES, DEVICE, build_model, fake_gpu, to_fake_gpu
from fastflow import FlowConfig
from fastflow.training.config import TrainConfig

TASKS = ("classification", "generation")
OBJECTIVES = ("likelihood", "pairwise", "hybrid")
# Findings do not depend on sizes, so small models stand for the paper's.
PRESET, BATCH = "tiny", 4


class Case(NamedTuple):
    """A training step: task, objective, precision, and whether activations are kept."""

    task: str
    objective: str
    precision: str
    reversible: bool

    @property
    def name(self) -> str:
        """Words for people."""
        kept = "reversible" if self.reversible else "ordinary"
        return f"{self.task} {self.objective} {self.precision} {kept}"


CASES = {
    case.name: case
    for case in (
        Case(*values)
        for values in itertools.product(TASKS, OBJECTIVES, ("float32", "bfloat16"), (False, True))
    )
}


def missing() -> str:
    """The reason why there is no step to lint; empty where there is one."""
    return "" if find_spec("fastflow.training.step") else "fastflow.training.step is not there yet"


class StubGraph:
    """Stands for a graph, so that the optimizer is made for a capture; nothing is captured."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> None:
        function()

    def replay(self) -> None:
        pass


def captured_function(case: Case) -> Iterator[Callable[[], None]]:
    """The function that `TrainingStep` captures for a case, within `fake_gpu`; the next item ends that."""
    from fastflow.training import step as steps
    from fastflow.training.staging import Batch, empty_report

    config = FlowConfig.preset(PRESET, CLASSES, task=case.task, reversible=case.reversible)
    model = build_model(config)
    training = TrainConfig(
        batch_size=BATCH, objective=case.objective, ema=0.9, precision=_PRECISIONS[case.precision]
    )
    with fake_gpu():
        to_fake_gpu(model)
        autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=case.precision == "bfloat16")
        generator, graph = torch.Generator().manual_seed(0), StubGraph()
        # The optimizer asks for the learning rate, which the lint answers.
        with CaptureLint():
            step = steps.TrainingStep(model.train(), training, generator, autocast, graph=graph)
        images = torch.zeros(BATCH, *config.input_shape, dtype=torch.uint8, device=DEVICE)
        labels, wrong = (torch.zeros(BATCH, dtype=torch.int64, device=DEVICE) for _ in range(2))
        batch = Batch(images, labels, wrong, empty_report(BATCH, torch.device(DEVICE)))
        yield partial(step.run, batch)


_PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}


def findings(case: Case) -> dict[Finding, int]:
    """What a graph cannot hold of a case."""
    for function in captured_function(case):
        return lint(function)
    raise AssertionError
