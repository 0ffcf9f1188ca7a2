"""A step of training: eager, captured, reversible and in micro-batches, beside plain ATen.

Run it with ``pytest bench/test_training.py --benchmark-only``; it takes less than a minute on two cores.

A step is a `TrainingStep` with augmentation, forward and backward pass, clipping, Adam and the average of the
weights, on the demo layout with random weights. "aten" is the same step with the reference backend, whose ops
are the definitions in plain ATen; "captured" replays the step as a CUDA graph, and is there on a GPU only. No
training step is compiled by Inductor, so that there is no such row. Times come from one process, one mode
after the other within a round; `ratio` compares medians with those of "aten".

`extra_info`: `ratio`; `peak_mib`, the most that tensors made in a step hold at one time (of "captured" the
graph's own memory, which was taken before, is not in it), and `peak_ratio`.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable

import pytest
import torch

from bench.measuring import DEVICE, device_name, peak_mib, randomize, synchronised
from fastflow import FlowConfig, MagicFlow
from fastflow.kernels import set_backend
from fastflow.training.config import TrainConfig
from fastflow.training.step import TrainingStep

CLASSES, BATCH, ROUNDS, WARM_UPS = 7, 4, 3, 4
MODES = ("aten", "eager", "captured", "reversible", "accumulate 2")


@functools.cache
def step_of(mode: str) -> Callable[[], None]:
    """A function that takes a step in a mode, and has taken its first ones."""
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.demo(CLASSES, reversible=mode == "reversible")).to(DEVICE)
    randomize(model)
    config = TrainConfig.demo(
        batch_size=BATCH,
        objective="likelihood",
        accumulate=2 if mode == "accumulate 2" else 1,
        engine="cuda_graph" if mode == "captured" else "eager",
    )
    step = TrainingStep(model.train(), config, torch.Generator().manual_seed(0))
    images = torch.randint(256, (BATCH, *model.config.input_shape), dtype=torch.uint8)
    labels = torch.arange(BATCH) % CLASSES

    def take() -> None:
        with backend_of(mode):
            step(images, labels)

    for _ in range(WARM_UPS if DEVICE == "cuda" else 1):
        take()
    return synchronised(take)


@contextlib.contextmanager
def backend_of(mode: str):
    """A block in which ops run as a mode says."""
    set_backend("reference" if mode == "aten" else "auto")
    try:
        yield
    finally:
        set_backend("auto")


@functools.cache
def measured() -> dict[str, tuple[float, float]]:
    """(median seconds, peak in MiB) of each mode, interleaved."""
    modes = [mode for mode in MODES if mode != "captured" or DEVICE == "cuda"]
    steps = {mode: step_of(mode) for mode in modes}
    peaks = {mode: peak_mib(step) for mode, step in steps.items()}
    times: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(ROUNDS):
        for mode, step in steps.items():
            start = time.perf_counter()
            step()
            times[mode].append(time.perf_counter() - start)
    return {mode: (sorted(times[mode])[ROUNDS // 2], peaks[mode]) for mode in modes}


@pytest.mark.parametrize("mode", MODES)
def test_training_step(benchmark, mode):
    if mode == "captured" and DEVICE != "cuda":
        pytest.skip("a CPU captures no step")
    benchmark.group = "training step"
    seconds, peak = measured()[mode]
    plain_seconds, plain_peak = measured()["aten"]
    benchmark.pedantic(step_of(mode), rounds=1)
    benchmark.extra_info |= {
        "seconds": seconds,
        "ratio": seconds / plain_seconds,
        "peak_mib": peak,
        "peak_ratio": peak / plain_peak,
        "batch": BATCH,
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }
