r"""Maps of the channels of many steps at once: ActNorm and the invertible 1x1 convolution of LU factors.

.. math:: W = P L (U + \operatorname{diag}(s\,e^{\log s})), \qquad A = W \operatorname{diag}(e^{l}),
          \quad c = W b, \qquad \log|\det| = HW \sum_i (l_i + \log s_i),
          \qquad A^{-1} = \operatorname{diag}(e^{-l})\, U^{-1} L^{-1} P^\top

L is unit lower and U upper triangular with its diagonal, P and the signs s are fixed; l is ActNorm's
log-scale and b its bias. A layer is a step; all of C up to `MAX_CHANNELS` = 64 channels, of any sizes, go in
one launch forward and one backward. Everything is float64 inside; maps come out in the dtype of the
parameters, float32 or float64, log-determinants (in nats) stay float64. Inverse matrices are found by
substitution; the kernel has no gradient of them, so that where autograd records, the definition runs.
Source: Glow (Kingma & Dhariwal, 2018), sections 3.1-3.2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, runs_triton
from fastflow.kernels.triton.lu_mixing import (
    MAX_CHANNELS,
    TENSORS,
    channels_of,
    launch_lu_mixing,
    launch_lu_mixing_backward,
    map_places,
    param_places,
)


class MixingLayer(NamedTuple):
    """The parameters of ActNorm and of a 1x1 convolution.

    Attributes:
        lower: (C, C), of which what lies below the diagonal counts.
        upper: (C, C), of which what lies above the diagonal counts.
        log_s: (C,) logarithms of the diagonal's absolute values.
        log_scale: (C,) of ActNorm.
        bias: (C,) of ActNorm.
        permutation: (C,) int64, the row of L U that each row of W is.
        sign: (C,) int8, of the diagonal.
        pixels: H*W of the step.
    """

    lower: Tensor
    upper: Tensor
    log_s: Tensor
    log_scale: Tensor
    bias: Tensor
    permutation: Tensor
    sign: Tensor
    pixels: int

    def tensors(self) -> list[Tensor]:
        """All parameters, in the order in which kernels take their addresses."""
        factors = [self.lower, self.upper, self.log_s]
        return [*factors, self.log_scale, self.bias, self.permutation, self.sign]


class ChannelMap(NamedTuple):
    """The map of a layer, or its inverse.

    Attributes:
        weight: A (C, C); None where `affine` is given.
        bias: c (C,); None where `affine` is given.
        inverse: (C, C), the inverse of A, where it was asked for; None where `affine` is given.
        affine: (2,), the factor and the constant of a layer of one channel where this form was asked
            for; with inverses, the factor of the inverse, whose constant is subtracted first.
    """

    weight: Tensor | None
    bias: Tensor | None
    inverse: Tensor | None
    affine: Tensor | None


# -- definition ----------------------------------------------------------------------------------------------


def lu_factors(lower: Tensor, upper: Tensor, log_s: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """(L, U) in float64, U with its diagonal."""
    eye = torch.eye(log_s.numel(), dtype=torch.float64, device=log_s.device)
    return lower.double().tril(-1) + eye, upper.double().triu(1) + torch.diag(sign * log_s.double().exp())


def lu_weight(lower: Tensor, upper: Tensor, permutation: Tensor) -> Tensor:
    """W (C, C) of the factors (L, U)."""
    product: Tensor = lower @ upper
    return product[permutation]


def lu_inverse(lower: Tensor, upper: Tensor, permutation: Tensor) -> Tensor:
    """W^-1 (C, C) of the factors (L, U), by two triangular solves."""
    eye = torch.eye(len(permutation), dtype=torch.float64, device=permutation.device)
    # W = P L U with (P A)[i] = A[permutation[i]], so the columns of P^T are rows of the identity at those
    # places.
    permuted = torch.zeros_like(eye).index_put(
        (permutation, torch.arange(len(eye), device=eye.device)), eye.new_ones(())
    )
    half = torch.linalg.solve_triangular(lower, permuted, upper=False, unitriangular=True)
    out: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)
    return out


def _weight(layer: MixingLayer) -> Tensor:
    factors = lu_factors(layer.lower, layer.upper, layer.log_s, layer.sign)
    return lu_weight(*factors, layer.permutation)


def mixing_reference(layer: MixingLayer) -> tuple[Tensor, Tensor]:
    """(A, c) of a layer in float64."""
    weight = _weight(layer)
    scale = layer.log_scale.double().exp()
    bias = weight @ layer.bias.double()
    return weight * scale, bias


def inverse_mixing_reference(layer: MixingLayer) -> Tensor:
    """A^-1 of a layer in float64."""
    factors = lu_factors(layer.lower, layer.upper, layer.log_s, layer.sign)
    return lu_inverse(*factors, layer.permutation) / layer.log_scale.double().exp()[:, None]


def affine_reference(layer: MixingLayer, inverse: bool) -> Tensor:
    """The map of a layer of one channel as (2,) in float64."""
    weight = _weight(layer).reshape(1)
    factor = (
        inverse_mixing_reference(layer).reshape(1) if inverse else weight * layer.log_scale.double().exp()
    )
    return torch.cat((factor, weight * layer.bias.double()))


def mixing_logdet_reference(layer: MixingLayer) -> Tensor:
    """Log-determinant of a layer, a scalar in float64."""
    total: Tensor = layer.log_scale.double().sum() + layer.log_s.double().sum()
    return layer.pixels * total


def lu_mixing_reference(
    layers: Sequence[MixingLayer], affine: Sequence[bool], inverse: bool
) -> tuple[list[ChannelMap], Tensor]:
    """The definition, in plain ATen, with the results of `lu_mixing`."""
    maps = []
    for layer, pair in zip(layers, affine, strict=True):
        dtype = layer.bias.dtype
        if pair:
            maps.append(ChannelMap(None, None, None, affine_reference(layer, inverse).to(dtype)))
        else:
            weight, bias = mixing_reference(layer)
            matrix = inverse_mixing_reference(layer).to(dtype) if inverse else None
            maps.append(ChannelMap(weight.to(dtype), bias.to(dtype), matrix, None))
    return maps, torch.stack([mixing_logdet_reference(layer) for layer in layers])


def _backward_of(layer: MixingLayer, grad_weight: Tensor, grad_bias: Tensor, grad: Tensor) -> list[Tensor]:
    """Gradients of a layer's five parameters in float64, in their order."""
    lower, upper = lu_factors(layer.lower, layer.upper, layer.log_s, layer.sign)
    scale, share = layer.log_scale.double().exp(), layer.pixels * grad
    permuted = lower[layer.permutation]
    through, constant = permuted.t() @ grad_weight, permuted.t() @ grad_bias
    d_upper = through * scale + torch.outer(constant, layer.bias.double())
    d_permuted = (grad_weight * scale + torch.outer(grad_bias, layer.bias.double())) @ upper.t()
    d_lower = torch.empty_like(d_permuted)
    d_lower[layer.permutation] = d_permuted
    d_log_s = d_upper.diagonal() * upper.diagonal() + share
    d_log_scale = (upper * through).sum(dim=0) * scale + share
    return [d_lower.tril(-1), d_upper.triu(1), d_log_s, d_log_scale, upper.t() @ constant]


