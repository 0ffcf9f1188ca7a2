"""The mixing layers of a flow step: ActNorm and the invertible 1x1 convolution."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastflow.kernels.lu_mixing import lu_factors, lu_inverse, lu_weight

STD_FLOOR = 1e-3


class ActNorm(nn.Module):
    """Per-channel ``exp(log_scale) * x + bias``; the first batch leaves with mean 0 and deviation 1.

    The deviation has a floor of `STD_FLOOR`: a constant channel (padding) gets a bounded scale instead of a
    NaN. Statistics are taken over all ranks of the default process group when there is one. Source: Glow
    (Kingma & Dhariwal, 2018), section 3.1.

    Args:
        channels: C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # A Python copy of the buffer: asking a CUDA tensor for its value would stall the device at every
        # step.
        self.ready = False
        self.register_load_state_dict_post_hook(_read_initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and bias from `x` (B, C, H, W), once: a layer that is initialised stays as it is."""
        if self.ready:
            return
        x = x.detach().double()
        count = torch.tensor(
            float(x.shape[0] * x.shape[2] * x.shape[3]), dtype=torch.float64, device=x.device
        )
        mean = _all_ranks(x.sum(dim=(0, 2, 3))) / (total := _all_ranks(count))
        deviation = x - mean[:, None, None]
        std = (_all_ranks((deviation * deviation).sum(dim=(0, 2, 3))) / total).sqrt().clamp_min(STD_FLOOR)
        scale = 1.0 / (std + 1e-6)
        self.log_scale.copy_(scale.log())
        self.bias.copy_(-mean * scale)
        self.mark_initialized()

    def mark_initialized(self) -> None:
        """Declare that scale and bias hold meaningful values."""
        self.initialized.fill_(True)
        self.ready = True


def _all_ranks(value: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def _read_initialized(module: ActNorm, _: Any) -> None:
    module.ready = bool(module.initialized)


class InvertibleConv1x1(nn.Module):
    """A 1x1 convolution whose matrix is kept as its LU factors: ``W = P L (U + diag(sign * exp(log_s)))``.

    P and sign are fixed, L is unit lower and U strictly upper triangular; it starts as a random rotation.
    Source: Glow (Kingma & Dhariwal, 2018), section 3.2.

    Args:
        channels: C.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        dtype = torch.get_default_dtype()
        self.lower = nn.Parameter(torch.zeros(channels, channels, dtype=dtype))
        self.upper = nn.Parameter(torch.zeros(channels, channels, dtype=dtype))
        self.log_s = nn.Parameter(torch.zeros(channels, dtype=dtype))
        self.register_buffer("permutation", torch.arange(channels))
        self.register_buffer("sign", torch.ones(channels, dtype=torch.int8))
        if channels > 1:
            rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
            self.set_weight(rotation, dtype)

    @torch.no_grad()
    def set_weight(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Take over a dense invertible (C, C) matrix, keeping its factors in `dtype`.

        Raises:
            ValueError: the matrix is singular.
        """
        p, lower, upper = torch.linalg.lu(weight.detach().double())
        diagonal = upper.diagonal()
        if not torch.all(torch.isfinite(diagonal) & (diagonal != 0)):
            raise ValueError(f"weight of the 1x1 convolution is singular, {tuple(weight.shape)}")
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_s = nn.Parameter(diagonal.abs().log().to(dtype))
        self.permutation = p.argmax(dim=1)
        self.sign = diagonal.sign().to(torch.int8)

    def factors(self) -> tuple[Tensor, Tensor]:
        """(L, U) in float64, U with its diagonal."""
        return lu_factors(self.lower, self.upper, self.log_s, self.sign)

    def weight(self) -> Tensor:
        """W (C, C) in float64."""
        return lu_weight(*self.factors(), self.permutation)

    def inverse_weight(self) -> Tensor:
        """W^-1 (C, C) in float64, by two triangular solves."""
        return lu_inverse(*self.factors(), self.permutation)
