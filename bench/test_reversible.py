"""Reversible training against keeping and checkpointing activations.

Run it with ``pytest bench/test_reversible.py --benchmark-only``.

A training step (forward and backward, dropout on) of couplings at one scale, 8 and 24 steps, in three modes:
"normal" keeps everything; "checkpoint" wraps each conditioner in `torch.utils.checkpoint` (non-reentrant, its
random state replayed); "reversible" is ``FlowConfig(reversible=True)``. Each mode runs in a process of its
own for the memory figures, in which freed memory goes back to the system at once; times come from one
process, one mode after the other within a round, and `ratio` compares medians with the normal mode's.

`extra_info`: `kept_mib`, the peak of what autograd holds (`torch.autograd.graph.saved_tensors_hooks`,
parameters and their views left out, each memory once), inner graphs of the backward pass included;
`resident_mib`, the growth of the process's peak resident memory over the step, gradients of parameters
allocated before; and ratios to 8 steps and to the normal mode.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastflow import FlowConfig, MagicFlow

# glibc then returns what is freed, so that resident memory is memory in use.
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
MODES = ("normal", "checkpoint", "reversible")
# A case is (C, H, W), batch and widths of the paper's steps 5 to 7.
CASES = {"classification": ((4, 92, 92), 8, (16, 32, 32)), "generation": ((4, 46, 46), 2, (16, 32, 32))}


def build(task: str, steps: int, mode: str) -> tuple[MagicFlow, Tensor, Tensor]:
    """A model of equal steps, images and labels."""
    torch.manual_seed(0)
    shape, batch, widths = CASES[task]
    config = FlowConfig(
        num_classes=7, input_shape=shape, task=task,
        masks=("checkerboard",) * steps, widths=(widths,) * steps, reversible=mode == "reversible",
    )  # fmt: skip
    model = MagicFlow(config)
    x = torch.rand(batch, *shape) * 2 - 1
    model.initialize(x)
    if mode == "checkpoint":
        for step in model.steps:
            for net in step.coupling.conditioners:
                net.encode = functools.partial(checkpoint, net.encode, use_reentrant=False)
    return model.train(), x, torch.arange(batch) % 7


class Kept:
    """Bytes that autograd holds, now and at most; memory that several tensors share counts once."""

    def __init__(self, model: MagicFlow) -> None:
        self.own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        self.users: dict[int, int] = {}
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        return tensor if storage.data_ptr() in self.own else Held(self, tensor)

    @staticmethod
    def unpack(held: Any) -> Tensor:
        return held.tensor if isinstance(held, Held) else held


class Held:
    """A tensor that autograd holds, for as long as it does."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.kept, self.tensor, self.address, self.size = kept, tensor, storage.data_ptr(), storage.nbytes()
        kept.users[self.address] = kept.users.get(self.address, 0) + 1
        kept.bytes += self.size * (kept.users[self.address] == 1)
        kept.peak = max(kept.peak, kept.bytes)

    def __del__(self) -> None:
        self.kept.users[self.address] -= 1
        self.kept.bytes -= self.size * (self.kept.users[self.address] == 0)


def training_step(model: MagicFlow, x: Tensor, y: Tensor) -> None:
    """Forward and backward; gradients are overwritten, not reallocated."""
    model.zero_grad(set_to_none=False)
    torch.manual_seed(1)
    (-model.log_prob(x, y).mean()).backward()


def _resident(field: str) -> int:
    """Resident bytes of this process, by the system's name of the field: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(task: str, steps: int, mode: str) -> dict[str, float]:
    """Kept and resident MiB of a training step, to be called in a fresh process."""
    model, x, y = build(task, steps, mode)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    small = {"x": x[:1], "y": y[:1]}
    # Libraries allocate their own workspaces once.
    training_step(model, **small)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    training_step(model, x, y)
    grown = _resident("VmHWM") - before
    kept = Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        training_step(model, x, y)
    return {"kept_mib": kept.peak / 2**20, "resident_mib": grown / 2**20}


@functools.cache
def measured(task: str, steps: int, mode: str) -> dict[str, float]:
    """`memory` in a process of its own."""
    call = f"memory({task!r}, {steps}, {mode!r})"
    code = f"import json; from bench.test_reversible import memory; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | RETURN_MEMORY,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@functools.cache
def seconds(task: str, steps: int, rounds: int = 5) -> dict[str, float]:
    """Median seconds of a step in each mode, interleaved."""
    works: dict[str, Callable[[], None]] = {}
    for mode in MODES:
        works[mode] = functools.partial(training_step, *build(task, steps, mode))
        works[mode]()
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for _ in range(rounds):
        for mode, work in works.items():
            start = time.perf_counter()
            work()
            times[mode].append(time.perf_counter() - start)
    return {mode: sorted(values)[rounds // 2] for mode, values in times.items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("steps", [8, 24])
@pytest.mark.parametrize("task", list(CASES))
def test_training_step(benchmark, task, steps, mode):
    benchmark.group = f"{task} {steps} steps"
    model, x, y = build(task, steps, mode)
    benchmark.pedantic(training_step, args=(model, x, y), rounds=1, warmup_rounds=1)
    here, few, normal = measured(task, steps, mode), measured(task, 8, mode), measured(task, steps, "normal")
    times = seconds(task, steps)
    benchmark.extra_info |= here | {
        "ratio": times[mode] / times["normal"],
        "kept_over_8_steps": here["kept_mib"] / few["kept_mib"],
        "resident_over_8_steps": here["resident_mib"] / few["resident_mib"],
        "normal_over_kept": normal["kept_mib"] / here["kept_mib"],
        "normal_over_resident": normal["resident_mib"] / here["resident_mib"],
        "batch": len(x),
        "threads": torch.get_num_threads(),
        "config": {"input_shape": str(model.config.input_shape), "widths": str(model.config.widths)},
    }
