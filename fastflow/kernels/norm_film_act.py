r"""GroupNorm, FiLM by label, an optional residual, GELU and an optional dropout.

.. math:: y = m \cdot \mathrm{gelu}(z), \quad z = \gamma_k \hat x + \beta_k + r, \quad
          \hat x = \frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}}

`x` and `residual` r are (B, C, H, W). `gamma` and `beta` are tables (K, C) with one row per label, into which
the weight and bias of the GroupNorm are already folded (gamma*w, gamma*b + beta); `label_index` (B,) gives
the row k of each sample. GELU is the exact one (erf). Statistics, z and all sums are float32 (float64 for
float64 x), the variance is that of centred values; y has the dtype asked for. Dropout multiplies by m, 0 or
1/(1 - p), which each sample's 32-bit seed decides as `fastflow.kernels.dropout` describes; nothing but the
seeds is saved for it.

Backward, with a = dy m gelu'(z), means over the elements of a group, and sums over the samples of label k:

.. math:: dx = \frac{\gamma a - \overline{\gamma a} - \hat x\,\overline{\gamma a \hat x}}
          {\sqrt{\sigma_g^2 + \epsilon}}, \quad dr = a, \quad d\gamma_k = \sum a \hat x, \quad
          d\beta_k = \sum a

The mean and 1/deviation of each group are saved, z is computed again.

Inputs are contiguous or channels_last, with any batch stride. Sources: Wu & He, 2018 (GroupNorm); Perez et
al., 2018 (FiLM, here without the "1 +"); Chan, Golub & LeVeque, 1983 (joining variances).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow._deprecated import renamed_arguments
from fastflow.kernels.checks import (
    check_dtype,
    check_image,
    check_label_index,
    check_same_shape,
    check_tables,
)
from fastflow.kernels.cpu.norm_film_act import norm_film_act_backward_cpu, norm_film_act_cpu
from fastflow.kernels.dropout import checked_seeds, drop_threshold, dropout_mask, keep_scale
from fastflow.kernels.layouts import empty_image, is_channels_last
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.norm_film_act import launch_norm_film_act
from fastflow.kernels.triton.norm_film_act_backward import launch_norm_film_act_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype

# -- definition
# --------------------------------------------------------------------------------------------------


def film_act_reference(
    x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, residual: Tensor | None
) -> Tensor:
    """The definition of `film_act`, in plain ATen."""
    y = torch.addcmul(beta[label_index][:, :, None, None], x, gamma[label_index][:, :, None, None])
    return F.gelu(y if residual is None else y + residual)


def norm_film_act_reference(
    x: Tensor,
    groups: int,
    gamma: Tensor,
    beta: Tensor,
    label_index: Tensor,
    residual: Tensor | None,
    eps: float,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition, in plain ATen; normalising without the affine part is the fastest unfused form."""
    acc = acc_dtype(x.dtype)
    # torch.group_norm is used since the functional form refuses a group of one element, which normalises to
    # zero.
    normed = torch.group_norm(x.to(acc), groups, eps=eps)
    y = film_act_reference(
        normed, gamma.to(acc), beta.to(acc), label_index, None if residual is None else residual.to(acc)
    )
    if seeds is not None:
        threshold = drop_threshold(dropout)
        y = y * dropout_mask(seeds, x.shape[1:], threshold) * keep_scale(threshold)
    return y.to(dtype or x.dtype)


