"""Whole models on the Triton kernels: log-likelihoods, latents, images and gradients as on the references."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, labels
from short_model import short_config

from fastflow import FlowConfig, kernels
from fastflow.kernels.triton import launch as launching

TASKS = ["classification", "generation"]


def everything(model, x, y):
    z, logdet = model(x, y)
    log_prob = model.log_prob(x, y)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(log_prob.sum(), parameters, allow_unused=True)
    with torch.no_grad():
        return (
            z,
            logdet,
            log_prob,
            model.inverse(z, y),
            model.log_prob_all(x),
            *model.attribution(x, y),
            *grads,
        )


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_a_model_on_kernels_is_the_model(task, device):
    model = build(short_config(task, condition_from_step=1))
    x, y = images(model.config, 3), labels(model.config, 3)
    kernels.set_backend("reference")
    try:
        want = everything(model, x, y)
    finally:
        kernels.set_backend("auto")
    got = everything(model.to(device), x.to(device), y.to(device))
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.allclose(a.cpu(), b, rtol=1e-9, atol=1e-9)
    assert torch.allclose(got[3].cpu(), x, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_one_channel_mixes_are_folded_and_conditioner_inputs_written_beside(task, device):
    model = build(FlowConfig.tiny(3, task=task, condition_from_step=1)).to(device)
    x, y = images(model.config, 2).to(device), labels(model.config, 2).to(device)
    with torch.no_grad(), launching.recording() as launches:
        model.log_prob(x, y)
    names = [launch.kernel for launch in launches]
    # Step 0 has one channel and step 1 squeezes: a mix each, and two couplings a step.
    coupling = "_coupling_fwd_kernel" if task == "generation" else "_head_fwd_kernel"
    assert names.count(coupling) == 2 * model.config.num_steps
    assert names.count("_mix_fwd_kernel") == model.config.num_steps
    assert all(launch.arguments["NEXT"] for launch in launches if launch.kernel == "_mix_fwd_kernel")
    deep = build(FlowConfig.tiny(3, squeeze_before=(4,), split_after=(), task=task)).to(device)
    with torch.no_grad(), launching.recording() as launches:
        deep.log_prob(x, y)
    mixes = [launch for launch in launches if launch.kernel == "_mix_fwd_kernel"]
    # Steps 1 to 3 have one channel and follow a coupling.
    assert len(mixes) == deep.config.num_steps - 3
    assert sum(launch.arguments.get("AFFINE", False) for launch in launches) == 3


@pytest.mark.slow
def test_training_under_autocast_keeps_a_float32_stream(device):
    model = build(short_config("generation"), dtype=torch.float32).to(device)
    x, y = images(model.config, 4, dtype=torch.float32).to(device), labels(model.config, 4).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        log_prob = model.log_prob(x, y)
        narrow = model(x, y)[0]
    log_prob.sum().backward()
    assert log_prob.dtype == narrow.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert torch.allclose(log_prob, model.log_prob(x, y), rtol=0.02)
