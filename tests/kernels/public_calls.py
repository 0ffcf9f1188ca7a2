"""A small call of every public function with an op behind it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastflow import kernels
from fastflow.kernels.pyramid import PyramidWeights

Call = tuple[Callable[..., object], tuple[Tensor, ...]]


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def public_calls(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Call]:
    """(function of the differentiable inputs, these) by the name of the public function."""

    def value(*shape: int, seed: int = 0) -> Tensor:
        return rand(*shape, seed=seed, dtype=dtype).to(device)

    x, raw, shift = (value(2, 3, 4, 6, seed=i) for i in range(3))
    one = value(2, 1, 4, 6)
    mask = (rand(3, 4, 6, seed=4) > 0).to(device)
    plane = mask[:1]
    index = torch.tensor([2, 0], device=device)
    seeds = torch.tensor([5, -7], dtype=torch.int32, device=device)
    heads = [value(*shape, seed=i) for i, shape in enumerate([(2, 8)] * 2 + [(24, 8)] * 2 + [(3, 24)] * 2)]
    square = value(3, 3, seed=5) + 3 * torch.eye(3, dtype=dtype, device=device)
    calls = {
        "affine_coupling": (lambda *v: kernels.affine_coupling(*v, mask), (x, raw, shift)),
        "coupling_step": (lambda *v: kernels.coupling_step(*v, mask, ~mask), (x, raw, shift)),
        "channel_mix": (kernels.channel_mix, (x, square, value(3))),
        "channel_mix_masked": (lambda *v: kernels.channel_mix_masked(*v, mask), (x, square, value(3))),
        "channel_unmix": (kernels.channel_unmix, (x, square, value(3))),
        "squeeze2x2": (kernels.squeeze2x2, (x,)),
        "unsqueeze2x2": (kernels.unsqueeze2x2, (value(2, 4, 2, 3),)),
        "latent_prior": (kernels.latent_prior, (value(3, 50),)),
        "head_tables": (
            lambda f, *v: kernels.head_tables(f, v[:2], v[2:]),
            (value(2, 4, 3), value(5, 4), value(2, 4), value(5), value(2)),
        ),
        "head_features": (
            lambda v, *w: kernels.head_features(v, w[:2], w[2:]),
            (value(2, 8), value(4, 8), value(4, 8, seed=1), value(4), value(4, seed=1)),
        ),
    }

    def head(x: Tensor, *v: Tensor) -> object:
        return kernels.coupling_head(x, v[:2], v[2:4], v[4:], index, plane)

    def head_step(x: Tensor, *v: Tensor) -> object:
        return kernels.coupling_head_step(x, v[:2], v[2:4], v[4:], index, plane, ~plane)

    def norm(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> object:
        return kernels.norm_film_act(x, 3, gamma, beta, index, residual, dropout=0.3, seeds=seeds)

    def sampled_norm(x: Tensor, modulation: Tensor, residual: Tensor) -> object:
        return kernels.norm_modulate_act(x, 3, modulation, residual, dropout=0.3, seeds=seeds)

    def film(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> object:
        return kernels.film_act(x, gamma, beta, index, residual)

    tables = value(4, 3), value(4, 3, seed=1)
    calls |= {
        "coupling_head": (head, (one, *heads)),
        "coupling_head_step": (head_step, (one, *heads)),
        "norm_film_act": (norm, (x, *tables, raw)),
        "norm_modulate_act": (sampled_norm, (x, value(2, 3, 2), raw)),
        "film_act": (film, (x, *tables, raw)),
        "pool_pixels": (kernels.pool_pixels, (x,)),
        "average_pixels": (kernels.average_pixels, (x,)),
        "pool_channels": (kernels.pool_channels, (x, value(2, 3))),
        "apply_gates": (kernels.apply_gates, (x, value(2, 3), one)),
        "cbam": (kernels.cbam, (x, value(2, 3), value(3, 2), value(1, 2, 7, 7))),
        "global_context": (kernels.global_context, (x, value(2, 3), value(3, 2))),
    }
    return calls | _networks(x, value) | _mixing(value, device)


def _networks(x: Tensor, value: Callable[..., Tensor]) -> dict[str, Call]:
    def fusion(x: Tensor, *v: Tensor) -> object:
        return kernels.global_fusion(x, v[:2], v[2:])

    def pyramid(x: Tensor, *v: Tensor) -> object:
        dilated = tuple(zip(v[2:8:2], v[3:8:2], strict=True))
        weights = PyramidWeights(v[:2], dilated, (1, 2, 3), v[8:10], v[10:12], v[12:])
        return kernels.atrous_pyramid(x, weights)

    layers = [value(2, 3), value(2), value(3, 2), value(3)]
    shapes = [(3, 3, 1, 1), (3,), *3 * [(3, 3, 3, 3), (3,)], (2, 12), (2,), (12, 2), (12,), (3, 12, 1, 1)]
    weights = [value(*shape, seed=i) for i, shape in enumerate([*shapes, (3,)])]
    return {"global_fusion": (fusion, (x, *layers)), "atrous_pyramid": (pyramid, (x, *weights))}


def _mixing(value: Callable[..., Tensor], device: str) -> dict[str, Call]:
    def mixing(*v: Tensor) -> object:
        layers = []
        for first in (0, 5):
            c = len(v[first])
            order = torch.arange(c, device=device)
            layers.append(kernels.MixingLayer(*v[first : first + 5], order, order.to(torch.int8) * 0 + 1, 4))
        maps, logdets = kernels.lu_mixing(layers, [True, False])
        return maps[0].affine, maps[1].weight, maps[1].bias, logdets

    sizes = [(1, 1), (1, 1), (1,), (1,), (1,), (3, 3), (3, 3), (3,), (3,), (3,)]
    return {"lu_mixing": (mixing, tuple(value(*size, seed=i) for i, size in enumerate(sizes)))}


def outputs(function: Callable[..., object], values: tuple[Tensor, ...]) -> list[Tensor]:
    """The results of a call as a list."""
    out = function(*values)
    return list(out) if isinstance(out, tuple) else [out]  # type: ignore[list-item]
