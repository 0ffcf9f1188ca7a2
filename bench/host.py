"""CPU time that the host spends on each op, without a GPU: ``python -m bench.host [--csv FILE]``.

Triton's own CUDA driver runs on a libcuda whose launches do nothing (`bench/stub_driver.py`), so that what is
left of an op is the host's part: checks, autograd, `torch.library`, launch plans, Triton's look-up, its C
launcher, allocations. Printed is the CPU time of a call in units of a `torch.addmm` of (16, 16) matrices in
the same process, with launch plans and without: medians over rounds in which all ops take turns. A GPU's time
is in none of these figures, and an allocation costs otherwise there.

The last row of a table is a forward and backward pass of a small model under training, with the reference
backend beside. Convolutions and everything else that is ATen runs on the CPU here and is in all three; the
reference also has the arithmetic of the ops, which the kernels here do not do.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench import stub_driver
from fastflow import FlowConfig, MagicFlow, kernels
from fastflow.kernels import planning
from fastflow.models.layers import ActNorm

Work = Callable[[], object]
COLUMNS = ("case", "addmm_with_plans", "addmm_without_plans", "addmm_reference")
BATCH, CHANNELS, SIDE, LABELS, FEATURES = 16, 16, 8, 7, 32


def op_cases() -> dict[str, tuple[Callable[..., object], tuple[Tensor, ...]]]:
    """(function of the differentiable inputs, these) of each public op with kernels."""
    image, residual = torch.randn(2, BATCH, CHANNELS, SIDE, SIDE).unbind(0)
    one, raw, shift = torch.randn(3, BATCH, 1, 16, 16).unbind(0)
    mask = torch.rand(1, 16, 16) > 0.5
    next_mask, order = ~mask, kernels.pixel_order(mask)
    label_index = torch.arange(BATCH) % LABELS
    gamma, beta = torch.randn(2, LABELS, CHANNELS).unbind(0)
    features, weights, tables = (
        torch.randn(2, n, width).unbind(0) for n, width in ((BATCH, FEATURES), (256, FEATURES), (LABELS, 256))
    )
    weight, bias = torch.randn(CHANNELS, CHANNELS), torch.randn(CHANNELS)
    gates = torch.randn(1, CHANNELS), torch.randn(CHANNELS, 1), torch.randn(1, 2, 7, 7)
    layers = torch.randn(8, CHANNELS), torch.randn(8), torch.randn(CHANNELS, 8), torch.randn(CHANNELS)
    channel_logits, spatial_logits = torch.randn(BATCH, CHANNELS), torch.randn(BATCH, 1, SIDE, SIDE)

    def norm(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> object:
        return kernels.norm_film_act(x, 8, gamma, beta, label_index, residual)

    def sampled_norm(x: Tensor, modulation: Tensor, residual: Tensor) -> object:
        return kernels.norm_modulate_act(x, 8, modulation, residual)

    def fusion(x: Tensor, *rest: Tensor) -> object:
        return kernels.global_fusion(x, (rest[0], rest[1]), (rest[2], rest[3]))

    def head(x: Tensor, *rest: Tensor) -> object:
        pairs = rest[:2], rest[2:4], rest[4:]
        return kernels.coupling_head_step(x, *pairs, label_index, mask, next_mask, order=order)

    return {
        "norm_film_act": (norm, (image, gamma, beta, residual)),
        "norm_modulate_act": (sampled_norm, (image, torch.randn(BATCH, CHANNELS, 2), residual)),
        "cbam": (kernels.cbam, (image, *gates)),
        "channel_mix": (kernels.channel_mix, (image, weight, bias)),
        "affine_coupling": (lambda *x: kernels.affine_coupling(*x, mask), (one, raw, shift)),
        "coupling_head_step": (head, (one, *features, *weights, *tables)),
        "squeeze2x2": (kernels.squeeze2x2, (image,)),
        "latent_prior": (kernels.latent_prior, (one.flatten(1),)),
        "global_fusion": (fusion, (image, *layers)),
        "global_context": (kernels.global_context, (image, layers[0], layers[2])),
        "pool_pixels": (kernels.pool_pixels, (image,)),
        "average_pixels": (kernels.average_pixels, (image,)),
        "pool_channels": (kernels.pool_channels, (image, channel_logits)),
        "apply_gates": (kernels.apply_gates, (image, channel_logits, spatial_logits)),
    }


def with_gradients(function: Callable[..., object], inputs: tuple[Tensor, ...]) -> Work:
    """A forward and a backward pass."""
    leaves = [value.clone().requires_grad_() for value in inputs]

    def run() -> object:
        out = function(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outs, leaves, [torch.ones_like(value) for value in outs])

    return run


def small_step(task: str) -> Work:
    """A forward and a backward pass of a small model in training mode."""
    widths = tuple(tuple(max(4, n // 4) for n in w) for w in FlowConfig.paper(LABELS, task).widths)
    model = MagicFlow(FlowConfig.paper(LABELS, task, input_shape=(1, 16, 16), widths=widths)).train()
    for module in model.modules():
        if isinstance(module, ActNorm):
            module.mark_initialized()
    x, labels = torch.rand(2, 1, 16, 16), torch.arange(2)

    def run() -> None:
        model.zero_grad()
        (-model.log_prob(x, labels).mean()).backward()

    return run


def cpu_seconds(work: Work, calls: int) -> float:
    """CPU time of a call."""
    start = time.process_time()
    for _ in range(calls):
        work()
    return (time.process_time() - start) / calls


def measure(works: dict[str, Work], rounds: int, calls: int) -> dict[str, float]:
    """The CPU time of each in units of a `torch.addmm` of the same round, medians over rounds."""
    matrix, row = torch.randn(16, 16), torch.randn(16)
    unit: Work = lambda: torch.addmm(row, matrix, matrix)  # noqa: E731
    for work in works.values():
        for _ in range(4):
            work()
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        addmm = cpu_seconds(unit, 200)
        for name, work in works.items():
            ratios[name].append(cpu_seconds(work, calls) / addmm)
    return {name: statistics.median(values) for name, values in ratios.items()}


def compare(works: dict[str, Work], rounds: int, calls: int, reference: bool) -> list[list[str]]:
    """The rows of a table."""
    found = []
    for plans in (True, False):
        planning.set_launch_plans(plans)
        found.append(measure(works, rounds, calls))
        for name, why in planning.launch_plan_refusals().items():
            print(f"no plan for {name}: {why}")
    if reference:
        kernels.set_backend("reference")
        found.append(measure(works, rounds, calls))
        kernels.set_backend("auto")
    return [[name, *(f"{column[name]:.2f}" for column in found)] for name in works]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--csv", type=Path, help="write the table there too")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=100, help="calls of an op in a round")
    parser.add_argument("--step", choices=("none", "classification", "generation"), default="classification")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.inside:
        if why := stub_driver.missing():
            raise SystemExit(f"bench.host needs a stub of libcuda: {why}")
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "bench.host", "--inside", *sys.argv[1:]]
            environment = stub_driver.environment(Path(folder))
            raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)
    stub_driver.install()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = op_cases()
    plain: dict[str, Work] = {n: (lambda f=f, x=x: f(*x)) for n, (f, x) in cases.items()}  # type: ignore[misc]
    works = plain | {f"{n}, with backward": with_gradients(*case) for n, case in cases.items()}
    rows = compare(works, options.rounds, options.calls, reference=False)
    if options.step != "none":
        step = {f"a small {options.step} step": small_step(options.step)}
        rows += compare(step, max(3, options.rounds // 3), 1, reference=True)
    print("CPU time of the host in units of torch.addmm, no GPU: launches do nothing")
    for row in [list(COLUMNS), *rows]:
        print(f"{row[0]:38}" + "".join(f"{cell:>22}" for cell in row[1:]))
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([list(COLUMNS), *rows])


if __name__ == "__main__":
    main()
