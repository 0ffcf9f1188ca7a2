"""Transforms of torch.func: by the definitions they all work, and elsewhere the error says what to do."""

from __future__ import annotations

import pytest
import torch
from helpers import build, images, labels
from public_calls import outputs, public_calls
from short_model import short_config
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from fastflow import kernels
from fastflow.kernels.transforms import is_transformed, plain_values

# Plain operations on every backend, which need no other.
PLAIN = {"film_act"}


@pytest.fixture
def reference():
    kernels.set_backend("reference")
    yield
    kernels.set_backend("auto")


def total(function):
    return lambda *values: sum(out.double().square().sum() for out in outputs(function, values))


@pytest.mark.parametrize("name", sorted(public_calls()))
def test_every_op_is_transformed_by_its_definition(name, reference):
    function, values = public_calls(torch.float64)[name]
    leaves = [value.clone().requires_grad_() for value in values]
    want = torch.autograd.grad(total(function)(*leaves), leaves)
    every = tuple(range(len(values)))
    got = grad(total(function), argnums=every)(*values)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    directions = tuple(torch.ones_like(value) for value in values)
    _, slope = jvp(total(function), values, directions)
    torch.testing.assert_close(slope, sum(g.sum() for g in want), rtol=1e-9, atol=1e-9)
    pair = tuple(torch.stack((value, 2 * value)) for value in values)
    both = vmap(total(function))(*pair)
    torch.testing.assert_close(both[0], total(function)(*values), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(set(public_calls()) - PLAIN))
def test_elsewhere_an_op_names_the_backend(name):
    function, values = public_calls()[name]
    with pytest.raises(RuntimeError, match=r"torch.func .*set_backend\('reference'\)"):
        grad(total(function))(*values)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="the backend is 'auto'"):
        function(forward_ad.make_dual(values[0], torch.ones_like(values[0])), *values[1:])


class LogProb(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model.log_prob(x, y)


@pytest.fixture(params=["classification", "generation", "reversible"])
def model(request):
    reversible = request.param == "reversible"
    task = "classification" if reversible else request.param
    return build(short_config(task, reversible=reversible))


def test_a_model_is_transformed_by_its_definitions(model, reference):
    x, y = images(model.config, 3), labels(model.config, 3)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(model.log_prob(leaf, y).sum(), leaf)
    ones = torch.ones(3, dtype=x.dtype)
    found = {
        "grad": grad(lambda x: model.log_prob(x, y).sum())(x),
        "vjp": vjp(lambda x: model.log_prob(x, y), x)[1](ones)[0],
        "jacrev": jacrev(lambda x: model.log_prob(x, y))(x).sum(0),
        "a map over samples": vmap(grad(lambda x, y: model.log_prob(x[None], y[None])[0]))(x, y),
    }
    for name, got in found.items():
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8, msg=lambda m, name=name: f"{name}: {m}")
    slope = (want * x).sum()
    one = torch.ones((), dtype=x.dtype)
    torch.testing.assert_close(jvp(lambda x: model.log_prob(x, y).sum(), (x,), (x,))[1], slope)
    torch.testing.assert_close(jacfwd(lambda t: model.log_prob(t * x, y).sum())(one), slope)
    torch.testing.assert_close(vmap(lambda x: model.log_prob_all(x[None])[0])(x), model.log_prob_all(x))


def test_gradients_of_weights_for_each_sample(model, reference):
    scored = LogProb(model)
    parameters = {name: value.detach() for name, value in scored.named_parameters()}
    x, y = images(model.config, 3), labels(model.config, 3)

    def loss(parameters, x, y):
        return functional_call(scored, parameters, (x[None], y[None]))[0]

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(3):
        model.zero_grad()
        model.log_prob(x[i : i + 1], y[i : i + 1]).sum().backward()
        for name, value in scored.named_parameters():
            want = torch.zeros_like(value) if value.grad is None else value.grad
            torch.testing.assert_close(found[name][i], want, rtol=1e-7, atol=1e-7)


def test_in_float32_an_ensemble_is_mapped_over_its_weights(reference):
    scored = LogProb(build(short_config("generation"), dtype=torch.float32))
    x, y = images(scored.model.config, 2, dtype=torch.float32), labels(scored.model.config, 2)
    weights = {name: torch.stack((value, value)).detach() for name, value in scored.named_parameters()}
    got = vmap(lambda w: functional_call(scored, w, (x, y)))(weights)
    torch.testing.assert_close(got[1], scored(x, y).detach(), rtol=1e-5, atol=1e-2)


def test_labels_under_a_map_are_checked(reference):
    model = build(short_config("classification"))
    x = images(model.config, 2)
    with pytest.raises(ValueError, match=r"labels from 0 to 2 \(num_classes\), got 3"):
        vmap(lambda x, y: model.log_prob(x[None], y[None]))(x, torch.tensor([0, 3]))


def test_elsewhere_a_model_names_the_backend(model):
    x, y = images(model.config, 2), labels(model.config, 2)
    calls = (
        lambda: grad(lambda x: model.log_prob(x, y).sum())(x),
        lambda: vmap(lambda x: model.log_prob_all(x[None]))(x),
        lambda: jvp(lambda z: model.inverse(z, y), (x.flatten(1),), (x.flatten(1),)),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"set_backend\('reference'\)"):
            call()
    assert torch.equal(functional_call(LogProb(model), {}, (x, y)), model.log_prob(x, y))


def test_a_second_derivative_by_transforms(reference):
    model = build(short_config("classification", reversible=True))
    x, y = images(model.config, 2), labels(model.config, 2)

    def slope(t):
        return grad(lambda t: model.log_prob(t * x, y).sum())(t)

    one, step = torch.ones((), dtype=x.dtype), 1e-5
    want = (slope(one + step) - slope(one - step)) / (2 * step)
    torch.testing.assert_close(grad(slope)(one), want, rtol=1e-4, atol=1e-4)


def test_values_under_wrappers():
    seen = []

    def look(x):
        seen.append((is_transformed(), plain_values(x).tolist()))
        return x.sum()

    vmap(grad(look))(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert seen == [(True, [[1.0, 2.0], [3.0, 4.0]])]
    assert not is_transformed()
