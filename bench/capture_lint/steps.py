"""The steps of training that are linted."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from bench.capture_lint.lint import CaptureLint, Finding, lint
from bench.fake_gpu.tensors import CLASSES
from bench.fake_gpu.training import captured_step
from fastflow import FlowConfig
from fastflow.training.config import TrainConfig
from fastflow.training.phases import Phase

TASKS = ("classification", "generation")
OBJECTIVES = {
    "likelihood": Phase("likelihood"),
    "pairwise": Phase("pairwise"),
    "hybrid": Phase("hybrid"),
    "rivals": Phase("hybrid", rivals=2),
}
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
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
    for case in (Case(*values) for values in itertools.product(TASKS, OBJECTIVES, PRECISIONS, (False, True)))
}


def findings(case: Case) -> dict[Finding, int]:
    """The findings of a case: whatever a graph cannot hold of it."""
    config = FlowConfig.preset(PRESET, CLASSES, task=case.task, reversible=case.reversible)
    training = TrainConfig(
        batch_size=BATCH,
        schedule=(OBJECTIVES[case.objective],),
        ema=0.9,
        precision=PRECISIONS[case.precision],
    )
    with captured_step(config, training, CaptureLint()) as function:
        return lint(function)
