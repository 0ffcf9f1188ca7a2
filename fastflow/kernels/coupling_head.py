r"""Heads of the classification conditioner together with the coupling that they drive.

.. math:: r = F_s W_s^\top + S_k, \quad t = F_t W_t^\top + T_k, \quad (y, \log|\det|) = \text{affine\_coupling}(x, r, t)

`x` (B, C, H, W), N = C*H*W; features F (B, F); weights W (N, F); per-label tables S, T (K, N), bias included; `rows` (B,) names
each sample's row k. Source: MAGIC-Flow, classification conditioner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels._library import check_image, check_mask, runs_triton, sum_per_sample
from fastflow.kernels.affine_coupling import (
    affine_coupling,
    affine_coupling_reference,
    check_affine,
    coupling_step,
    finish_step_reference,
)


def head_reference(x: Tensor, features: Tensor, weight: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """One head's output in the shape of `x`."""
    return (F.linear(features, weight) + table[rows]).view_as(x)


def coupling_head_reference(
    x: Tensor,
    features: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    rows: Tensor,
    mask: Tensor,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain ATen."""
    return affine_coupling_reference(x, *_heads(x, features, weights, tables, rows), mask, bound, inverse)


class _CouplingHead(torch.autograd.Function):
    """The forward direction with a hand-written backward: a third of the passes over memory that autograd would make."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale_features: Tensor,
        shift_features: Tensor,
        scale_weight: Tensor,
        shift_weight: Tensor,
        scale_table: Tensor,
        shift_table: Tensor,
        rows: Tensor,
        active: Tensor,
        bound: float,
    ) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        squashed = torch.addmm(scale_table[rows], scale_features, scale_weight.t()).tanh_()
        s = (bound * squashed).mul_(active)
        growth = s.exp()
        y = torch.addmm(shift_table[rows], shift_features, shift_weight.t()).mul_(active).addcmul_(flat, growth)
        ctx.save_for_backward(flat, squashed, growth, scale_features, shift_features, scale_weight, shift_weight, rows, active)
        ctx.bound, ctx.classes, ctx.shape = bound, len(scale_table), x.shape
        return y.view_as(x), sum_per_sample(s)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor) -> tuple[Tensor | None, ...]:
        flat, squashed, growth, scale_features, shift_features, scale_weight, shift_weight, rows, active = ctx.saved_tensors
        grad = grad_y.flatten(1)
        d_x = grad * growth
        d_shift = grad * active
        # ds = g x e^s + q on the active part; ds/dr = b (1 - tanh^2 r).
        d_raw = torch.addcmul(grad_logdet[:, None].to(flat.dtype), d_x, flat)
        d_raw.mul_(active).mul_(torch.addcmul(squashed.new_tensor(ctx.bound), squashed, squashed, value=-ctx.bound))
        d_tables = (
            torch.zeros(ctx.classes, flat.shape[1], dtype=flat.dtype, device=flat.device).index_add_(0, rows, d)
            for d in (d_raw, d_shift)
        )
        return (
            d_x.view(ctx.shape),
            d_raw @ scale_weight,
            d_shift @ shift_weight,
            d_raw.t() @ scale_features,
            d_shift.t() @ shift_features,
            *d_tables,
            None,
            None,
            None,
        )


def coupling_head(
    x: Tensor,
    features: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    rows: Tensor,
    mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log-scale and shift from features and labels, and couple. Pairs are ordered (log-scale, shift).

    Args:
        x: (B, C, H, W), N = C*H*W.
        features: two (B, F).
        weights: two (N, F).
        tables: two (K, N).
        rows: (B,) int64, the table row of each sample.
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the coupling instead.

    Returns:
        `(y, logdet)`: y like x; logdet (B,) in nats, float32 or wider.

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    _check(x, features, weights, tables, mask)
    if runs_triton(x):
        return affine_coupling(x, *_heads(x, features, weights, tables, rows), mask, bound, inverse)
    trained = torch.is_grad_enabled() and not inverse and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if trained and len({v.dtype for v in (x, *features, *weights, *tables)}) == 1 and x.dtype in (torch.float32, torch.float64):
        active = (~mask).to(x.dtype).expand(x.shape[1:]).reshape(-1)
        y, logdet = _CouplingHead.apply(x, *features, *weights, *tables, rows, active, bound)
        return y, logdet
    return coupling_head_reference(x, features, weights, tables, rows, mask, bound, inverse)


def coupling_head_step(
    x: Tensor,
    features: tuple[Tensor, Tensor],
    weights: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    rows: Tensor,
    mask: Tensor,
    next_mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    *,
    affine: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`coupling_head` with the end of `coupling_step`: the one-channel mix that may follow, and the next conditioner's input.

    Args:
        x: (B, C, H, W), N = C*H*W.
        features: two (B, F).
        weights: two (N, F).
        tables: two (K, N).
        rows: (B,) int64, the table row of each sample.
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        next_mask: like `mask`; the next conditioner sees the result where it is True, and 0 elsewhere.
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the coupling instead.
        affine: (2,), see `coupling_step`.
        dtype: of the next conditioner's input; that of x when None.

    Returns:
        `(y, logdet, next_input)`: y like x; logdet (B,) in nats, that of the coupling alone; next_input (B, C, H, W).

    Raises:
        ValueError: a shape or dtype does not fit.
    """
    if runs_triton(x):
        _check(x, features, weights, tables, mask)
        heads = _heads(x, features, weights, tables, rows)
        return coupling_step(x, *heads, mask, next_mask, bound, inverse, affine=affine, dtype=dtype)
    y, logdet = coupling_head(x, features, weights, tables, rows, mask, bound, inverse)
    check_mask(next_mask, x, "next_mask")
    check_affine(affine, x)
    y, masked = finish_step_reference(y, next_mask, affine, inverse, dtype or x.dtype)
    return y, logdet, masked


def _heads(
    x: Tensor, features: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], rows: Tensor
) -> tuple[Tensor, Tensor]:
    scale, shift = (head_reference(x, *head, rows) for head in zip(features, weights, tables, strict=True))
    return scale, shift


def _check(
    x: Tensor, features: tuple[Tensor, Tensor], weights: tuple[Tensor, Tensor], tables: tuple[Tensor, Tensor], mask: Tensor
) -> None:
    check_image("x", x)
    check_mask(mask, x)
    size = x.shape[1] * x.shape[2] * x.shape[3]
    for name, values, columns in (("features", features, None), ("weights", weights, None), ("tables", tables, size)):
        for value in values:
            if value.ndim != 2 or (columns is not None and value.shape[1] != columns):
                raise ValueError(f"{name} must be 2-D with {columns or 'F'} columns, got {tuple(value.shape)}")
    for value, weight in zip(features, weights, strict=True):
        if value.shape[0] != x.shape[0] or tuple(weight.shape) != (size, value.shape[1]):
            raise ValueError(
                f"features (B, F) and weights (N, F) must fit x {tuple(x.shape)}, got {tuple(value.shape)}, {tuple(weight.shape)}"
            )