def norm_film_act_backward_reference(
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
    """The gradients of x, the residual (empty without one), gamma and beta by the formula of this module."""
    acc, size = acc_dtype(x.dtype), x.shape[1] // groups
    mean, rstd = (part.repeat_interleave(size, 1)[:, :, None, None] for part in stats.unbind(2))
    gammas, betas = (table.to(acc)[label_index][:, :, None, None] for table in (gamma, beta))
    normed = (x.to(acc) - mean) * rstd
    z = torch.addcmul(betas, normed, gammas)
    a = grad.to(acc)
    if residual is not None:
        z = z + residual
    if seeds is not None:
        threshold = drop_threshold(dropout)
        a = a * dropout_mask(seeds, x.shape[1:], threshold) * keep_scale(threshold)
    a = torch.ops.aten.gelu_backward(a, z)

    def group_mean(value: Tensor) -> Tensor:
        means = value.unflatten(1, (groups, -1)).mean(dim=(2, 3, 4))
        return means.repeat_interleave(size, 1)[:, :, None, None]

    dx = rstd * (gammas * a - group_mean(gammas * a) - normed * group_mean(gammas * a * normed))
    d_gamma, d_beta = (
        torch.zeros(gamma.shape, dtype=acc, device=x.device).index_add(0, label_index, value.sum(dim=(2, 3)))
        for value in (a * normed, a)
    )
    d_residual = x.new_empty(0) if residual is None else a.to(residual.dtype)
    return dx.to(x.dtype), d_residual, d_gamma, d_beta


# -- op and autograd
# ---------------------------------------------------------------------------------------------


def _norm_film_act_fake(
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
    stats = x.new_empty(x.shape[0], groups, 2, dtype=acc_dtype(x.dtype))
    return empty_image(x.shape, x, is_channels_last(x), dtype), stats


def _norm_film_act_backward_fake(
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
    channels_last, acc = is_channels_last(x), acc_dtype(x.dtype)
    d_residual = x.new_empty(0) if residual is None else empty_image(x.shape, residual, channels_last)
    d_gamma, d_beta = (gamma.new_empty(gamma.shape, dtype=acc) for _ in range(2))
    return empty_image(x.shape, x, channels_last), d_residual, d_gamma, d_beta


_norm_film_act = register(
    "norm_film_act",
    definition=norm_film_act_reference,
    cpu=norm_film_act_cpu,
    triton=launch_norm_film_act,
    fake=_norm_film_act_fake,
    functions=("norm_film_act",),
)
_norm_film_act_backward = register(
    "norm_film_act_backward",
    definition=norm_film_act_backward_reference,
    cpu=norm_film_act_backward_cpu,
    triton=launch_norm_film_act_backward,
    fake=_norm_film_act_backward_fake,
)
register(
    "film_act", definition=film_act_reference, triton=None, fake=film_act_reference, functions=("film_act",)
)


class NormFilmAct(torch.autograd.Function):
    """The op under autograd; a second derivative is an error.

    Saves the inputs and two numbers per group.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        y, stats = _norm_film_act(x, gamma, beta, label_index, residual, seeds, groups, eps, dropout, dtype)
        ctx.save_for_backward(x, stats, gamma, beta, label_index, residual, seeds)
        ctx.groups, ctx.dropout = groups, dropout
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("norm_film_act")
        # Saved tensors are unpacked once, since a second time is an error under activation checkpointing.
        x, stats, gamma, beta, label_index, residual, seeds = ctx.saved_tensors
        dx, d_residual, d_gamma, d_beta = _norm_film_act_backward(
            grad, x, stats, gamma, beta, label_index, residual, seeds, ctx.groups, ctx.dropout
        )
        d_residual = None if residual is None else d_residual
        tables = d_gamma.to(gamma.dtype), d_beta.to(beta.dtype)
        return dx, *tables, None, d_residual, None, None, None, None, None


def _check(x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, residual: Tensor | None) -> None:
    check_image("x", x)
    check_tables(("gamma", gamma), ("beta", beta), x.shape[1], x)
    check_label_index(label_index, x.shape[0], gamma.shape[0], x)
    if residual is not None:
        check_same_shape("residual", residual, x)


@renamed_arguments(rows="label_index")
def film_act(
    x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`norm_film_act` without the normalisation, for values that another norm (BatchNorm) has normalised.

    Args:
        x: (B, C, H, W).
        gamma: (K, C) table.
        beta: (K, C) table.
        label_index: (B,) int64, the table row of each sample.
        residual: (B, C, H, W) or None, added before the activation.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape does not fit, or a `label_index` is not in the tables.
    """
    _check(x, gamma, beta, label_index, residual)
    return film_act_reference(x, gamma, beta, label_index, residual)


@planned
@renamed_arguments(rows="label_index", keys="seeds")
def norm_film_act(
    x: Tensor,
    groups: int,
    gamma: Tensor,
    beta: Tensor,
    label_index: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    *,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise over groups of channels, modulate by label, add the residual, activate, drop.

    Args:
        x: (B, C, H, W).
        groups: number of channel groups; divides C.
        gamma: (K, C) table.
        beta: (K, C) table.
        label_index: (B,) int64, the table row of each sample.
        residual: (B, C, H, W) or None.
        eps: added to the variance.
        dropout: probability that an element becomes 0; the others are multiplied by 1/(1 - dropout).
        seeds: (B,) int32, of `dropout_seeds`: the same seeds drop the same elements. None draws fresh ones.
        dtype: dtype of the result; that of x when None.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, `groups` does not divide C, a `label_index` is not
            in the tables, or `dropout` is not in [0, 1).

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
        >>> norm_film_act(x, 1, torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0])).flatten()
        tensor([-0.1587,  0.8413])
    """
    _check(x, gamma, beta, label_index, residual)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    seeds = checked_seeds(x, dropout, seeds)
    if dtype is not None:
        check_dtype("dtype", torch.empty(0, dtype=dtype))
    if takes_reference():
        return norm_film_act_reference(
            x, groups, gamma, beta, label_index, residual, eps, dropout, seeds, dtype
        )
    inputs = (x, gamma, beta, label_index, residual, seeds, groups, eps, dropout, dtype)
    if not is_recorded(x, gamma, beta, residual):
        y: Tensor = _norm_film_act(*inputs)[0]
        return y
    out: Tensor = differentiate(NormFilmAct, *inputs)
    return out
