"""The published form that benchmarks compare with computes what the package computes."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import published
from fastflow import FlowConfig, MagicFlow
from fastflow.kernels.cpu.convolution import convolve_to_few
from fastflow.kernels.cpu.pyramid import atrous_pyramid_cpu
from fastflow.kernels.pyramid import atrous_pyramid_reference
from fastflow.models.conditioners.generation import ASPP, GlobalContext, GlobalFusion
from tests.models import helpers

ROOT = Path(__file__).parents[1]
TASKS = ["classification", "generation"]


# Three steps with every kind of mask, a squeeze and a split.
LAYOUT = {
    "masks": ("custom", "checkerboard", "channel"),
    "squeeze_before": (1,),
    "split_after": (1,),
    "widths": ((8, 8, 8),) * 3,
}


@functools.cache
def model_of(task, **changes):
    """A model in evaluation mode that tests share, which must not change it."""
    return helpers.build(FlowConfig.tiny(3, task=task, **LAYOUT, **changes))


def relative(got, want):
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize(
    "changes", [{}, {"share_halves": False, "condition_from_step": 1}], ids=["shared", "apart"]
)
@pytest.mark.parametrize("task", TASKS)
def test_densities_agree(task, changes):
    model = model_of(task, **changes)
    x, y = helpers.images(model.config, 4), helpers.labels(model.config, 4)
    with torch.no_grad():
        z, logdet = model(x, y)
        got_z, got_logdet = published.encode(model, x, y)
        assert relative(got_z, z) < 1e-11 and relative(got_logdet, logdet) < 1e-11
        assert relative(published.log_prob(model, x, y), model.log_prob(x, y)) < 1e-12
        every = published.log_prob_all(model, x)
        assert every.shape == (4, 3)
        assert relative(every, model.log_prob_all(x)) < 1e-12
        # The label matters, so that agreement says something of the label's way through both forms.
        assert (every[:, 0] - every[:, 1]).abs().min() > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_conditioners_agree(task):
    model = model_of(task)
    for i, (channels, height, width) in enumerate(model.config.step_shapes):
        net = model.steps[i].coupling.conditioners[0]
        a = torch.randn(
            3, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(i)
        )
        y = torch.tensor([2, 0, 1])
        with torch.no_grad():
            want = net(a, net.label_params(torch.arange(3)), y)
            for got, value in zip(published.conditioner(net, a, y), want, strict=True):
                assert value.abs().max() > 1e-3
                assert relative(got, value) < 1e-11


@pytest.mark.parametrize("task", TASKS)
def test_gradients_agree_in_training(task):
    model = copy.deepcopy(model_of(task, dropout=0.0)).train()
    x, y = helpers.images(model.config, 4), helpers.labels(model.config, 4)
    gradients = []
    for score in (model.log_prob, lambda *arguments: published.log_prob(model, *arguments)):
        model.zero_grad(set_to_none=True)
        score(x, y).mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, want in gradients[0].items():
        assert (gradients[1][name] - want).abs().max() <= 1e-9 * want.abs().max() + 1e-11, name


def test_dropout_acts_in_training_only():
    model = copy.deepcopy(model_of("classification"))
    x, y = helpers.images(model.config, 2), helpers.labels(model.config, 2)
    with torch.no_grad():
        still = published.log_prob(model, x, y)
        assert torch.equal(published.log_prob(model, x, y), still)
        model.train()
        torch.manual_seed(0)
        assert not torch.equal(published.log_prob(model, x, y), still)


def test_the_authors_outputs():
    data = np.load(ROOT / "tests/fixtures/magicflow_generation_small.npz")
    config = FlowConfig(
        num_classes=int(data["config/num_classes"]),
        input_shape=tuple(data["config/input_shape"]),
        task="generation",
        masks=tuple(str(name) for name in data["config/mask_types"]),
        squeeze_before=tuple(data["config/squeeze_layers"]),
        split_after=tuple(data["config/split_layers"]),
        widths=tuple(tuple(row) for row in data["config/filters"]),
        norm="batch",
    )
    state = {
        name.removeprefix("state/"): torch.from_numpy(data[name])
        for name in data.files
        if name.startswith("state/")
    }
    model = MagicFlow.from_published(state, config, data["data/custom_mask"]).double()
    with torch.no_grad():
        got = published.log_prob_all(model, torch.from_numpy(data["data/x"]).double())
    assert relative(got, torch.from_numpy(data["expected/log_likelihood_all_labels"])) < 1e-9


def aspp_forms(block):
    def last(x):
        return x.contiguous(memory_format=torch.channels_last)

    return {
        "chosen": block,
        "branches": lambda x: atrous_pyramid_reference(x, block.weights()),
        "branches, channels_last": lambda x: atrous_pyramid_reference(last(x), block.weights()),
        "kernels": lambda x: atrous_pyramid_cpu(x, block.weights()),
    }


@pytest.mark.parametrize(
    "shape", [(2, 16, 40, 41), (1, 8, 52, 50), (3, 8, 13, 19), (2, 4, 5, 7), (1, 1, 1, 1)], ids=str
)
def test_pyramids_agree(shape):
    torch.manual_seed(0)
    block = ASPP(shape[1]).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weights = torch.randn_like(x)
    leaves = [x, *block.parameters()]

    def passes(form):
        out = form(x)
        return out.detach(), torch.autograd.grad((out * weights).sum(), leaves)

    want, want_grads = passes(lambda x: published.aspp(block, x))
    for name, form in aspp_forms(block).items():
        out, grads = passes(form)
        assert relative(out, want) < 1e-12, name
        for got, value in zip(grads, want_grads, strict=True):
            assert (got - value).abs().max() <= 1e-12 * value.abs().max() + 1e-13, name


@pytest.mark.parametrize("channels", [16, 32])
def test_a_sample_of_the_full_resolution_parts_does_not_know_its_batch(channels):
    torch.manual_seed(0)
    block = ASPP(channels)
    x = torch.randn(3, channels, 40, 40)
    scale, shift = torch.nn.Conv2d(channels, 1, 3, padding=1), torch.nn.Conv2d(channels, 1, 1)
    forms = {
        **aspp_forms(block),
        "fusion": GlobalFusion(channels),
        "context": GlobalContext(channels),
        "scale": lambda x: convolve_to_few(x, scale.weight, scale.bias),
        "shift": lambda x: convolve_to_few(x, shift.weight, shift.bias),
    }
    # CPUs do not take this form: ATen's dilated convolutions of contiguous planes round differently in a
    # batch.
    forms.pop("branches")
    with torch.no_grad():
        for name, form in forms.items():
            whole = form(x)
            for i in range(3):
                assert torch.equal(form(x[i : i + 1]), whole[i : i + 1]), name


def test_the_pyramid_under_autocast_follows_the_convolutions():
    torch.manual_seed(0)
    block = ASPP(16)
    x = torch.randn(2, 16, 40, 40, requires_grad=True)
    want = published.aspp(block, x).detach()
    for form in aspp_forms(block).values():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = form(x)
        assert out.dtype == torch.bfloat16
        assert (out.float() - want).abs().max() < 0.03 * want.abs().max()
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x)
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all()


def test_the_pyramid_takes_an_empty_batch():
    assert ASPP(16)(torch.randn(0, 16, 40, 40)).shape == (0, 16, 40, 40)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("outputs", [1, 4, 8])
def test_convolutions_to_few_channels(outputs, size):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, outputs, size, padding=size // 2).double()
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64, requires_grad=True)
    leaves = [x, *conv.parameters()]
    want, got = conv(x), convolve_to_few(x, conv.weight, conv.bias)
    weights = torch.randn_like(want)
    assert (got - want).abs().max() < 1e-13
    for a, b in zip(
        *(torch.autograd.grad((out * weights).sum(), leaves) for out in (got, want)), strict=True
    ):
        assert (a - b).abs().max() < 1e-12
