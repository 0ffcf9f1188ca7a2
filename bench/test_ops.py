"""The ops of the flow and of its conditioners, timed: ``pytest bench/test_ops.py --benchmark-only``.

Each op runs as its definition ("reference", plain ATen), as the compiler's version of that ("inductor",
`torch.compile`) and as the package's Triton kernels ("triton", on CUDA devices only), forward as a training
step runs it and with its backward pass. A group holds one op, shape and pass, its rows one after the other,
so that a ratio within a group is little touched by drift; absolute times on shared machines are not
comparable between runs. On a GPU the half-steps of the paper's model, outside of their conditioners, and
bfloat16 conditioner tensors are timed too.

`extra_info` of each row: needed and moved bytes (counted, see `bench/roofline`), device and versions; on a
GPU the achieved GB/s (needed bytes / median) and, where the device's bandwidth is known, its fraction of the
bound. The group "copy" is the yardstick: what this device reaches with one read and one write.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import roofline
from bench.measuring import DEVICE, device_name

GPU = DEVICE == "cuda"
# On a GPU tensors are well above its L2 cache, which would serve small ones faster than memory does.
BATCH = 512 if GPU else 4
ROUNDS, ITERATIONS = (30, 10) if GPU else (15, 1)
IMPLEMENTATIONS = ("reference", "inductor", "triton")


def _timer() -> float:
    """Seconds, after all that was queued is done: launches of a round overlap, rounds do not."""
    if GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


pytestmark = pytest.mark.benchmark(timer=_timer)


class Case(NamedTuple):
    """A work of `bench/roofline`: the function that lists it, and its index in the list."""

    name: str
    works: str
    index: int
    shape: tuple[int, int, int]
    dtype: torch.dtype

    def build(self, device: str):
        return getattr(roofline, self.works)(self.shape, BATCH, self.dtype, device)[self.index]

    def __str__(self) -> str:
        conditioner = "" if self.dtype == torch.float32 else "-bfloat16"
        return f"{self.name.replace(' +', '+')}-{'x'.join(map(str, self.shape))}{conditioner}"


def _cases() -> Iterator[Case]:
    ops = (
        ("op_works", roofline.OP_SHAPES),
        ("feature_works", roofline.FEATURE_SHAPES),
        ("head_works", roofline.OP_SHAPES),
    )
    dtypes = (torch.float32, torch.bfloat16) if GPU else (torch.float32,)
    lists = [(works, shapes, dtype) for dtype in dtypes for works, shapes in ops]
    if GPU:
        shapes = ((1, 184, 184), (4, 92, 92), (16, 23, 23))
        lists += [("half_steps", shapes, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for works, shapes, dtype in lists:
        for shape in shapes:
            with FakeTensorMode():
                names = [work.name for work in getattr(roofline, works)(shape, 1, dtype)]
            yield from (Case(name, works, i, shape, dtype) for i, name in enumerate(names))


@pytest.fixture(scope="module", params=list(_cases()), ids=str)
def case(request):
    torch.manual_seed(0)
    case = request.param
    # Every shape is compiled for itself. Builds of other cases would use up the compiler's limit on versions.
    torch.compiler.reset()
    work = case.build(DEVICE)
    with FakeTensorMode():
        counts = roofline.count(case.build("cpu"))
    return case, work, torch.compile(work.composite, dynamic=False, fullgraph=True), counts


def _training_pass(function: Callable, work, backward: bool) -> Callable[[], object]:
    """A forward pass as training runs it, with the backward pass or without."""
    if not backward:
        return lambda: function(*work.inputs)
    with torch.no_grad():
        grads = [torch.ones_like(output) for output in work.composite(*work.inputs)]
    return lambda: torch.autograd.grad(function(*work.inputs), work.leaves, grads)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def measure(benchmark, work: Callable[[], object], needed: int, moved: int) -> None:
    benchmark.pedantic(work, rounds=ROUNDS, iterations=ITERATIONS, warmup_rounds=2)
    device = device_name()
    benchmark.extra_info |= {
        "needed_bytes": needed,
        "moved_bytes": moved,
        "batch": BATCH,
        "device": device,
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if GPU and benchmark.stats is not None:
        achieved = needed / benchmark.stats.stats.median
        benchmark.extra_info["achieved_gb_per_s"] = achieved / 1e9
        for name, bandwidth in roofline.BANDWIDTH.items():
            if name in device:
                benchmark.extra_info["fraction_of_bound"] = achieved / bandwidth


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("passes", roofline.PASSES)
def test_op(benchmark, case, passes, implementation):
    if implementation == "triton" and not GPU:
        pytest.skip("no GPU: Triton kernels are timed on CUDA devices only")
    case, work, compiled, counts = case
    backward = passes == roofline.PASSES[1]
    benchmark.group = f"{case} {passes}"
    function = {"reference": work.composite, "inductor": compiled, "triton": work.public}[implementation]
    row = counts[backward]
    measure(benchmark, _training_pass(function, work, backward), row.needed, row.moved)


def test_copy(benchmark):
    benchmark.group = "copy"
    x = torch.randn(BATCH, 1, 184, 184, device=DEVICE)
    y = torch.empty_like(x)
    moved = 2 * x.numel() * x.element_size()
    measure(benchmark, lambda: y.copy_(x), moved, moved)
    assert torch.equal(x, y)
