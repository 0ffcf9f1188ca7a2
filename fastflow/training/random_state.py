"""The states of all generators that a training draws from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def random_state(generator: torch.Generator, device: torch.device) -> dict[str, Tensor]:
    """The states of a generator of the host, and of the default generators of the host and of a device.

    Steps draw from these alone: neither NumPy's nor Python's generator is used in training.
    """
    state = {"host": generator.get_state(), "default": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], generator: torch.Generator, device: torch.device) -> None:
    """Put generators into the states that `random_state` gave.

    A state that was taken on another kind of device leaves the generator of this one as it is.
    """
    generator.set_state(state["host"])
    torch.set_rng_state(state["default"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
