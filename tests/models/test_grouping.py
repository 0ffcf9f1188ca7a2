"""Parameters of all steps computed together: the same values and gradients as step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastflow import FlowConfig, MagicFlow
from fastflow.models import grouping
from fastflow.numerics import float32_products

LAYOUTS: dict[str, dict[str, Any]] = {
    "classification": {},
    "generation": {"task": "generation"},
    "label-free steps": {"condition_from_step": 2},
    "two conditioners a step": {"share_halves": False},
    "unequal widths": {"widths": ((8, 8, 8), (8, 16, 8), (16, 8, 24), (8, 8, 8), (8, 8, 16), (8, 8, 8))},
}


def build(**changes: Any) -> MagicFlow:
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(3, **changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.initialize(images(4))
    return model.train()


def images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 16, 16, dtype=torch.float64, generator=generator) * 2 - 1


def run(model: MagicFlow, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    model.zero_grad()
    log_prob = model.log_prob(x, y)
    (log_prob * torch.linspace(0.5, 1.5, len(x), dtype=x.dtype)).sum().backward()
    return log_prob.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a CPU take the form of a GPU, whose ops are ATen's."""
    monkeypatch.setattr(grouping, "runs_triton", lambda x: True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("labels", [[2, 0, 1, 1], [1, 1]], ids=["all classes", "fewer samples than classes"])
def test_values_and_gradients_are_those_of_each_step(
    layout: str, labels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y = build(**LAYOUTS[layout]), torch.tensor(labels)
    x = images(len(y))
    want, gradients = run(model, x, y)
    monkeypatch.setattr(grouping, "runs_triton", lambda x: True)
    got, found = run(model, x, y)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-9)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("grouped", [False, True], ids=["step by step", "together"])
def test_label_parameters_are_rounded_neither_by_autocast_nor_to_tf32(
    grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, labels = build().float(), torch.arange(3)
    exact = model.steps[0].label_params(labels)[0].tensors()
    seen, activate = [], torch.nn.functional.gelu

    def gelu(x: Tensor) -> Tensor:
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.is_autocast_enabled("cpu")))
        return activate(x)

    monkeypatch.setattr(torch.nn.functional, "gelu", gelu)
    monkeypatch.setattr(grouping, "runs_triton", lambda x: grouped)
    with float32_products(tf32=True), torch.autocast("cpu", torch.bfloat16):
        params = grouping.FlowLabelParams(model.steps, labels).of_step(0)[0]
        assert torch.backends.cuda.matmul.allow_tf32
    assert set(seen) == {(False, False)}
    for got, want in zip(params.tensors(), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("together")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_gradients_both_directions_agree(layout: str) -> None:
    model, x, y = build(**LAYOUTS[layout]).eval(), images(4), torch.tensor([2, 0, 1, 1])
    with torch.no_grad():
        z, _ = model(x, y)
        torch.testing.assert_close(model.inverse(z, y), x, rtol=0, atol=1e-9)
        terms, const = model.attribution(x, y)
        torch.testing.assert_close(terms.sum((1, 2, 3)) + const, model.log_prob(x, y), rtol=1e-12, atol=1e-9)


@pytest.mark.usefixtures("together")
def test_modules_have_their_own_parameters_after_a_pass() -> None:
    model, before = build(), None
    before = {name: id(p) for name, p in model.named_parameters()}
    run(model, images(4), torch.tensor([2, 0, 1, 1]))
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(getattr(module, "given_weight", None) is None for module in model.modules())


def test_under_autocast_gradients_are_as_near_as_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = build(), images(4), torch.tensor([2, 0, 1, 1])
    exact = run(model, x, y)[1]
    model, x = model.float(), x.float()

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            found = run(model, x, y)[1]
        assert found.keys() == exact.keys()
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        return sum(float((found[name] - gradient).square().sum()) for name, gradient in exact.items()) ** 0.5

    by_step = error()
    monkeypatch.setattr(grouping, "runs_triton", lambda x: True)
    assert 0 < error() <= 1.2 * by_step
