"""Helpers of the benchmarks: random weights, synchronised work, peaks of memory, shares of the time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The name of the GPU, or ``"cpu"``."""
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def randomize(module: nn.Module, vector_scale: float = 0.05) -> None:
    """Move every parameter from its initial value: new heads are zero, and couplings the identity.

    Exponentials and gradients of an identity are not those of a trained coupling.

    Args:
        module: its parameters are changed in place.
        vector_scale: standard deviation of the noise of parameters with one dimension. That of the others
        follows from
            their size.
    """
    with torch.no_grad():
        for parameter in module.parameters():
            scale = vector_scale if parameter.ndim == 1 else 0.3 / parameter[0].numel() ** 0.5
            parameter.add_(scale * torch.randn_like(parameter))


def synchronised(work: Callable[[], object]) -> Callable[[], None]:
    """`work` that ends when the device is done with it."""

    def run() -> None:
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def peak_mib(work: Callable[[], object]) -> float:
    """The most MiB that tensors made by `work` hold at one time."""
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def share_of(words: str, work: Callable[[], object]) -> float:
    """Share of the time of `work` that ops whose name contains `words` take by themselves."""
    cuda = DEVICE == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as record:
        work()
    events = record.key_averages()
    times = [event.self_device_time_total if cuda else event.self_cpu_time_total for event in events]
    part = sum(time for event, time in zip(events, times, strict=True) if words in event.key)
    return part / max(1.0, sum(times))
