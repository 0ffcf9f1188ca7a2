"""`norm_film_act` on a CPU, in few passes over memory, with the native group norm forward and backward."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastflow.kernels.cpu.activations import gelu_
from fastflow.kernels.dropout import (
    COUNTER_FACTOR,
    FIRST_FACTOR,
    SECOND_FACTOR,
    drop_threshold,
    keep_scale,
    signed_int32,
)
from fastflow.kernels.layouts import is_channels_last, memory_format
from fastflow.numerics import acc_dtype


def _as_one_sample(x: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Sizes of x as one sample, whose channels and groups are those of the whole batch.

    In that form the native op applies the rows of the tables, and its backward returns their gradients per
    sample.
    """
    batch, channels, h, w = x.shape
    return 1, batch * channels, h * w, batch * groups


@functools.lru_cache(maxsize=32)
def _counter(n: int) -> Tensor:
    """(n,) int32: the share of an element's index in the hash after its first shift."""
    return _shifted(torch.arange(n, dtype=torch.int32).mul_(signed_int32(COUNTER_FACTOR)))


def _shifted(value: Tensor) -> Tensor:
    return (value >> 16).bitwise_and_(0xFFFF).bitwise_xor_(value)


def _dropout_factors(seeds: Tensor, like: Tensor, threshold: int) -> Tensor:
    """`dropout_mask` times `keep_scale`, in the dtype and shape of `like`, in few passes over memory."""
    # The first shift of (seed ^ counter) is that of its parts.
    h = _shifted(seeds)[:, None] ^ _counter(like[0].numel())
    h *= FIRST_FACTOR
    h ^= (h >> 15).bitwise_and_(0x1FFFF)
    h *= signed_int32(SECOND_FACTOR)
    h ^= -(2**31)
    # The output is a float tensor because ATen does not vectorise comparisons into booleans.
    kept = torch.ge(h, threshold - 2**31, out=torch.empty(h.shape, dtype=like.dtype))
    return kept.mul_(keep_scale(threshold)).view(like.shape)


def norm_film_act_cpu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    label_index: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(result, mean and 1/deviation of each group (B, groups, 2))."""
    acc = acc_dtype(x.dtype)
    gammas, betas = (table.to(acc).index_select(0, label_index) for table in (gamma, beta))
    return _forward(x, gammas, betas, residual, seeds, groups, eps, dropout, dtype)


def norm_modulate_act_cpu(
    x: Tensor,
    modulation: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """(result, mean and 1/deviation of each group (B, groups, 2))."""
    gammas, betas = (part.to(acc_dtype(x.dtype)).contiguous() for part in modulation.unbind(2))
    return _forward(x, gammas, betas, residual, seeds, groups, eps, dropout, dtype)


def _forward(
    x: Tensor,
    gammas: Tensor,
    betas: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    eps: float,
    dropout: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The op with the scales and shifts (B, C) of each sample, in the accumulation dtype of x."""
    layout, acc = memory_format(is_channels_last(x)), acc_dtype(x.dtype)
    batch = x.shape[0]
    if x.numel() == 0:
        empty = x.to(dtype or x.dtype).contiguous(memory_format=layout)
        return empty, x.new_zeros(batch, groups, 2, dtype=acc)
    inner = x.to(acc).contiguous()
    z, mean, rstd = torch.native_group_norm(
        inner.view(1, -1, *x.shape[2:]), gammas.flatten(), betas.flatten(), *_as_one_sample(x, groups), eps
    )
    z = z.view(x.shape)
    if residual is not None:
        z += residual
    # The activation is in place, since on a CPU every fresh tensor costs page faults.
    y = gelu_(z)
    if seeds is not None:
        y *= _dropout_factors(seeds, y, drop_threshold(dropout))
    stats = torch.stack((mean.view(batch, groups), rstd.view(batch, groups)), dim=2)
    return y.to(dtype or x.dtype).contiguous(memory_format=layout), stats


def norm_film_act_backward_cpu(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    gamma: Tensor,
    beta: Tensor,
    label_index: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, the residual (empty without one), gamma and beta, the last two not narrowed."""
    acc = acc_dtype(x.dtype)
    gammas, betas = (table.to(acc).index_select(0, label_index) for table in (gamma, beta))
    dx, d_residual, d_gammas, d_betas = _backward(
        grad, x, stats, gammas, betas, residual, seeds, groups, dropout
    )
    d_gamma, d_beta = (
        torch.zeros(gamma.shape, dtype=acc).index_add_(0, label_index, part) for part in (d_gammas, d_betas)
    )
    return dx, d_residual, d_gamma, d_beta


def norm_modulate_act_backward_cpu(
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
    gammas, betas = (part.to(acc_dtype(x.dtype)).contiguous() for part in modulation.unbind(2))
    dx, d_residual, d_gammas, d_betas = _backward(
        grad, x, stats, gammas, betas, residual, seeds, groups, dropout
    )
    return dx, d_residual, torch.stack((d_gammas, d_betas), dim=2)


def _backward(
    grad: Tensor,
    x: Tensor,
    stats: Tensor,
    gammas: Tensor,
    betas: Tensor,
    residual: Tensor | None,
    seeds: Tensor | None,
    groups: int,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, the residual (empty without one), and the scales and shifts (B, C)."""
    layout, acc = memory_format(is_channels_last(x)), acc_dtype(x.dtype)
    batch, channels = x.shape[:2]
    if x.numel() == 0:
        d_residual = x.new_empty(0) if residual is None else torch.empty_like(residual)
        return torch.empty_like(x), d_residual, torch.zeros_like(gammas), torch.zeros_like(betas)
    # The native backward of channels_last takes ten times longer, and reads raw memory whatever the strides
    # say.
    inner, upper = x.to(acc).contiguous(), grad.to(acc).contiguous()
    mean, rstd = (part.contiguous() for part in stats.unbind(2))
    # z = x * slope + offset, where one pair for each channel holds the statistics and the tables.
    slope = gammas * rstd.repeat_interleave(channels // groups, dim=1)
    offset = torch.addcmul(betas, slope, mean.repeat_interleave(channels // groups, dim=1), value=-1)
    z = (inner * slope[:, :, None, None]).add_(offset[:, :, None, None])
    if residual is not None:
        z += residual
    if seeds is not None:
        upper = _dropout_factors(seeds, upper, drop_threshold(dropout)).mul_(upper)
    a = torch.ops.aten.gelu_backward.grad_input(upper, z, grad_input=z)
    one = inner.view(1, -1, *x.shape[2:])
    dx, d_gammas, d_betas = torch.ops.aten.native_group_norm_backward(
        a.view_as(one),
        one,
        mean.view(1, -1),
        rstd.view(1, -1),
        gammas.flatten(),
        *_as_one_sample(x, groups),
        [True] * 3,
    )
    dx = dx.view(x.shape).to(x.dtype).contiguous(memory_format=layout)
    d_residual = x.new_empty(0) if residual is None else a.to(residual.dtype).contiguous(memory_format=layout)
    return dx, d_residual, d_gammas.view(batch, channels), d_betas.view(batch, channels)
