"""Changes of a model after something was made of it, and the words that name them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from fastflow import MagicFlow


def optimize(model: MagicFlow) -> None:
    """A step of the optimizer that training uses, which writes without counting."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(model.parameters(), fused=True).step()


def write(model: MagicFlow) -> None:
    with torch.no_grad():
        model.steps[1].actnorm.bias.add_(1.0)


def replace_a_step(model: MagicFlow) -> None:
    model.steps[1] = copy.deepcopy(model.steps[1])  # type: ignore[index]


def set_weight(model: MagicFlow) -> None:
    model.steps[0].conv.set_weight(2 * torch.eye(1), torch.float32)


CHANGES: dict[str, tuple[Callable[[MagicFlow], object], str]] = {
    "in place": (write, "parameter steps.1.actnorm.bias is at version"),
    "an optimizer's step": (optimize, "parameter steps.0.actnorm.log_scale is at version"),
    "loaded": (lambda model: model.load_state_dict(model.state_dict()), "is at version"),
    "another dtype": (lambda model: model.double(), "steps.0.actnorm.log_scale was moved or replaced"),
    "a weight": (set_weight, "steps.0.conv.lower was moved or replaced"),
    "a step": (replace_a_step, "module steps.1 was moved or replaced"),
    "training mode": (lambda model: model.train(), "training mode"),
}
