"""The state of an optimizer as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

PREFIX = "optimizer."


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under names that begin with `prefix`, which `part` takes away again."""
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers of each parameter: ``optimizer.ENTRY.PARAMETER``."""
    return {
        f"{PREFIX}{entry}.{name}": value
        for name, parameter in model.named_parameters()
        for entry, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer what `optimizer_tensors` took; its learning rate stays the tensor that it is.

    Raises:
        KeyError: there is no parameter of such a name.
        ValueError: a tensor does not have the shape of its parameter.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in part(tensors, PREFIX).items():
        entry, _, name = key.partition(".")
        parameter = parameters[name]
        if value.ndim and value.shape != parameter.shape:
            raise ValueError(
                f"{entry} of {name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}"
            )
        optimizer.state[parameter][entry] = value.to(parameter.device, copy=True)
