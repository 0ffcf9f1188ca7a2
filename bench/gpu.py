"""A GPU in a few minutes: errors, gradients and images/s of the whole model.

``python -m bench.gpu [PRESET] [EXPORT...]``

For both tasks of a preset (`paper` by default), 7 labels, random weights: log-odds of the reference, of the
kernels and of the scorer's engines against the model in float64 (TF32 off), the error of inverse(forward(x)),
gradients of kernels against those of the reference, and images/s of scoring, sampling and training steps,
each the median of calls that were waited for. EXPORT are folders of `fastflow export`: images/s of an
`OnnxScorer` on CUDA with and without CUDA graphs, and log-odds against its CPU.

Without a GPU everything runs on the CPU, kernels as their references, which tests the script and measures
nothing.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bench.measuring import DEVICE, device_name, synchronised
from fastflow import FlowConfig, MagicFlow, kernels
from fastflow.models.scoring import LabelScorer

CLASSES = 7
CALLS = 5
BATCHES = {"classification": (1, 16, 64), "generation": (1, 16)}
# Each way to score is (backend, engine, precision). A CPU has no CUDA graphs.
WAYS = (
    ("reference", "eager", "float32"),
    ("auto", "eager", "float32"),
    ("auto", "eager", "mixed"),
    ("auto", "cuda_graph", "float32"),
    ("auto", "cuda_graph", "mixed"),
)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """A block in which a backend runs the ops."""
    before = kernels.get_backend()
    kernels.set_backend(name)
    try:
        yield
    finally:
        kernels.set_backend(before)


def attempt(name: str, work: Callable[[], str]) -> None:
    """Print what `work` says, or its failure, which must not hide the rest."""
    try:
        print(f"{name}: {work()}", flush=True)
    except Exception:
        print(f"{name}: FAILED\n{traceback.format_exc(limit=-3)}", flush=True)


def build(preset: str, task: str) -> MagicFlow:
    """A preset with random weights on the device, in evaluation mode."""
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.preset(preset, CLASSES, task=task))
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
    """Random images, the same at every call."""
    shape = (count, *model.config.input_shape)
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(DEVICE)


def log_odds_error(got: Tensor, want: Tensor) -> float:
    """The largest error of a log-odds of any two labels, in nats."""
    error = got.double() - want.double()
    return float((error.max(dim=1).values - error.min(dim=1).values).max())


def median(work: Callable[[], object], calls: int = CALLS) -> float:
    """Median seconds of `calls` calls."""
    run, times = synchronised(work), []
    for _ in range(calls + 2):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    # Kernels compile and allocations settle in the first two calls.
    return statistics.median(times[2:])


def errors(model: MagicFlow, task: str, count: int) -> None:
    """Print the errors of every way to score, against the model in float64."""
    x = images(model, count)
    y = torch.arange(count, device=DEVICE) % CLASSES
    with torch.no_grad(), backend("reference"):
        want = copy.deepcopy(model).double().log_prob_all(x.double())

    def log_prob(name: str) -> str:
        with torch.no_grad(), backend(name):
            z, _ = model(x, y)
            back = float((model.inverse(z, y) - x).abs().max())
            return f"log-odds {log_odds_error(model.log_prob_all(x), want):.2e} nats, inverse {back:.2e}"

    def scorer(engine: str, precision: str) -> str:
        scores = LabelScorer(model, precision, engine)
        first, again = scores(x), scores(x)
        error, same = log_odds_error(first, want), torch.equal(first, again)
        return f"log-odds {error:.2e} nats, the same bits again {same}"

    for name in ("reference", "auto"):
        attempt(f"{task}, {name}", lambda name=name: log_prob(name))
    for _, engine, precision in ways()[1:]:
        attempt(
            f"{task}, scorer {engine} {precision}",
            lambda engine=engine, precision=precision: scorer(engine, precision),
        )
    attempt(f"{task}, gradients", lambda: gradients(model, x, y))


def gradients(model: MagicFlow, x: Tensor, y: Tensor) -> str:
    """Compare gradients of the kernels with those of the reference."""
    found = {}
    for name in ("reference", "auto"):
        with backend(name):
            model.zero_grad()
            (-model.log_prob(x, y).mean() / model.config.num_dims).backward()
            found[name] = {k: p.grad.double() for k, p in model.named_parameters() if p.grad is not None}
    want = {k: g for k, g in found["reference"].items() if float(g.norm()) > 1e-6}
    worst = max(float((found["auto"][k] - g).norm() / g.norm()) for k, g in want.items())
    return f"kernels differ from the reference by at most {worst:.2e} of a parameter's norm"


def ways() -> Sequence[tuple[str, str, str]]:
    """Those of `WAYS` that the device has."""
    return [way for way in WAYS if DEVICE == "cuda" or way[1] != "cuda_graph"]


def speed(model: MagicFlow, task: str) -> None:
    """Print images per second of scoring, training steps and sampling."""

    def score(batch: int, way: tuple[str, str, str]) -> str:
        with backend(way[0]):
            scorer, x = LabelScorer(model, way[2], way[1]), images(model, batch)
            return f"{batch / median(lambda: scorer(x)):.1f} images/s"

    def step(x: Tensor, y: Tensor) -> None:
        model.zero_grad()
        (-model.log_prob(x, y).mean() / model.config.num_dims).backward()

    def train(name: str) -> str:
        x, y = images(model, 16), torch.arange(16, device=DEVICE) % CLASSES
        with backend(name):
            if DEVICE == "cuda":
                torch.cuda.reset_peak_memory_stats()
            rate = 16 / median(lambda: step(x, y))
            peak = f", peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if DEVICE == "cuda" else ""
            sample = 16 / median(lambda: model.sample(y))
        return f"training step {rate:.1f} images/s{peak}; sampling {sample:.1f} images/s"

    for batch in BATCHES[task]:
        for way in ways():
            attempt(
                f"{task}, {batch} images, {' '.join(way)}", lambda batch=batch, way=way: score(batch, way)
            )
    for name in ("reference", "auto"):
        attempt(f"{task}, 16 images, {name}", lambda name=name: train(name))


def exports(folder: str) -> None:
    """Print images per second and errors of an export."""
    from fastflow.export.runtime import OnnxScorer

    def compare(graph: bool) -> str:
        scorer, cpu = OnnxScorer(folder, DEVICE, cuda_graph=graph), OnnxScorer(folder, "cpu")
        x = (np.random.default_rng(1).random((16, *cpu.input_shape)) * 2 - 1).astype(np.float32)
        rates = [f"{n}: {n / median(lambda n=n: scorer.run(x[:n])):.1f}" for n in (1, 4, 16)]
        error = log_odds_error(torch.from_numpy(scorer.score(x[:8])), torch.from_numpy(cpu.score(x[:8])))
        providers = ", ".join(scorer.providers)
        return f"images/s {', '.join(rates)}; log-odds against its CPU {error:.2e} nats; {providers}"

    for graph in (False, True) if DEVICE == "cuda" else (False,):
        attempt(f"{folder}, cuda_graph={graph}", lambda graph=graph: compare(graph))


def main(arguments: Sequence[str]) -> None:
    preset, folders = (arguments[0] if arguments else "paper"), arguments[1:]
    torch.backends.cudnn.allow_tf32 = False
    print(f"{device_name()}, torch {torch.__version__}, preset {preset}, {CLASSES} labels, random weights")
    for task, count in (("classification", 4), ("generation", 2)):
        model = build(preset, task)
        errors(model, task, count)
        speed(model, task)
        del model
    for folder in folders:
        exports(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
