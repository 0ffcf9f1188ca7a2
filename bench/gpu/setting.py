"""Models, images and clocks that the items share."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.measuring import DEVICE, synchronised
from fastflow import FlowConfig, MagicFlow, kernels

TASKS = ("classification", "generation")
CLASSES, CALLS = 7, 5


class Setting(NamedTuple):
    """The preset and the number of labels of all models."""

    preset: str
    classes: int

    def model(self, task: str) -> MagicFlow:
        """A preset with random weights on the device, in evaluation mode; the same at every call."""
        torch.manual_seed(0)
        model = MagicFlow(FlowConfig.preset(self.preset, self.classes, task=task))
        randomize(model)
        model.to(DEVICE).initialize(images(model, 8))
        return model.eval()


def randomize(model: MagicFlow) -> None:
    """Give weights to heads and films, which start at zero; the 1x1 convolutions stay as they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "conv.lower" not in name and "conv.upper" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter) / parameter[0].numel() ** 0.5)


def images(model: MagicFlow, count: int) -> Tensor:
    """Random images in [-1, 1], the same at every call."""
    shape = (count, *model.config.input_shape)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(DEVICE)


def labels(model: MagicFlow, count: int) -> Tensor:
    """Labels that cycle through the classes."""
    return torch.arange(count, device=DEVICE) % model.config.num_classes


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """A block in which a backend runs the ops."""
    before = kernels.get_backend()
    kernels.set_backend(name)
    try:
        yield
    finally:
        kernels.set_backend(before)


def median(work: Callable[[], object], warm_ups: int = 2) -> float:
    """Median seconds of a call that is waited for."""
    run, times = synchronised(work), []
    for _ in range(CALLS + warm_ups):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    # Kernels compile, graphs are captured and allocations settle in the first calls.
    return statistics.median(times[warm_ups:])
