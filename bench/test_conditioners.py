"""Couplings with their conditioners, the published form beside the package's.

Run it with ``pytest bench/test_conditioners.py --benchmark-only``.

One coupling of the paper preset, both halves, as a pass of the model runs it: labels and the step's input in,
the coupled x and its log-determinant out. A row's time is the package's; before each of its rounds the
published form (`bench/published.py`) does the same work with the same weights, so that drift of a shared
machine touches both. `extra_info` holds the published form's median, the median of the rounds' ratios
(published / package), each form's peak of allocated tensors in MiB, threads, versions. Passes: "forward" in
evaluation mode without gradients, "forward and backward" in training mode, dropout included, with gradients
for the parameters and for x. With one thread on a CPU (``OMP_NUM_THREADS=1``) times are the process's CPU
time, which other work on the machine touches less, else wall time. Absolute times are not comparable between
runs; the ratio is what to read.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bench import published
from bench.measuring import DEVICE, device_name, peak_mib, randomize, synchronised
from fastflow import FlowConfig, MagicFlow

CLASSES = 7
# A case is (task, step, batch). Step 1 is 1x184x184, step 14 is 4x46x46.
CASES = [("classification", 1, 4), ("classification", 14, 4), ("generation", 1, 1), ("generation", 14, 4)]
PASSES = ("forward", "forward and backward")
ROUNDS = 9
CLOCK = time.process_time if DEVICE == "cpu" and torch.get_num_threads() == 1 else time.perf_counter

pytestmark = pytest.mark.benchmark(timer=CLOCK)


def build(task: str, step: int) -> nn.Module:
    """The coupling of a step of the paper preset, with random weights, from a model of that step alone."""
    torch.manual_seed(0)
    paper = FlowConfig.paper(CLASSES, task=task)
    config = FlowConfig(
        num_classes=CLASSES,
        input_shape=paper.step_shapes[step],
        task=task,
        masks=(paper.masks[step],),
        widths=(paper.widths[step],),
    )
    coupling = MagicFlow(config).steps[0].coupling
    randomize(coupling, vector_scale=0.1)
    return coupling.to(DEVICE)


def package_form(
    coupling: nn.Module, x: torch.Tensor, y: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    def run():
        # As in `MagicFlow`, tables have a row per class, or per sample where there are fewer samples.
        few = len(y) < CLASSES
        labels = y if few else torch.arange(CLASSES, device=y.device)
        label_index = torch.arange(len(y), device=y.device) if few else y
        masked = x.masked_fill(~coupling.mask, 0.0)
        out, logdet, _ = coupling(x, masked, coupling.label_params(labels), label_index)
        return out, logdet

    return run


def published_form(coupling: nn.Module, x: torch.Tensor, y: torch.Tensor, leaves: list[torch.Tensor]):
    net, mask = coupling.conditioners[0], coupling.mask.to(x.dtype)
    heads = published.joined_heads(net)
    if heads is not None:
        # A published checkpoint holds the joined matrices as parameters.
        heads = tuple(head.detach().requires_grad_() for head in heads)
        leaves += heads

    def run():
        u, first = published.half_step(net, x, y, mask, coupling.bound, heads)
        out, second = published.half_step(net, u, y, 1.0 - mask, coupling.bound, heads)
        return out, first + second

    return run


def training(form, leaves: list[torch.Tensor], grad: torch.Tensor) -> Callable[[], None]:
    def run():
        out, logdet = form()
        torch.autograd.backward((out, logdet), (grad, torch.ones_like(logdet)))
        for leaf in leaves:
            leaf.grad = None

    return run


def evaluation(form) -> Callable[[], None]:
    def run():
        with torch.no_grad():
            form()

    return run


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    task, step, batch = request.param
    coupling = build(task, step)
    x = torch.randn(batch, *coupling.mask.shape, device=DEVICE)
    y = torch.arange(batch, device=DEVICE) % CLASSES
    return coupling, x, y


@pytest.mark.parametrize("passes", PASSES)
def test_coupling(benchmark, case, passes):
    coupling, x, y = case
    backward = passes == PASSES[1]
    coupling.train(backward)
    x = x.clone().requires_grad_(backward)
    with torch.no_grad():
        grad = torch.randn_like(x)
    leaves = [x, *coupling.parameters()]
    forms = package_form(coupling, x, y), published_form(coupling, x, y, leaves)
    package, baseline = (
        synchronised(training(form, leaves, grad) if backward else evaluation(form)) for form in forms
    )
    before: list[float] = []

    def time_baseline():
        start = CLOCK()
        baseline()
        before.append(CLOCK() - start)

    benchmark.group = passes
    benchmark.pedantic(package, setup=time_baseline, rounds=ROUNDS, warmup_rounds=2)
    if benchmark.stats is None:
        return
    after = benchmark.stats.stats.data
    before = before[-len(after) :]
    benchmark.extra_info |= {
        "published_seconds": statistics.median(before),
        "ratio": statistics.median(a / b for a, b in zip(before, after, strict=True)),
        "peak_mib": peak_mib(package),
        "published_peak_mib": peak_mib(baseline),
        "threads": torch.get_num_threads(),
        "device": device_name(),
        "torch": torch.__version__,
    }


@pytest.mark.parametrize("task", ["classification", "generation"])
def test_both_forms_agree(task):
    coupling = build(task, 14).eval()
    x = torch.randn(2, *coupling.mask.shape, device=DEVICE)
    y = torch.arange(2, device=DEVICE)
    with torch.no_grad():
        got, want = package_form(coupling, x, y)(), published_form(coupling, x, y, [])()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