# -- op and autograd -----------------------------------------------------------------------------------------


def _layers(params: Sequence[Tensor], pixels: Sequence[int]) -> list[MixingLayer]:
    columns = [params[i::TENSORS] for i in range(TENSORS)]
    return [MixingLayer(*row) for row in zip(*columns, pixels, strict=True)]


def _slice(flat: Tensor, at: int, *shape: int) -> Tensor:
    """A contiguous (C,) or (C, C) view of a flat buffer."""
    return flat.as_strided(shape, (shape[1], 1) if len(shape) == 2 else (1,), at)


def _slices(flat: Tensor, channels: Sequence[int], affine: Sequence[bool], inverse: bool) -> list[Tensor]:
    """The results of all layers as views: weight, bias and inverse, or the affine pair."""
    places, _ = map_places(tuple(channels), tuple(affine), inverse)
    views = []
    for c, place, pair in zip(channels, places, affine, strict=True):
        if pair:
            views.append(_slice(flat, place.bias - 1, 2))
            continue
        views += [_slice(flat, place.weight, c, c), _slice(flat, place.bias, c)]
        if inverse:
            views.append(_slice(flat, place.inverse, c, c))
    return views


def _mixing_cpu(
    params: Sequence[Tensor], pixels: Sequence[int], affine: Sequence[bool], inverse: bool
) -> tuple[Tensor, Tensor]:
    channels = channels_of(params)
    maps, logdets = lu_mixing_reference(_layers(params, pixels), affine, inverse)
    out = params[0].new_zeros(map_places(channels, tuple(affine), inverse)[1])
    found = [value for one in maps for value in one if value is not None]
    for view, value in zip(_slices(out, channels, affine, inverse), found, strict=True):
        view.copy_(value)
    return out, logdets


