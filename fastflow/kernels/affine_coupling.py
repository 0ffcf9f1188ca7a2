r"""Masked affine coupling with its log-determinant.

.. math:: s = b\tanh(r), \quad y = x e^{s} + t \ \text{(active)}, \quad y = x \ \text{(passive)}, \quad
          \log|\det| = \sum_{\text{active}} s

`x`, `raw_scale` r and `shift` t are (B, C, H, W); `mask` is bool, True = passive, and broadcasts over the batch.
The exponential, the product and the sums are float32 (float64 for float64 input). With ``inverse=True`` the direction is
y -> x and the log-determinant has the opposite sign. Source: RealNVP (Dinh et al., 2017), eq. 7-9; MAGIC-Flow for the bound.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels._library import accumulator, check_image, check_mask, check_same_shape, sum_per_sample


def affine_coupling_reference(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The definition, in plain ATen. The passive part comes back bit for bit: it is multiplied by exp(0) and 0 is added."""
    wide = accumulator(x.dtype)
    s = (bound * torch.tanh(raw_scale.to(wide))).masked_fill(mask, 0.0)
    t = shift.to(wide).masked_fill(mask, 0.0)
    if inverse:
        return ((x.to(wide) - t) * torch.exp(-s)).to(x.dtype), -sum_per_sample(s)
    return torch.addcmul(t, x.to(wide), torch.exp(s)).to(x.dtype), sum_per_sample(s)


def affine_coupling(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, bound: float = 0.5, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Transform the active part of `x`; pass the rest through.

    Args:
        x: (B, C, H, W) input (the output y when `inverse`).
        raw_scale: (B, C, H, W), the log-scale before its tanh.
        shift: (B, C, H, W).
        mask: (C, H, W) or (1, H, W), bool, True = passive (kept).
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the transform instead.

    Returns:
        `(y, logdet)`: y like x; logdet (B,) in nats, float32 or wider.

    Raises:
        ValueError: a shape or dtype does not fit, or `bound` is not positive.

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> mask = torch.tensor([[[True, False]]])
        >>> y, logdet = affine_coupling(x, torch.zeros_like(x), torch.ones_like(x), mask)
        >>> y.flatten().tolist(), logdet.tolist()
        ([1.0, 2.0], [0.0])
    """
    check_image("x", x)
    check_same_shape("raw_scale", raw_scale, x)
    check_same_shape("shift", shift, x)
    check_mask(mask, x)
    if bound <= 0:
        raise ValueError(f"bound must be positive, got {bound}")
    return affine_coupling_reference(x, raw_scale, shift, mask, bound, inverse)
