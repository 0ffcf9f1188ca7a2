r"""Masked affine coupling with its log-determinant, and the next conditioner's input in the same launch.

.. math:: s = b\tanh(r), \quad y = x e^{s} + t \ \text{(active)}, \quad y = x \ \text{(passive)}, \quad
          \log|\det| = \sum_{\text{active}} s

`x`, `raw_scale` r and `shift` t are (B, C, H, W) of any float dtypes; `mask` is bool, True = passive, and
broadcasts over the batch. The exponential, the product and the sums are float32 (float64 for float64 x). With
``inverse=True`` the direction is y -> x and the log-determinant has the opposite sign.

Backward, with g = dy, q = dlogdet: dt = g; dx = g e^s; dr = (g x e^s + q)(b - s^2/b); passive: dx = g,
dr = dt = 0. Inverse, with u the result and g = du: dt = -g e^{-s}; dy = g e^{-s}; dr = -(g u + q)(b - s^2/b).

`coupling_step` adds the end of a flow step: a one-channel `channel_mix` that follows is one multiply-add on
the way out, ``y a + c`` (inverse: ``(y - c) a``), and the masked result that the next conditioner reads is
written beside it in that conditioner's dtype.

x may be contiguous or channels_last with any batch stride; results have its layout. Sources: RealNVP (Dinh et
al., 2017), eq. 7-9; MAGIC-Flow for the bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import check_device, check_image, check_mask, check_same_shape
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import refuse_second_derivative, register, takes_reference
from fastflow.kernels.triton.affine_coupling import (
    conditioner_layout,
    launch_affine_coupling,
    launch_affine_coupling_backward,
)
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype, sum_per_sample

# -- definition ----------------------------------------------------------------------------------------------


def affine_coupling_reference(
    x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """The definition, in plain ATen.

    The passive part comes back bit for bit: it is multiplied by exp(0) and 0 is added.
    """
    acc = acc_dtype(x.dtype)
    s = (bound * torch.tanh(raw_scale.to(acc))).masked_fill(mask, 0.0)
    t = shift.to(acc).masked_fill(mask, 0.0)
    if inverse:
        return ((x.to(acc) - t) * torch.exp(-s)).to(x.dtype), -sum_per_sample(s)
    return torch.addcmul(t, x.to(acc), torch.exp(s)).to(x.dtype), sum_per_sample(s)


def finish_step_reference(
    y: Tensor, next_mask: Tensor, affine: Tensor | None, inverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The end of a step after its coupling, in plain ATen: the multiply-add and the masked copy."""
    if affine is not None:
        a, c = affine.to(acc_dtype(y.dtype))
        y_acc = y.to(acc_dtype(y.dtype))
        y = ((y_acc - c) * a if inverse else torch.addcmul(c, y_acc, a)).to(y.dtype)
    return y, y.masked_fill(~next_mask, 0.0).to(dtype)


