"""Launchers of `norm_modulate_act`, whose kernels are those of `norm_film_act`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels.triton.norm_film_act import launch_norm
from fastflow.kernels.triton.norm_film_act_backward import launch_norm_backward
from fastflow.kernels.triton.norm_parts import by_sample


def launch_norm_modulate_act(
    x: Tensor,
    modulation: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(result, mean and 1/deviation of each group (B, groups, 2)); `modulation` is (B, C, 2)."""
    return launch_norm(x, by_sample(modulation), residual, seeds, groups, eps, dropout, dtype)


def launch_norm_modulate_act_backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    modulation: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, the residual (empty without one) and modulation, the last not narrowed."""
    return launch_norm_backward(grad, x, stats, by_sample(modulation), residual, seeds, groups, dropout)
