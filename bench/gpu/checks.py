"""Comparisons of numbers: kernels with float64, captured training steps with eager ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from bench.gpu.report import Figure, Key
from bench.gpu.setting import Setting, backend, images, labels
from bench.gpu.speed import Step
from bench.measuring import DEVICE
from fastflow import MagicFlow
from fastflow.numerics import float32_products
from fastflow.training.capture import WARM_UP_STEPS

REPLAYS = 3


def log_odds_error(got: Tensor, want: Tensor) -> float:
    """The largest error of a log-odds of any two labels, in nats."""
    error = got.double() - want.double()
    return float((error.max(dim=1).values - error.min(dim=1).values).max())


def errors(setting: Setting, task: str, count: int) -> Iterator[tuple[Key, Figure]]:
    """Errors of log-odds, inverse and gradients against the model in float64, without TF32."""
    model = setting.model(task)
    x, y = images(model, count), labels(model, count)
    wide = copy.deepcopy(model).double()
    with backend("reference"):
        with torch.no_grad():
            want = wide.log_prob_all(x.double())
        exact = _gradients(wide, x.double(), y)
    for name, engine in (("reference", "reference"), ("auto", "eager")):
        with backend(name), float32_products(tf32=False):
            with torch.no_grad():
                z, _ = model(x, y)
                back = float((model.inverse(z, y) - x).abs().max())
                error = log_odds_error(model.log_prob_all(x), want)
            found = _gradients(model, x, y)
        yield Key("error of log-odds", task, engine, batch=count), Figure(error, "nats")
        yield Key("error of inverse", task, engine, batch=count), Figure(back, "of [-1, 1]")
        worst = max(
            float((found[k].double() - g).norm() / g.norm()) for k, g in exact.items() if g.norm() > 1e-6
        )
        yield Key("error of gradients", task, engine, batch=count), Figure(worst, "of a parameter's norm")


def _gradients(model: MagicFlow, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (-model.log_prob(x, y).mean() / model.config.num_dims).backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def capture_bits(setting: Setting, task: str, batch: int) -> Iterator[tuple[Key, Figure]]:
    """Elements that differ between captured and eager steps, of loss, gradients and parameters."""
    engine = "cuda_graph" if DEVICE == "cuda" else "eager"
    before = torch.backends.cudnn.deterministic
    # Some sums of cuDNN have another order at every call.
    torch.backends.cudnn.deterministic = True
    try:
        states = []
        for name in ("eager", engine):
            model = setting.model(task).train()
            step = Step(model, name, "float32", batch)
            # Both runs draw the same random numbers.
            torch.manual_seed(1)
            states.append([_state(model, step) for _ in range(WARM_UP_STEPS + REPLAYS)][WARM_UP_STEPS:])
    finally:
        torch.backends.cudnn.deterministic = before
    for i, (eager, captured) in enumerate(zip(*states, strict=True)):
        differing = sum(int((a != b).sum()) for a, b in zip(eager, captured, strict=True))
        key = Key(f"differing bits, replay {i + 1}", task, engine, batch=batch)
        yield key, Figure(differing, "elements of loss, gradients and parameters")


def _state(model: MagicFlow, step: Step) -> list[Tensor]:
    step()
    values = [step.bits_per_dim()]
    for parameter in model.parameters():
        values.append(parameter.detach().cpu().clone())
        if parameter.grad is not None:
            values.append(parameter.grad.cpu().clone())
    return values