def affine_coupling_backward_reference(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, raw_scale, shift and affine, in plain ATen; the last one is empty without `affine`."""
    acc = acc_dtype(x.dtype)
    g = grad_y.to(acc)
    if next_mask is not None:
        g = g + grad_masked.to(acc).masked_fill(~next_mask, 0.0)
    s = (bound * torch.tanh(raw_scale.to(acc))).masked_fill(mask, 0.0)
    t = shift.to(acc).masked_fill(mask, 0.0)
    growth = torch.exp(-s if inverse else s)
    # y is the coupling's result before the multiply-add.
    x_acc = x.to(acc)
    y = (x_acc - t) * growth if inverse else torch.addcmul(t, x_acc, growth)
    d_affine = x.new_empty(0, dtype=acc)
    if affine is not None:
        a, c = affine.to(acc)
        if inverse:
            d_affine = torch.stack(((g * (y - c)).sum(), -a * g.sum()))
        else:
            d_affine = torch.stack(((g * y).sum(), g.sum()))
        g = g * a
    d_x = g * growth
    q = grad_logdet.to(acc)[:, None, None, None]
    slope = bound - s * s / bound
    if inverse:
        d_raw, d_shift = -(g * y + q) * slope, -d_x
    else:
        d_raw, d_shift = torch.addcmul(q, d_x, x_acc) * slope, g
    return (
        d_x.to(x.dtype),
        d_raw.masked_fill(mask, 0.0).to(raw_scale.dtype),
        d_shift.masked_fill(mask, 0.0).to(shift.dtype),
        d_affine,
    )


# -- op and autograd -----------------------------------------------------------------------------------------


def _coupling_cpu(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = memory_format(is_channels_last(x))
    y, logdet = affine_coupling_reference(x, raw_scale, shift, mask, bound, inverse)
    masked = x.new_empty(0)
    if next_mask is not None:
        y, masked = finish_step_reference(y, next_mask, affine, inverse, dtype or x.dtype)
        masked = masked.contiguous(memory_format=layout)
    return y.contiguous(memory_format=layout), logdet, masked


def _coupling_fake(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(x)
    masked = x.new_empty(0) if next_mask is None else empty_image(x.shape, x, channels_last, dtype)
    return empty_image(x.shape, x, channels_last), x.new_empty(x.shape[0], dtype=acc_dtype(x.dtype)), masked


def _coupling_backward_cpu(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_x, d_raw, d_shift, d_affine = affine_coupling_backward_reference(
        grad_y, grad_logdet, grad_masked, x, raw_scale, shift, mask, next_mask, affine, bound, inverse
    )
    channels_last = is_channels_last(x)
    layout = memory_format(conditioner_layout(raw_scale, shift, channels_last))
    return (
        d_x.contiguous(memory_format=memory_format(channels_last)),
        d_raw.contiguous(memory_format=layout),
        d_shift.contiguous(memory_format=layout),
        d_affine,
    )


def _coupling_backward_fake(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(x)
    layout = conditioner_layout(raw_scale, shift, channels_last)
    return (
        empty_image(x.shape, x, channels_last),
        empty_image(x.shape, raw_scale, layout),
        empty_image(x.shape, shift, layout),
        x.new_empty(0 if affine is None else 2, dtype=acc_dtype(x.dtype)),
    )


_forward = register(
    "affine_coupling",
    definition=affine_coupling_reference,
    cpu=_coupling_cpu,
    triton=launch_affine_coupling,
    fake=_coupling_fake,
    functions=("affine_coupling", "coupling_step"),
)
_backward = register(
    "affine_coupling_backward",
    definition=affine_coupling_backward_reference,
    cpu=_coupling_backward_cpu,
    triton=launch_affine_coupling_backward,
    fake=_coupling_backward_fake,
)


class AffineCoupling(torch.autograd.Function):
    """The op under autograd. Saves its inputs; a second derivative is an error."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        raw_scale: Tensor,
        shift: Tensor,
        mask: Tensor,
        next_mask: Tensor | None,
        affine: Tensor | None,
        bound: float,
        inverse: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, logdet, masked = _forward(x, raw_scale, shift, mask, next_mask, affine, bound, inverse, dtype)
        ctx.save_for_backward(x, raw_scale, shift, mask, next_mask, affine)
        ctx.bound, ctx.inverse = bound, inverse
        return y, logdet, masked

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("affine_coupling")
        x, raw_scale, shift, mask, next_mask, affine = ctx.saved_tensors
        d_x, d_raw, d_shift, d_affine = _backward(
            grad_y,
            grad_logdet,
            grad_masked,
            x,
            raw_scale,
            shift,
            mask,
            next_mask,
            affine,
            ctx.bound,
            ctx.inverse,
        )
        d_affine = None if affine is None else d_affine.to(affine.dtype)
        return d_x, d_raw, d_shift, None, None, d_affine, None, None, None


def _check(x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, bound: float) -> None:
    check_image("x", x)
    check_same_shape("raw_scale", raw_scale, x)
    check_same_shape("shift", shift, x)
    check_mask(mask, x)
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")


@planned
def affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform the active part of `x` and pass the rest through.

    Args:
        x: (B, C, H, W) input (the output y when `inverse`).
        raw_scale: (B, C, H, W), the log-scale before its tanh.
        shift: (B, C, H, W).
        mask: (C, H, W) or (1, H, W), bool, True = passive (kept).
        bound: the log-scale lies in (-bound, bound).
        inverse: compute x from y instead.

    Returns:
        `(y, logdet)`: y like x; logdet (B,) in nats, float32 or wider.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `bound` is not positive.

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> mask = torch.tensor([[[True, False]]])
        >>> y, logdet = affine_coupling(x, torch.zeros_like(x), torch.ones_like(x), mask)
        >>> y.flatten().tolist(), logdet.tolist()
        ([1.0, 2.0], [0.0])
    """
    _check(x, raw_scale, shift, mask, bound)
    if takes_reference():
        return affine_coupling_reference(x, raw_scale, shift, mask, bound, inverse)
    y, logdet, _ = differentiate(AffineCoupling, x, raw_scale, shift, mask, None, None, bound, inverse, None)
    return y, logdet


@planned
def coupling_step(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    *,
    affine: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`affine_coupling`, the one-channel mix that may follow, and the next conditioner's input, in one pass.

    Args:
        x: (B, C, H, W) input (the output y when `inverse`).
        raw_scale: (B, C, H, W), the log-scale before its tanh.
        shift: (B, C, H, W).
        mask: (C, H, W) or (1, H, W), bool, True = passive (kept).
        next_mask: like `mask`; the next conditioner sees the result where it is True, and 0 elsewhere.
        bound: the log-scale lies in (-bound, bound).
        inverse: compute x from y instead; `affine` is then the inverse of a mix.
        affine: (2,), a factor a and a constant c: the result is ``y * a + c``, or ``(y - c) * a`` when
            `inverse`. With it, C = 1.
        dtype: of the next conditioner's input; that of x when None.

    Returns:
        `(y, logdet, next_input)`: y like x; logdet (B,) in nats, that of the coupling alone; next_input (B,
            C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, or `bound` is not positive.

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> mask = torch.tensor([[[True, False]]])
        >>> affine = torch.tensor([2.0, 1.0])
        >>> y, _, masked = coupling_step(x, torch.zeros_like(x), x, mask, ~mask, affine=affine)
        >>> y.flatten().tolist(), masked.flatten().tolist()
        ([3.0, 5.0], [0.0, 5.0])
    """
    _check(x, raw_scale, shift, mask, bound)
    check_mask(next_mask, x, "next_mask")
    check_affine(affine, x)
    if takes_reference():
        y, logdet = affine_coupling_reference(x, raw_scale, shift, mask, bound, inverse)
        y, masked = finish_step_reference(y, next_mask, affine, inverse, dtype or x.dtype)
        return y, logdet, masked
    y, logdet, masked = differentiate(
        AffineCoupling, x, raw_scale, shift, mask, next_mask, affine, bound, inverse, dtype or x.dtype
    )
    return y, logdet, masked


def check_affine(affine: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `affine` is None or the two numbers of a one-channel mix of `x`."""
    if affine is None:
        return
    if tuple(affine.shape) != (2,) or x.shape[1] != 1:
        raise ValueError(
            f"affine must be (2,) for an x with one channel, got {tuple(affine.shape)} for x {tuple(x.shape)}"
        )
    check_device("affine", affine, x)
