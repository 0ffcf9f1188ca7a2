r"""Heads of the classification conditioner together with the coupling that they drive.

.. math:: r = F_s W_s^\top + S_k, \quad t = F_t W_t^\top + T_k, \quad (y, \log|\det|) = \text{affine\_coupling}(x, r, t)

`x` (B, C, H, W), N = C*H*W; features F (B, F); weights W (N, F); per-label tables S, T (K, N), bias included; `rows` (B,) names
each sample's row k. Source: MAGIC-Flow, classification conditioner.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels._library import check_image, check_mask
from fastflow.kernels.affine_coupling import affine_coupling_reference


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
    raw_scale, shift = (head_reference(x, *head, rows) for head in zip(features, weights, tables, strict=True))
    return affine_coupling_reference(x, raw_scale, shift, mask, bound, inverse)


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
    return coupling_head_reference(x, features, weights, tables, rows, mask, bound, inverse)
