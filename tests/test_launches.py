"""Launches of the paper's models on a GPU, counted on fake tensors, held to the committed table."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from bench import fake_gpu
from bench.launches import budgets
from bench.launches.classes import CLASSES, KERNEL_RULES, RULES, model_class
from fastflow.models.conditioners.leaves import CBAM, NormFiLM
from fastflow.models.conditioners.network import encode_strided

ROOT = Path(__file__).parents[1]
QUICK = ("classification training float32", "classification sample float32")
needs_fake_gpu = pytest.mark.skipif(bool(fake_gpu.unavailable()), reason=fake_gpu.unavailable())


def in_process(*arguments):
    """Run a command of its own process, which alone may load the fake GPU."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)


def check(*cases):
    done = in_process("-m", "bench.launches", *cases)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-3000:]
    lower = [line for line in done.stdout.splitlines() if line.startswith("UNDER")]
    if lower:
        warnings.warn("\n".join(lower), stacklevel=2)


def row(name="norms", launches=10, case="a", reason=""):
    return budgets.Row(case, name, launches, 0, launches, 0, 0, 0, launches, launches, reason)


def table(*rows):
    return budgets.as_table(rows)


# -- the paper's models --------------------------------------------------------------------------------------


@needs_fake_gpu
def test_classification_starts_no_more_than_its_budgets():
    check(*QUICK)


@needs_fake_gpu
@pytest.mark.slow
def test_the_other_cases_start_no_more_than_their_budgets():
    check(*{key[0]: None for key in budgets.read_table() if key[0] not in QUICK})


def test_the_table_has_every_class_and_adds_up():
    stored = budgets.read_table()
    assert {case for case, _ in stored} >= set(QUICK)
    for (_, name), one in stored.items():
        assert name in CLASSES
        assert one.forward + one.backward == one.launches == one.triton + one.conv + one.gemm + one.other
        assert one.device_kernels >= one.launches


COUNTED_BY_HAND = """
from bench import fake_gpu
from bench.fake_gpu import leave
fake_gpu.load()
import torch
from torch.nn import functional as F
from bench.fake_gpu.tensors import fake_gpu
from bench.launches.counter import LaunchCounter
from fastflow import kernels

with fake_gpu(), LaunchCounter() as counter:
    x = torch.zeros(2, 4, 6, 6, device="cuda", requires_grad=True)
    weight, bias = (torch.empty(s, device="cuda", requires_grad=True) for s in ((4, 4, 3, 3), (4,)))
    host = torch.zeros(5) + 1
    counter.clear()
    y = F.conv2d(x, weight, bias)
    z = kernels.pool_channels(y + y.relu(), torch.empty(2, 4, device="cuda"))[0]
    counter.direction = "backward"
    z.backward(torch.empty_like(z))
for (group, direction, name), count in counter.names.items():
    print(direction, name, count, group)
print(counter.found.total(), counter.kernels.total())
leave()
"""


@needs_fake_gpu
def test_counts_of_a_few_ops_are_those_by_hand():
    done = in_process("-c", COUNTED_BY_HAND)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, totals = done.stdout.splitlines()
    assert lines == [
        "forward convolution 1 rest",
        "forward relu 1 rest",
        "forward add 1 rest",
        "forward _pool_channels_kernel 1 rest",
        "backward _pool_channels_bwd_kernel 1 rest",
        "backward threshold_backward 1 rest",
        "backward add 1 gradient adds",
        "backward convolution_backward 1 rest",
    ]
    # The bias is a kernel more, and so are two of the three gradients of the convolution.
    assert totals == "8 11"


@needs_fake_gpu
def test_the_fake_gpu_comes_before_torch():
    done = in_process("-c", "import torch\nfrom bench import fake_gpu\nfake_gpu.load()")
    assert done.returncode == 1 and "before torch is imported" in done.stderr


@needs_fake_gpu
def test_unknown_cases_are_refused():
    done = in_process("-m", "bench.launches", "classification dancing")
    assert done.returncode == 2 and "classification dancing" in done.stderr


# -- classes -------------------------------------------------------------------------------------------------


def test_rules_name_classes():
    assert {rule.name for rule in (*RULES, *KERNEL_RULES)} <= set(CLASSES)


def test_code_has_the_class_of_its_function():
    assert model_class(CBAM.forward.__code__) == "CBAM"
    assert model_class(NormFiLM.forward.__code__) == "norms"
    assert model_class(NormFiLM.fold.__code__) == "label tables"
    assert model_class(encode_strided.__code__) == "stage convolutions"
    assert model_class(row.__code__) == ""


# -- budgets -------------------------------------------------------------------------------------------------


def test_more_launches_than_a_budget_are_reported():
    verdict = budgets.compare(table(row(launches=11)), table(row()))
    assert verdict.over == ["a, in all: 11 launches, budget 10", "a, norms: 11 launches, budget 10"]
    assert not verdict.under


def test_a_class_may_not_grow_while_the_case_shrinks():
    stored = table(row(), row("CBAM", 50))
    verdict = budgets.compare(table(row(launches=12), row("CBAM", 40)), stored)
    assert verdict.over == ["a, norms: 12 launches, budget 10"]


def test_a_class_without_a_budget_is_over_it():
    assert budgets.compare(table(row(), row("rest", 1)), table(row())).over[-1].startswith("a, rest: 1")


def test_far_fewer_launches_ask_for_a_lower_budget():
    assert budgets.compare(table(row(launches=99)), table(row(launches=100))) == ([], [])
    assert len(budgets.compare(table(row(launches=90)), table(row(launches=100))).under) == 2
    gone = budgets.compare(table(row()), table(row(), row("CBAM", 3)))
    assert "a, CBAM: 0 launches, budget 3" in gone.under


def test_budgets_rise_with_a_reason_only():
    stored = table(row(), row(case="b"))
    with pytest.raises(ValueError, match="--allow-more"):
        budgets.updated(table(row(launches=11)), stored)
    new = budgets.updated(table(row(launches=11)), stored, "a new layer")
    assert new["a", "norms"] == row(launches=11, reason="a new layer") and new["b", "norms"] == row(case="b")
    assert budgets.updated(table(row(launches=9)), new)["a", "norms"].reason == "a new layer"
    assert budgets.updated(table(row(case="c")), stored)["c", "norms"].launches == 10


def test_the_table_comes_back_as_it_was_written(tmp_path):
    rows = table(row(), row("CBAM", 3, reason="because, for once"))
    budgets.write_table(rows, tmp_path / "launches.csv")
    assert budgets.read_table(tmp_path / "launches.csv") == rows
    assert budgets.read_table(tmp_path / "none.csv") == {}