def _mixing_fake(
    params: Sequence[Tensor], pixels: Sequence[int], affine: Sequence[bool], inverse: bool
) -> tuple[Tensor, Tensor]:
    # Symbolic sizes are no keys of a cache.
    size = map_places.__wrapped__(channels_of(params), tuple(affine), inverse)[1]
    return params[0].new_empty(size), params[0].new_empty(len(pixels), dtype=torch.float64)


def _mixing_unsupported(
    params: Sequence[Tensor], pixels: Sequence[int], affine: Sequence[bool], inverse: bool
) -> str:
    return _unsupported(params)


def _mixing_backward_cpu(
    grad: Tensor, grad_logdets: Tensor, params: Sequence[Tensor], pixels: Sequence[int]
) -> Tensor:
    channels = channels_of(params)
    places, size = param_places(channels)
    d = params[0].new_zeros(size)
    grads = grad.double().split([n for c in channels for n in (c * c, c)])
    layers = _layers(params, pixels)
    for i, (c, layer, place) in enumerate(zip(channels, layers, places, strict=True)):
        found = _backward_of(layer, grads[2 * i].view(c, c), grads[2 * i + 1], grad_logdets[i])
        for at, value in zip(place, found, strict=True):
            _slice(d, at, *value.shape).copy_(value)
    return d


def _mixing_backward_fake(
    grad: Tensor, grad_logdets: Tensor, params: Sequence[Tensor], pixels: Sequence[int]
) -> Tensor:
    return params[0].new_empty(param_places.__wrapped__(channels_of(params))[1])


def _mixing_backward_unsupported(
    grad: Tensor, grad_logdets: Tensor, params: Sequence[Tensor], pixels: Sequence[int]
) -> str:
    return _unsupported(params)


def _unsupported(params: Sequence[Tensor]) -> str:
    largest, dtype = max(channels_of(params)), params[0].dtype
    if largest > MAX_CHANNELS:
        return f"{largest} channels, more than the {MAX_CHANNELS} that the kernel holds"
    if dtype not in (torch.float32, torch.float64):
        return f"parameters are {dtype}, the kernel reads float32 and float64"
    if not all(tensor.is_contiguous() for tensor in params):
        return "a parameter is not contiguous"
    return ""


_forward = register(
    "lu_mixing",
    definition=lu_mixing_reference,
    cpu=_mixing_cpu,
    triton=launch_lu_mixing,
    fake=_mixing_fake,
    functions=("lu_mixing",),
    unsupported=_mixing_unsupported,
    limit=f"above {MAX_CHANNELS} channels the matrices one after the other",
)
_backward = register(
    "lu_mixing_backward",
    definition=_mixing_backward_cpu,
    triton=launch_lu_mixing_backward,
    fake=_mixing_backward_fake,
    unsupported=_mixing_backward_unsupported,
)


