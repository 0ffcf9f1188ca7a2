"""The function that training captures in a CUDA graph, on fake tensors; import it after `load`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.fake_gpu.tensors import DEVICE, build_model, fake_gpu, to_fake_gpu
from fastflow import FlowConfig
from fastflow.training.config import TrainConfig
from fastflow.training.staging import Batch, empty_report
from fastflow.training.step import TrainingStep


class StubGraph:
    """Stands for a graph, so that the optimizer is made for a capture; nothing is captured."""

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> None:
        function()

    def replay(self) -> None:
        pass

    def successor(self) -> StubGraph:
        return StubGraph()


@contextlib.contextmanager
def captured_step(
    config: FlowConfig, training: TrainConfig, watch: TorchDispatchMode
) -> Iterator[Callable[[], None]]:
    """The function of one training step that `TrainingStep` captures; the block lies within `fake_gpu`.

    Args:
        config: of the model, which has seen data.
        training: how it is trained.
        watch: a mode that answers the questions of the optimizer for its settings.
    """
    model, batch_size = build_model(config), training.batch_size
    with fake_gpu():
        to_fake_gpu(model)
        autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=training.precision == "bf16-mixed")
        generator = torch.Generator().manual_seed(0)
        with watch:
            step = TrainingStep(model.train(), training, generator, autocast, graph=StubGraph())
        images = torch.zeros(batch_size, *config.input_shape, dtype=torch.uint8, device=DEVICE)
        sizes = (batch_size,), (batch_size,) if step.rivals is None else (batch_size, step.rivals)
        labels, wrong = (torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in sizes)
        report = empty_report(batch_size, torch.device(DEVICE), step.rivals or 1)
        yield partial(step.run, Batch(images, labels, wrong, report))
