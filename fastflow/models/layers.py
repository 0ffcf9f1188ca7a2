"""The layers of a flow step: ActNorm, the invertible 1x1 convolution and the two-sided masked coupling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow import kernels
from fastflow.errors import UninitializedModelError
from fastflow.kernels._library import accumulator
from fastflow.models.conditioners import ClassificationConditioner, GenerationConditioner
from fastflow.models.conditioners.blocks import Passive, Tables, Then, conditioner_dtype
from fastflow.models.config import FlowConfig, Shape

STD_FLOOR = 1e-3


class ActNorm(nn.Module):
    """Per-channel ``exp(log_scale) * x + bias``, started so that the first training batch leaves with mean 0 and deviation 1.

    The deviation has a floor of `STD_FLOOR`: a constant channel (padding) gets a bounded scale instead of a NaN. Statistics are
    taken over all ranks of the default process group when there is one. Source: Glow (Kingma & Dhariwal, 2018), section 3.1.

    Args:
        channels: C.
    """

    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        # A Python copy of the buffer: asking a CUDA tensor for its value would stall the device at every step.
        self.ready = False
        self.register_load_state_dict_post_hook(_read_initialized)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set scale and bias from `x` (B, C, H, W), once: a layer that is initialised stays as it is."""
        if self.ready:
            return
        x = x.detach().double()
        count = torch.tensor(float(x.shape[0] * x.shape[2] * x.shape[3]), dtype=torch.float64, device=x.device)
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
        eye = torch.eye(self.log_s.numel(), dtype=torch.float64, device=self.log_s.device)
        lower = self.lower.double().tril(-1) + eye
        return lower, self.upper.double().triu(1) + torch.diag(self.sign * self.log_s.double().exp())

    def weight(self) -> Tensor:
        """W (C, C) in float64."""
        lower, upper = self.factors()
        product: Tensor = lower @ upper
        return product[self.permutation]

    def inverse_weight(self) -> Tensor:
        """W^-1 (C, C) in float64, by two triangular solves."""
        lower, upper = self.factors()
        eye = torch.eye(self.log_s.numel(), dtype=torch.float64, device=self.log_s.device)
        # W = P L U with (P A)[i] = A[permutation[i]], so the columns of P^T are rows of the identity at those places.
        permuted = torch.zeros_like(eye).index_put(
            (self.permutation, torch.arange(len(eye), device=eye.device)), eye.new_ones(())
        )
        half = torch.linalg.solve_triangular(lower, permuted, upper=False, unitriangular=True)
        out: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)
        return out


Conditioner = ClassificationConditioner | GenerationConditioner
Keys = tuple[Tensor | None, Tensor | None]


class Half(NamedTuple):
    """One half of a coupling: where its conditioner and that one's tables stand in their lists, and what it keeps."""

    place: int
    net: Conditioner
    passive: Passive