class LuMixing(torch.autograd.Function):
    """The forward maps under autograd; a second derivative is an error.

    Every map is an output of its own, since the backward pass of a slice would fill a buffer with zeros.
    """

    @staticmethod
    def forward(ctx: Any, pixels: list[int], affine: list[bool], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*params)
        ctx.pixels, ctx.affine = pixels, affine
        out, logdets = _forward(list(params), pixels, affine, False)
        return logdets, *_slices(out, channels_of(params), affine, False)

    @staticmethod
    def backward(ctx: Any, grad_logdets: Tensor | None, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative("lu_mixing")
        params = ctx.saved_tensors
        channels = channels_of(params)
        if grad_logdets is None:
            grad_logdets = torch.zeros(len(channels), dtype=torch.float64, device=params[0].device)
        flat = _backward(
            _joined(grads, channels, ctx.affine, params[0]), grad_logdets, list(params), ctx.pixels
        )
        found: list[Tensor | None] = []
        for c, place in zip(channels, param_places(channels)[0], strict=True):
            found += [_slice(flat, place.lower, c, c), _slice(flat, place.upper, c, c)]
            found += [_slice(flat, at, c) for at in (place.log_s, place.log_scale, place.bias)]
            found += [None, None]
        return None, None, *found


def _joined(
    grads: Sequence[Tensor | None], channels: Sequence[int], affine: Sequence[bool], like: Tensor
) -> Tensor:
    """The gradients of all maps in one flat buffer, zero where there is none."""
    sizes = [n for c, pair in zip(channels, affine, strict=True) for n in ((2,) if pair else (c * c, c))]
    missing = [n for n, grad in zip(sizes, grads, strict=True) if grad is None]
    if len(missing) == len(sizes):
        return like.new_zeros(sum(sizes))
    zeros = like.new_zeros(max(missing)) if missing else like
    parts = [zeros[:n] if grad is None else grad.reshape(-1) for n, grad in zip(sizes, grads, strict=True)]
    return torch.cat(parts)


def runs_lu_mixing(layers: Sequence[MixingLayer]) -> bool:
    """Whether `lu_mixing` computes all of `layers` in one launch; elsewhere it saves its caller nothing."""
    if torch.compiler.is_compiling() or not runs_triton(layers[0].bias):
        return False
    return not _unsupported([tensor for layer in layers for tensor in layer.tensors()])


def lu_mixing(
    layers: Sequence[MixingLayer], affine: Sequence[bool] | None = None, inverse: bool = False
) -> tuple[list[ChannelMap], Tensor]:
    """The maps of the channels of many steps.

    Args:
        layers: S of them.
        affine: (S,) which layers, all of one channel, give their map as one (2,) tensor; none when None.
        inverse: find inverse matrices too.

    Returns:
        `(maps, logdets)`: the map of each layer in the dtype of its parameters, and (S,) log-determinants in
        nats, float64.

    Raises:
        ValueError: there is no layer, or a shape, dtype or device does not fit.

    Example:
        >>> eye, zeros, order = torch.eye(2), torch.zeros(2), torch.arange(2)
        >>> layer = MixingLayer(eye, eye, zeros, zeros, zeros, order, torch.ones(2, dtype=torch.int8), 9)
        >>> maps, logdets = lu_mixing([layer])
        >>> maps[0].weight.tolist(), logdets.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [0.0])
    """
    layers = list(layers)
    affine = [False] * len(layers) if affine is None else list(affine)
    _check(layers, affine)
    params = [tensor for layer in layers for tensor in layer.tensors()]
    if not runs_lu_mixing(layers) or (inverse and is_recorded(*params)):
        return lu_mixing_reference(layers, affine, inverse)
    pixels = [layer.pixels for layer in layers]
    if inverse:
        out, logdets = _forward(params, pixels, affine, True)
        views = _slices(out, channels_of(params), affine, True)
    else:
        logdets, *views = LuMixing.apply(pixels, affine, *params)
    return list(_maps(iter(views), affine, inverse)), logdets


def _maps(views: Iterator[Tensor], affine: Sequence[bool], inverse: bool) -> Iterator[ChannelMap]:
    for pair in affine:
        if pair:
            yield ChannelMap(None, None, None, next(views))
        else:
            yield ChannelMap(next(views), next(views), next(views) if inverse else None, None)


def _check(layers: Sequence[MixingLayer], affine: Sequence[bool]) -> None:
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    if len(affine) != len(layers):
        raise ValueError(f"affine must have an entry per layer, {len(layers)} in all, got {len(affine)}")
    first = layers[0].bias
    for i, (layer, pair) in enumerate(zip(layers, affine, strict=True)):
        c = layer.log_s.shape[0]
        if pair and c != 1:
            raise ValueError(f"affine[{i}] must be False for a layer of {c} channels, got True")
        for name, tensor in zip(MixingLayer._fields, layer.tensors(), strict=False):
            shape = (c, c) if name in ("lower", "upper") else (c,)
            kind = {"permutation": torch.int64, "sign": torch.int8}.get(name, first.dtype)
            if tensor.shape != shape or tensor.dtype != kind or tensor.device != first.device:
                raise ValueError(
                    f"layers[{i}].{name} must be {shape} {kind} on {first.device}, got "
                    f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
                )
