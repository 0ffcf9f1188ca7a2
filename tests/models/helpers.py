"""Small models for tests."""

from __future__ import annotations

import copy
import functools

import numpy as np
import torch
from torch import Tensor

from fastflow import FlowConfig, MagicFlow


def application_mask(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2, (height, width))


def randomize(model: MagicFlow, seed: int = 0) -> MagicFlow:
    """Give every parameter that starts at zero or one (heads, norms, biases) a value, so that nothing is the
    identity.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "actnorm" in name or "conv.lower" in name or "conv.upper" in name or "conv.log_s" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            parameter.add_(noise * (0.3 if parameter.ndim == 1 else 0.3 / parameter[0].numel() ** 0.5))
    return model


def images(config: FlowConfig, batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.rand(batch, *config.input_shape, generator=generator, dtype=torch.float64)
        .mul(2)
        .sub(1)
        .to(dtype)
    )


def labels(config: FlowConfig, batch: int) -> Tensor:
    return torch.arange(batch) % config.num_classes


def build(config: FlowConfig, seed: int = 0, dtype: torch.dtype = torch.float64) -> MagicFlow:
    """An initialised model with nothing at its identity start, in evaluation mode."""
    # A copy costs a tenth of a model made anew, and tests may change theirs.
    return copy.deepcopy(_built(config, seed, dtype))


@functools.lru_cache(maxsize=16)
def _built(config: FlowConfig, seed: int, dtype: torch.dtype) -> MagicFlow:
    torch.manual_seed(seed)
    mask = application_mask(*config.input_shape[1:], seed) if "custom" in config.masks else None
    model = randomize(MagicFlow(config, mask).to(dtype), seed)
    model.initialize(images(config, 8, seed + 1, dtype))
    return model.eval()
