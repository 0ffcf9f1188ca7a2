"""Images per second of training, sampling and scoring, and the memory of training."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import torch

from bench.gpu.report import Figure, Key
from bench.gpu.setting import Setting, backend, images, labels, median
from bench.measuring import DEVICE
from fastflow import MagicFlow
from fastflow.models.sampling import Sampler
from fastflow.models.scoring import LabelScorer
from fastflow.numerics import float32_products
from fastflow.training.capture import WARM_UP_STEPS
from fastflow.training.config import TrainConfig
from fastflow.training.step import TrainingStep

ON_GPU = DEVICE == "cuda"
# Each way is a backend and an engine, under the name that the table has for it.
WAYS = {"reference": ("reference", "eager"), "eager": ("auto", "eager"), "cuda_graph": ("auto", "cuda_graph")}


def ways() -> list[str]:
    """Those of `WAYS` that the device has, the fastest first."""
    return [name for name in reversed(WAYS) if ON_GPU or name != "cuda_graph"]


class Step:
    """A training step on the same images again and again, from the host, with copies and reports.

    Args:
        model: in training mode.
        engine: of `TrainConfig`.
        precision: ``"float32"``, ``"tf32"`` or ``"bfloat16"``.
        batch: images.
    """

    def __init__(self, model: MagicFlow, engine: str, precision: str, batch: int) -> None:
        self._precision = precision
        config = TrainConfig(batch_size=batch, engine=engine)
        narrow = precision == "bfloat16"
        autocast = functools.partial(torch.autocast, DEVICE, torch.bfloat16, enabled=narrow)
        self._step = TrainingStep(model, config, torch.Generator().manual_seed(0), autocast)
        self._images = (127.5 * (images(model, batch) + 1)).to(torch.uint8).cpu()
        self._labels = labels(model, batch).cpu()

    def __call__(self) -> None:
        with float32_products(tf32=self._precision == "tf32"):
            self._step(self._images, self._labels)

    def bits_per_dim(self) -> torch.Tensor:
        """The sum over the samples since the last call; waits for the device."""
        return torch.tensor(self._step.take_totals().bits_per_dim)


def training(setting: Setting, task: str, batch: int, precision: str) -> Iterator[tuple[Key, Figure]]:
    """Whole steps: copies, augmentation, forward, backward, clipping, Adam."""
    for way in ways():
        name, engine = WAYS[way]
        model = setting.model(task).train()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        with backend(name):
            step = Step(model, engine, precision, batch)
            rate = batch / median(step, warm_ups=WARM_UP_STEPS + 2)
        key = Key("training", task, way, precision, batch)
        yield key, Figure(rate, "images/s")
        if ON_GPU:
            peak = torch.cuda.max_memory_allocated() / 2**20
            yield key._replace(item="peak memory of training"), Figure(peak, "MiB")


def sampling(setting: Setting, task: str, batch: int, precision: str) -> Iterator[tuple[Key, Figure]]:
    """A `Sampler` on a GPU's graphs and eagerly, and `MagicFlow.sample` of the reference."""
    model = setting.model(task)
    y = labels(model, batch)
    for way in ways():
        name, engine = WAYS[way]
        with backend(name):
            sampler = Sampler(model, precision, engine)
            rate = batch / median(functools.partial(sampler, y))
        yield Key("sampling", task, way, precision, batch), Figure(rate, "images/s")


def scoring(setting: Setting, task: str, batch: int, precision: str) -> Iterator[tuple[Key, Figure]]:
    """A `LabelScorer`: every image under every label."""
    model = setting.model(task)
    x = images(model, batch)
    for way in ways():
        name, engine = WAYS[way]
        with backend(name):
            scorer = LabelScorer(model, precision, engine)
            rate = batch / median(functools.partial(scorer, x))
        yield Key("scoring", task, way, precision, batch), Figure(rate, "images/s")


# -- the reference, compiled ---------------------------------------------------------------------------------


def compiled(setting: Setting, task: str, batch: int, seconds: float) -> Iterator[tuple[Key, Figure]]:
    """Forward and backward pass of the reference by `torch.compile`, in a process that is ended in time.

    Raises:
        RuntimeError: it failed.
    """
    code = f"from bench.gpu.speed import compile_reference\ncompile_reference({setting!r}, {task!r}, {batch})"
    code = f"from bench.gpu.setting import Setting\n{code}"
    key = Key("forward and backward", task, "compile", batch=batch)
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        yield key, Figure(float("nan"), "images/s", f"not compiled within {seconds:.0f} s")
        return
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    rate, took = json.loads(done.stdout.splitlines()[-1])
    yield key, Figure(rate, "images/s", f"compiled in {took:.0f} s")


def compile_reference(setting: Setting, task: str, batch: int) -> None:
    """Print images/s of the compiled reference and the seconds of its first step, as JSON."""
    model = setting.model(task).train()
    x, y = images(model, batch), labels(model, batch)
    with backend("reference"), float32_products(tf32=False):
        run = torch.compile(lambda x, y: -model.log_prob(x, y).mean() / model.config.num_dims)

        def step() -> None:
            model.zero_grad()
            run(x, y).backward()

        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
        print(json.dumps([batch / median(step), took]))
