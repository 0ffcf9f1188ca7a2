"""Launch plans: `plan_checks.py` on the stub driver, the setting, and processes without a GPU."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import stub_driver
from fastflow import kernels
from fastflow.kernels import planning

CHECKS = Path(__file__).with_name("plan_checks.py")
ROOT = Path(__file__).parents[2]
OPS = (
    "norm_film_act", "norm_modulate_act", "cbam", "channel_mix", "affine_coupling", "coupling_head_step",
    "squeeze2x2", "latent_prior", "global_fusion", "global_context", "pool_pixels", "average_pixels",
    "pool_channels", "apply_gates",
)  # fmt: skip


def check_names():
    """The names of the checks, without importing what only runs on the stub."""
    functions = [
        node.name for node in ast.parse(CHECKS.read_text()).body if isinstance(node, ast.FunctionDef)
    ]
    names = [name.removeprefix("check_") for name in functions if name.startswith("check_")]
    names.remove("launches_of")
    return [*(f"launches_of_{op}" for op in OPS), *names]


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """The findings of each check, from one process that runs all of them."""
    if why := stub_driver.missing():
        pytest.skip(why)
    if torch.cuda.is_available():
        pytest.skip("the stub of libcuda does not replace a GPU's")
    environment = stub_driver.environment(tmp_path_factory.mktemp("stub")) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, CHECKS], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", check_names())
def test_on_the_stub_driver(found, name):
    assert set(found) == set(check_names())
    assert not found[name], found[name]


def test_every_op_with_kernels_is_among_the_checks():
    with_kernels = {name for op in kernels.registry.OPS.values() if op.triton for name in op.functions}
    forms = {"channel_mix_masked", "channel_unmix", "coupling_step", "coupling_head", "unsqueeze2x2"}
    # Ops over the parameters of many layers run once in a pass, and a pyramid waits for its convolutions.
    without_plans = {"head_tables", "lu_mixing", "atrous_pyramid"}
    assert with_kernels == set(OPS) | forms | without_plans


def test_a_process_without_launches_keeps_nothing():
    x = torch.randn(2, 4, 4, 4)
    for _ in range(4):
        kernels.channel_mix(x, torch.eye(4), torch.zeros(4))
    assert planning.count_launch_plans() == 0


def test_the_interpreter_keeps_nothing(device):
    if device == "cuda":
        pytest.skip("kernels are compiled")
    x = torch.randn(1, 1, 4, 4)
    for _ in range(4):
        kernels.squeeze2x2(x)
    assert planning.count_launch_plans() == 0


def test_the_setting():
    assert planning.uses_launch_plans()
    kernels.set_launch_plans(False)
    assert not planning.uses_launch_plans()
    kernels.set_launch_plans(True)
    code = "from fastflow.kernels import planning; print(planning.uses_launch_plans())"
    for value, expected in (("0", "False"), ("1", "True"), ("no", "must be 0 or 1, got 'no'")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "FASTFLOW_LAUNCH_PLANS": value},
            capture_output=True,
            text=True,
            check=False,
        )
        assert expected in done.stdout + done.stderr