class AffineCoupling(nn.Module):
    """Two masked affine couplings in a row: the first moves the pixels where the mask is False, the second the others.

    Both halves ask the same conditioner unless ``config.share_halves`` is False. Source: MAGIC-Flow; RealNVP for the form.

    Args:
        config: the model.
        step: index of this step.
        shape: (C, H, W) of its input.
        mask: (C, H, W) bool, True = passive in the first half.
    """

    mask: Tensor
    first_order: Tensor
    second_order: Tensor
    conditioners: Sequence[Conditioner]

    def __init__(self, config: FlowConfig, step: int, shape: Shape, mask: Tensor) -> None:
        super().__init__()
        self.bound = config.scale_bound
        self.register_buffer("mask", mask)
        # What a mask says, as kernels of the heads read it. Its counts are Python numbers, lest every call wait for the device.
        self.ordered = config.task == "classification"
        self.active = (0, 0)
        for name in ("first_order", "second_order"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int32, device=mask.device), persistent=False)
        _read_mask(self)
        self.register_load_state_dict_post_hook(_read_mask)
        conditioner = ClassificationConditioner if config.task == "classification" else GenerationConditioner
        count = 1 if config.share_halves else 2
        # A ModuleList, declared as the sequence that it is.
        self.conditioners = nn.ModuleList(conditioner(config, step, shape) for _ in range(count))  # type: ignore[assignment]

    def halves(self) -> list[Half]:
        """The two halves in forward order."""
        masks = (self.mask, ~self.mask)
        orders = [
            kernels.PixelOrder(pixels, active) if self.ordered else None
            for pixels, active in zip((self.first_order, self.second_order), self.active, strict=True)
        ]
        nets = (self.conditioners[0], self.conditioners[-1])
        return [Half(i, net, Passive(mask, order)) for i, net, mask, order in zip((0, -1), nets, masks, orders, strict=True)]

    def tables(self, labels: Tensor) -> list[Tables]:
        """What each conditioner needs to know of `labels` (R,), as tables with R rows."""
        return [net.tables(labels) for net in self.conditioners]

    def draw_keys(self, batch: int, device: torch.device) -> Keys:
        """What the dropouts of the two halves are drawn from, in forward order."""
        return self.conditioners[0].draw_keys(batch, device), self.conditioners[-1].draw_keys(batch, device)

    def forward(
        self,
        x: Tensor,
        masked: Tensor,
        tables: list[Tables],
        rows: Tensor,
        inverse: bool = False,
        then: Then | None = None,
        keys: Keys | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x (B, C, H, W), its masked form for the first conditioner, the table row of each sample (B,), what follows.

        `masked` may hold one for several consecutive rows of x, where these differ by their labels only. `keys` are those of
        `draw_keys`, fresh ones when None. Returns (y, logdet (B,), y masked as `then` says).
        """
        first, second = zip(self.halves(), keys or self.draw_keys(x.shape[0], x.device), strict=True)
        if inverse:
            first, second = second, first
        x, logdet, between = self._half(*first, x, masked, tables, rows, inverse, Then(second[0].passive.mask))
        assert between is not None
        x, more, following = self._half(*second, x, between, tables, rows, inverse, then)
        return x, logdet + more, following

    def _half(
        self,
        half: Half,
        keys: Tensor | None,
        x: Tensor,
        masked: Tensor,
        tables: list[Tables],
        rows: Tensor,
        inverse: bool,
        then: Then | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        table = tables[half.place]
        driven = half.net.encode(masked, table, rows, keys)
        return half.net.couple(x, driven, table, rows, half.passive, self.bound, inverse, then)

    def forward_with_map(self, x: Tensor, tables: list[Tables], rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, but with the log-determinant still spread over its elements: (y, (B, C, H, W))."""
        wide = accumulator(x.dtype)
        spread = torch.zeros_like(x, dtype=wide)
        for place, net, (mask, _) in self.halves():
            raw_scale, shift = net(x.masked_fill(~mask, 0.0), tables[place], rows)
            x, _ = kernels.affine_coupling(x, raw_scale, shift, mask, self.bound)
            spread = spread + (self.bound * torch.tanh(raw_scale.to(wide))).masked_fill(mask, 0.0)
        return x, spread


def _read_mask(module: AffineCoupling, _: Any = None) -> None:
    if module.ordered:
        first, second = kernels.pixel_order(module.mask), kernels.pixel_order(~module.mask)
        module.first_order, module.second_order = first.pixels, second.pixels
        module.active = (first.active, second.active)


class FlowStep(nn.Module):
    """ActNorm, invertible 1x1 convolution, coupling; with the squeeze before them where the layout has one.

    Args:
        config: the model.
        step: index of this step.
        shape: (C, H, W) that the step transforms, after its squeeze.
        mask: (C, H, W) bool, True = passive in the first half.
    """

    def __init__(self, config: FlowConfig, step: int, shape: Shape, mask: Tensor) -> None:
        super().__init__()
        self.squeeze = step in config.squeeze_before
        self.split = step in config.split_after
        self.pixels = shape[1] * shape[2]
        self.actnorm = ActNorm(shape[0])
        self.conv = InvertibleConv1x1(shape[0])
        self.coupling = AffineCoupling(config, step, shape, mask)

    def mixing_logdet(self) -> Tensor:
        """Log-determinant of ActNorm and convolution, a scalar in float64 that no sample or label changes."""
        total: Tensor = self.actnorm.log_scale.double().sum() + self.conv.log_s.double().sum()
        return self.pixels * total

    def mix(self, x: Tensor) -> Tensor:
        """Squeeze, ActNorm and convolution: x (B, C', H', W') -> (B, C, H, W). The first training batch sets ActNorm."""
        weight, bias = self._map(x)
        return kernels.channel_mix(x, weight, bias, squeeze=self.squeeze)

    def map(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Matrix (C, C) and constant (C,) of ActNorm and convolution."""
        weight = self.conv.weight()
        scale = self.actnorm.log_scale.double().exp()
        bias = weight @ self.actnorm.bias.double()
        return (weight * scale).to(dtype), bias.to(dtype)

    def _map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`map` in the dtype of x, once ActNorm is set."""
        if not self.actnorm.ready:
            if not self.training:
                raise UninitializedModelError
            self.actnorm.initialize(kernels.squeeze2x2(x) if self.squeeze else x)
        return self.map(x.dtype)

    def mix_masked(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`mix`, and the result as the first conditioner of the coupling sees it."""
        weight, bias = self._map(x)
        return kernels.channel_mix_masked(x, weight, bias, self.coupling.mask, self.squeeze, dtype=conditioner_dtype(x))

    def folded(self, inverse: bool = False) -> Tensor | None:
        """The mix of a one-channel step as (2,), a factor and a constant, for the coupling before it; None where it is more.

        With `inverse`, factor and constant of `unmix`.
        """
        if self.conv.log_s.numel() != 1 or self.squeeze or not self.actnorm.ready:
            return None
        weight = self.conv.weight().reshape(1)
        scale = self.actnorm.log_scale.double().exp()
        factor = self.conv.inverse_weight().reshape(1) / scale if inverse else weight * scale
        return torch.cat((factor, weight * self.actnorm.bias.double())).to(self.actnorm.bias.dtype)

    def unmix(self, y: Tensor) -> Tensor:
        """Inverse of `mix`."""
        if not self.actnorm.ready:
            raise UninitializedModelError
        scale = self.actnorm.log_scale.double().exp()
        weight = self.conv.weight()
        inverse = (self.conv.inverse_weight() / scale[:, None]).to(y.dtype)
        bias = weight @ self.actnorm.bias.double()
        return kernels.channel_unmix(y, (weight * scale).to(y.dtype), bias.to(y.dtype), self.squeeze, inverse)
