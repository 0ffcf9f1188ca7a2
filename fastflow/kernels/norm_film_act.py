r"""GroupNorm, FiLM by label, an optional residual and GELU.

.. math:: y = \mathrm{gelu}\left(\gamma_{k}\,\frac{x - \mu_g}{\sqrt{\sigma_g^2 + \epsilon}} + \beta_{k} + r\right)

`x` and `residual` r (B, C, H, W); `gamma` and `beta` are tables (K, C) with one row per label, GroupNorm's own weight and bias
already folded in (gamma*w, gamma*b + beta); `rows` (B,) names each sample's row k. GELU is the exact one (erf). Statistics are
float32 or wider, centred. Sources: Wu & He, 2018 (GroupNorm); Perez et al., 2018 (FiLM, here without the "1 +").
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels._library import check_image, check_same_shape


def film_act_reference(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None) -> Tensor:
    """The definition, in plain ATen."""
    y = torch.addcmul(beta[rows][:, :, None, None], x, gamma[rows][:, :, None, None])
    return F.gelu(y if residual is None else y + residual)


def norm_film_act_reference(
    x: Tensor, groups: int, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None, eps: float
) -> Tensor:
    """The definition, in plain ATen: the native normalisation without its affine part is the fastest unfused form."""
    # torch.group_norm: the functional form refuses a group of one element, which is simply zero after normalisation.
    return film_act_reference(torch.group_norm(x, groups, eps=eps), gamma, beta, rows, residual)


def _check(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None) -> None:
    check_image("x", x)
    if gamma.ndim != 2 or gamma.shape[1] != x.shape[1] or gamma.shape != beta.shape:
        raise ValueError(f"gamma and beta must be (K, {x.shape[1]}), got {tuple(gamma.shape)} and {tuple(beta.shape)}")
    if tuple(rows.shape) != (x.shape[0],):
        raise ValueError(f"rows must be ({x.shape[0]},), got {tuple(rows.shape)}")
    if residual is not None:
        check_same_shape("residual", residual, x)


def film_act(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, residual: Tensor | None = None) -> Tensor:
    """`norm_film_act` without the normalisation, for values that another norm (BatchNorm) has normalised.

    Args:
        x: (B, C, H, W).
        gamma: (K, C) table.
        beta: (K, C) table.
        rows: (B,) int64, the table row of each sample.
        residual: (B, C, H, W) or None, added before the activation.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape does not fit.
    """
    _check(x, gamma, beta, rows, residual)
    return film_act_reference(x, gamma, beta, rows, residual)


def norm_film_act(
    x: Tensor,
    groups: int,
    gamma: Tensor,
    beta: Tensor,
    rows: Tensor,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise over groups of channels, modulate by label, add the residual, activate.

    Args:
        x: (B, C, H, W).
        groups: number of channel groups; divides C.
        gamma: (K, C) table.
        beta: (K, C) table.
        rows: (B,) int64, the table row of each sample.
        residual: (B, C, H, W) or None.
        eps: added to the variance.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: a shape does not fit, or `groups` does not divide C.

    Example:
        >>> x = torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
        >>> norm_film_act(x, 1, torch.ones(1, 1), torch.zeros(1, 1), torch.tensor([0])).flatten()
        tensor([-0.1587,  0.8413])
    """
    _check(x, gamma, beta, rows, residual)
    if groups < 1 or x.shape[1] % groups:
        raise ValueError(f"groups must divide the {x.shape[1]} channels of x, got {groups}")
    return norm_film_act_reference(x, groups, gamma, beta, rows, residual, eps)
