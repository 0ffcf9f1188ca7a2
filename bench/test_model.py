"""Whole models: images per second and peak memory. ``pytest bench/test_model.py --benchmark-only``.

The paper preset (1x184x184, 7 classes, 151.6 M parameters) and the demo preset score all labels, sample and
take a training step. `extra_info` of each row holds images per second, the peak resident memory of the
process and, on a GPU, the allocator's peak. Absolute times drift on shared machines; compare rows of one run.
"""

from __future__ import annotations

import resource

import pytest
import torch

from bench.measuring import DEVICE, device_name
from fastflow import FlowConfig, MagicFlow
from fastflow.training.objective import likelihood_loss

CASES = [("paper", "classification", 1), ("paper", "generation", 1), ("demo", "classification", 8)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    name, task, batch = request.param
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.preset(name, 7, task=task)).to(DEVICE)
    x = torch.rand(batch, *model.config.input_shape, device=DEVICE) * 2 - 1
    model.initialize(x)
    return model.eval(), x


def measure(benchmark, work, images, rounds=3):
    def synchronised():
        out = work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return out

    result = benchmark.pedantic(synchronised, rounds=rounds, warmup_rounds=1)
    # The peak of resident memory only grows, so that of a later row includes the earlier rows.
    benchmark.extra_info |= {
        "images_per_second": images / benchmark.stats.stats.median,
        "peak_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "device": device_name(),
        "torch": torch.__version__,
    }
    if DEVICE == "cuda":
        benchmark.extra_info["peak_gpu_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return result


def test_score_all_labels(benchmark, case):
    model, x = case
    with torch.inference_mode():
        scores = measure(benchmark, lambda: model.log_prob_all(x), len(x))
    assert scores.shape == (len(x), 7) and torch.isfinite(scores).all()


def test_sample(benchmark, case):
    model, x = case
    y = torch.arange(len(x), device=DEVICE) % 7
    drawn = measure(benchmark, lambda: model.sample(y), len(x))
    assert drawn.shape == x.shape


def test_training_step(benchmark, case):
    model, x = case
    y = torch.arange(len(x), device=DEVICE) % 7

    def step():
        model.zero_grad(set_to_none=True)
        loss, _ = likelihood_loss(model, x, y)
        loss.backward()
        return loss.detach()

    try:
        assert torch.isfinite(measure(benchmark, step, len(x)))
    finally:
        model.zero_grad(set_to_none=True)
