"""The mixing layers of a flow step: ActNorm and the invertible 1x1 convolution."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow.kernels.lu_mixing import lu_factors, lu_inverse, lu_weight

STD_FLOOR = 1e-3


class Moments(NamedTuple):
    """What the mean and the deviation of channels follow from, all in float64.

    Attributes:
        pixels: (1,) how many a channel has.
        mean: (C,); 0 where there is no pixel.
        squares: (C,) sum of the squared deviations from the mean.
    """

    pixels: Tensor
    mean: Tensor
    squares: Tensor


def moments(x: Tensor) -> Moments:
    """The moments of the channels of x (B, C, H, W)."""
    x = x.detach().double()
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    mean = x.sum(dim=(0, 2, 3)) / max(pixels, 1)
    deviation = x - mean[:, None, None]
    return Moments(mean.new_full((1,), float(pixels)), mean, (deviation * deviation).sum(dim=(0, 2, 3)))


def combine(parts: Sequence[Moments]) -> Moments:
    """The moments of several parts of a batch together.

    Source: Chan, Golub and LeVeque, 1979, equation 2.1. Parts are added up in the order given.
    """
    whole, *rest = parts
    for part in rest:
        pixels = whole.pixels + part.pixels
        share = part.pixels / pixels.clamp_min(1.0)
        apart = part.mean - whole.mean
        squares = whole.squares + part.squares + apart * apart * (whole.pixels * share)
        whole = Moments(pixels, whole.mean + apart * share, squares)
    return whole


def _of_all_ranks(own: Moments) -> list[Moments]:
    """The moments of every rank of the default process group, in the order of ranks; one's own without it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [own]
    flat = torch.cat(own)
    gathered = [torch.empty_like(flat) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, flat)
    sizes = [len(part) for part in own]
    return [Moments(*part.split(sizes)) for part in gathered]


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
        """Set scale and bias from `x` (B, C, H, W), once: a layer that is initialised stays as it is.

        Raises:
            ValueError: there are no images, or their statistics are not finite; the layer stays as it is.
        """
        if self.ready:
            return
        shape = tuple(x.shape)
        total, mean, squares = combine(_of_all_ranks(moments(x)))
        std = (squares / total).sqrt().clamp_min(STD_FLOOR)
        scale = 1.0 / (std + 1e-6)
        # They are checked as they will be stored, since a narrow dtype may not hold them.
        log_scale, bias = scale.log().to(self.log_scale), (-mean * scale).to(self.bias)
        # Statistics are those of all ranks, so that all ranks refuse a batch or none does.
        _check_statistics(shape, float(total), mean, std, torch.isfinite(log_scale) & torch.isfinite(bias))
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)
        self.mark_initialized()

    def mark_initialized(self) -> None:
        """Declare that scale and bias hold meaningful values."""
        self.initialized.fill_(True)
        self.ready = True

    @torch.no_grad()
    def unset(self, log_scale: Tensor, bias: Tensor) -> None:
        """Take these values, and wait for a first batch again."""
        self.log_scale.copy_(log_scale)
        self.bias.copy_(bias)
        self.initialized.fill_(False)
        self.ready = False


def _check_statistics(
    shape: tuple[int, ...], pixels: float, mean: Tensor, std: Tensor, finite: Tensor
) -> None:
    """Raise ValueError unless ActNorm can be set by these statistics of images of `shape`."""
    if not pixels:
        raise ValueError(f"x must hold an image at least to set ActNorm, got an empty batch {shape}")
    if bool(finite.all()):
        return
    channel = int((~finite).nonzero()[0, 0])
    raise ValueError(
        f"x must have finite statistics to set ActNorm, got mean {float(mean[channel])} and deviation "
        f"{float(std[channel])} in channel {channel} of {shape}; no layer was set, so leave out images that "
        "hold NaN or infinity, or scale them to [-1, 1], and give another batch"
    )


@contextlib.contextmanager
def all_or_none(waiting: Sequence[ActNorm]) -> Iterator[None]:
    """A block that sets all of these layers or, where it raises, none."""
    before = [(layer.log_scale.detach().clone(), layer.bias.detach().clone()) for layer in waiting]
    try:
        yield
    except BaseException:
        for layer, values in zip(waiting, before, strict=True):
            if layer.ready:
                layer.unset(*values)
        raise


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
