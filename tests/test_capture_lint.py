"""The lint of captured functions: it finds every kind of fault, and none in what training captures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import fake_gpu

ROOT = Path(__file__).parents[1]
needs_fake_gpu = pytest.mark.skipif(bool(fake_gpu.unavailable()), reason=fake_gpu.unavailable())

# Each line is a step, and runs on x (4, 5) float32, n (4,) int64, both on the GPU, and `page`, page-locked.
FAULTS = {
    "x.sum().item()": "host wait",
    "bool((x > 0).any())": "host wait",
    "float(x[0, 0])": "host wait",
    "1 if torch.isfinite(x).all() else 2": "host wait",
    "torch.equal(x, x)": "host wait",
    "torch.cuda.synchronize()": "host wait",
    "torch.nn.utils.clip_grad_norm_([w], 1.0, error_if_nonfinite=True)": "host wait",
    "x.cpu()": "blocking copy",
    "x.tolist()": "host wait",
    "torch.tensor(2.0, device='cuda')": "blocking copy",
    "torch.ones(3).to('cuda')": "blocking copy",
    "torch.ones(3).to('cuda', non_blocking=True)": "blocking copy",
    "page.to('cuda')": "blocking copy",
    "x.copy_(torch.ones(4, 5))": "blocking copy",
    "x.nonzero()": "shape by values",
    "x[x > 0]": "shape by values",
    "x.masked_select(x > 0)": "shape by values",
    "n.unique()": "shape by values",
    "x.repeat_interleave(n, dim=0)": "shape by values",
    "x.index_put_((x > 0,), torch.ones(20, device='cuda'))": "shape by values",
    "torch.rand(3)": "host draw",
    "torch.randint(5, (3,), generator=generator)": "host draw",
    "constant_rate.step()": "host value",
    "asked_in_backward().backward()": "host wait",
}
CLEAN = (
    "(x * 2).sum()",
    "(w * 2).sum().backward()",
    "x[n]",
    "x.masked_fill_(x > 0, 0.0)",
    "x.index_put_((x > 0,), torch.zeros((), device='cuda'))",
    "x.repeat_interleave(2, dim=0)",
    "torch.rand(3, device='cuda')",
    "torch.where(torch.isfinite(x), x, 0.0)",
    "page.to('cuda', non_blocking=True)",
    "host_page.copy_(x[0], non_blocking=True)",
    "tensor_rate.step()",
    "kernels.average_pixels(image)",
    "torch.nn.utils.clip_grad_norm_([w], 1.0)",
)

LINT = """
import sys, json
from bench import fake_gpu
from bench.fake_gpu import leave
fake_gpu.load()
import torch
from bench.capture_lint.lint import lint, CaptureLint
from bench.fake_gpu.tensors import fake_gpu
from fastflow import kernels

found = {}
for line in json.loads(sys.argv[1]):
    with fake_gpu():
        x, n = torch.zeros(4, 5, device="cuda"), torch.zeros(4, dtype=torch.int64, device="cuda")
        image = torch.zeros(2, 4, 5, 5, device="cuda")
        w = torch.zeros(3, device="cuda", requires_grad=True)
        w.grad = torch.zeros(3, device="cuda")
        generator = torch.Generator().manual_seed(0)
        rate = torch.zeros((), device="cuda")
        constant_rate = torch.optim.Adam([w], lr=0.1, fused=True, capturable=True)
        with CaptureLint() as watch:
            page, host_page = (torch.zeros(n, pin_memory=True) for n in (3, 5))
            tensor_rate = torch.optim.Adam([w], lr=rate, fused=True, capturable=True)
        def asked_in_backward():
            y = w * 2
            y.register_hook(lambda grad: grad.sum().item() and None)
            return y.sum()
        def run():
            eval(code, globals())
        code = compile(line, "a_step.py", "eval")
        found[line] = [[f.kind, f.place] for f in lint(run, watch=watch)]
print(json.dumps(found))
leave()
"""


def in_process(*arguments):
    """Run a command of its own process, which alone may load the fake GPU."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def found():
    return json.loads(in_process("-W", "ignore", "-c", LINT, json.dumps([*FAULTS, *CLEAN])).splitlines()[-1])


@needs_fake_gpu
def test_each_kind_of_fault_is_found_where_it_stands(found):
    for line, kind in FAULTS.items():
        assert kind in [k for k, _ in found[line]], (line, found[line])
        assert {k for k, _ in found[line]} == {kind}, (line, found[line])
        assert found[line][0][1].endswith("a_step.py:1") or "backward" in line, (line, found[line])


@needs_fake_gpu
def test_what_a_graph_can_hold_is_no_fault(found):
    assert {line: found[line] for line in CLEAN} == {line: [] for line in CLEAN}


def check(*cases):
    lines = in_process("-W", "ignore", "-m", "bench.capture_lint", *cases).splitlines()
    assert len(lines) >= max(1, len(cases)) and all(line.endswith(": 0 findings") for line in lines)


@needs_fake_gpu
def test_the_captured_step_holds_nothing_that_a_graph_cannot():
    check(
        "classification likelihood float32 ordinary",
        "classification pairwise bfloat16 ordinary",
        "classification rivals float32 reversible",
        "generation likelihood bfloat16 ordinary",
    )


@needs_fake_gpu
@pytest.mark.slow
def test_all_captured_steps_hold_nothing_that_a_graph_cannot():
    check()
