r"""Masked affine coupling with its log-determinant, and the next conditioner's masked input written by the same launch.

.. math:: s = b\tanh(r), \quad y = x e^{s} + t \ \text{(active)}, \quad y = x \ \text{(passive)}, \quad
          \log|\det| = \sum_{\text{active}} s

`x`, `raw_scale` r and `shift` t are (B, C, H, W) of any float dtypes; `mask` is bool, True = passive, and broadcasts over the
batch. The exponential, the product and the sums are float32 (float64 for float64 x). With ``inverse=True`` the direction is
y -> x and the log-determinant has the opposite sign.

Backward, with g = dy, q = dlogdet: dt = g; dx = g e^s; dr = (g x e^s + q)(b - s^2/b); passive: dx = g, dr = dt = 0. Inverse, with
u the result and g = du: dt = -g e^{-s}; dy = g e^{-s}; dr = -(g u + q)(b - s^2/b).

`coupling_step` goes on where a flow step ends: a one-channel `channel_mix` that follows is one multiply-add on the way out,
``y a + c`` (inverse: ``(y - c) a``), and the result masked for the conditioner that reads it next is written beside it in that
conditioner's dtype.

x may be contiguous or channels_last with any batch stride; results have its layout. Sources: RealNVP (Dinh et al., 2017),
eq. 7-9; MAGIC-Flow for the bound; RevNet (Gomez et al., 2017) for the backward pass that rebuilds its input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastflow.kernels._launch import cdiv, elements, is_wide, kernel, launch, locate, sum_rows, tanh, triton_dtype, vector_width
from fastflow.kernels._library import (
    accumulator,
    check_device,
    check_image,
    check_mask,
    check_same_shape,
    empty_image,
    is_channels_last,
    laid_out,
    mask_bytes,
    memory_format,
    refuse_second_derivative,
    register,
    sum_per_sample,
    takes_reference,
)

if TYPE_CHECKING:
    import triton.language as tl


# -- definition -----------------------------------------------------------------------------------------------------------


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


def finish_step_reference(
    y: Tensor, next_mask: Tensor, affine: Tensor | None, inverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What `coupling_step` does after its coupling, in plain ATen: the multiply-add and the masked copy."""
    if affine is not None:
        a, c = affine.to(accumulator(y.dtype))
        wide = y.to(accumulator(y.dtype))
        y = ((wide - c) * a if inverse else torch.addcmul(c, wide, a)).to(y.dtype)
    return y, y.masked_fill(~next_mask, 0.0).to(dtype)


def affine_coupling_backward_reference(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    saved: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, raw_scale, shift and affine, in plain ATen. `saved` is x or, with `recompute`, the result."""
    wide = accumulator(saved.dtype)
    g = grad_y.to(wide)
    if next_mask is not None:
        g = g + grad_masked.to(wide).masked_fill(~next_mask, 0.0)
    s = (bound * torch.tanh(raw_scale.to(wide))).masked_fill(mask, 0.0)
    t = shift.to(wide).masked_fill(mask, 0.0)
    growth = torch.exp(-s if inverse else s)
    # x is the coupling's input, y its result before the multiply-add.
    if recompute:
        y = saved.to(wide)
        if affine is not None:
            a, c = affine.to(wide)
            y = y / a + c if inverse else (y - c) / a
        x = torch.addcmul(t, y, 1.0 / growth) if inverse else (y - t) / growth
    else:
        x = saved.to(wide)
        y = (x - t) * growth if inverse else torch.addcmul(t, x, growth)
    d_affine = saved.new_empty(0, dtype=wide)
    if affine is not None:
        a, c = affine.to(wide)
        if inverse:
            d_affine = torch.stack(((g * (y - c)).sum(), -a * g.sum()))
        else:
            d_affine = torch.stack(((g * y).sum(), g.sum()))
        g = g * a
    d_x = g * growth
    q = grad_logdet.to(wide)[:, None, None, None]
    slope = bound - s * s / bound
    if inverse:
        d_raw, d_shift = -(g * y + q) * slope, -d_x
    else:
        d_raw, d_shift = torch.addcmul(q, d_x, x) * slope, g
    return (
        d_x.to(saved.dtype),
        d_raw.masked_fill(mask, 0.0).to(raw_scale.dtype),
        d_shift.masked_fill(mask, 0.0).to(shift.dtype),
        d_affine,
    )


# -- kernels --------------------------------------------------------------------------------------------------------------
# A program takes one chunk of one sample in the memory order of x. Masks are contiguous; raw scale and shift may be in the other
# layout (SWAPPED). Suffix `_v`: in units of V elements, so that the compiler knows the divisibility.


@kernel
def _swap(offs, channels, pixels, CHANNELS_LAST: tl.constexpr):
    """The place in the other layout of what lies at `offs` in this one."""
    if CHANNELS_LAST:
        return (offs % channels) * pixels + offs // channels
    else:
        return (offs % pixels) * channels + offs // pixels


@kernel
def _read_scale_shift(
    raw_ptr, shift_ptr, mask_ptr, offs, inside, channels, pixels,
    BOUND: tl.constexpr, ACC: tl.constexpr, CHANNELS_LAST: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """(s, t, passive): both 0 where passive, and outside."""
    mask_offs = offs
    if CHANNELS_LAST:
        mask_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
    where = offs
    if SWAPPED:
        where = _swap(offs, channels, pixels, CHANNELS_LAST)
    passive = tl.load(mask_ptr + mask_offs, mask=inside, other=1) != 0
    raw = tl.load(raw_ptr + where, mask=inside, other=0.0).to(ACC)
    shift = tl.load(shift_ptr + where, mask=inside, other=0.0).to(ACC)
    zero = tl.zeros_like(raw)
    return tl.where(passive, zero, tanh(raw) * BOUND), tl.where(passive, zero, shift), passive


@kernel
def _coupling_fwd_kernel(
    x_ptr, raw_ptr, shift_ptr, mask_ptr, next_mask_ptr, affine_ptr, y_ptr, masked_ptr, partial_ptr,
    x_stride_v, raw_stride_v, shift_stride_v, n_v, n_chunks, channels, pixels,
    V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SWAPPED: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    n = elements(n_v, V, WIDE)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    s, t, passive = _read_scale_shift(
        raw_ptr + b * raw_stride_v * V, shift_ptr + b * shift_stride_v * V, mask_ptr, offs, inside, channels, pixels,
        BOUND, ACC, CHANNELS_LAST, SWAPPED,
    )  # fmt: skip
    x = tl.load(x_ptr + b * x_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
    total = tl.sum(s, axis=0)
    if INVERSE:
        y = tl.where(passive, x, (x - t) * tl.exp(-s))
        total = -total
    else:
        y = tl.where(passive, x, x * tl.exp(s) + t)
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
        if INVERSE:
            y = (y - c) * a
        else:
            y = y * a + c
    tl.store(y_ptr + b * n + offs, y.to(y_ptr.dtype.element_ty), mask=inside)
    if NEXT:
        mask_offs = offs
        if CHANNELS_LAST:
            mask_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
        keep = tl.load(next_mask_ptr + mask_offs, mask=inside, other=0) != 0
        tl.store(masked_ptr + b * n + offs, tl.where(keep, y, 0.0).to(masked_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + b * n_chunks + chunk, total)


@kernel
def _coupling_bwd_kernel(
    saved_ptr, raw_ptr, shift_ptr, mask_ptr, next_mask_ptr, affine_ptr, grad_y_ptr, grad_logdet_ptr, grad_masked_ptr,
    dx_ptr, draw_ptr, dshift_ptr, partial_ptr,
    saved_stride_v, raw_stride_v, shift_stride_v, grad_y_stride_v, grad_masked_stride_v, n_v, n_chunks, channels, pixels,
    V: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr, BOUND: tl.constexpr, INVERSE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SWAPPED: tl.constexpr, NEXT: tl.constexpr, AFFINE: tl.constexpr, RECOMPUTE: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    b, chunk = locate(tl.program_id(0), n_chunks, WIDE)
    n = elements(n_v, V, WIDE)
    offs = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    s, t, passive = _read_scale_shift(
        raw_ptr + b * raw_stride_v * V, shift_ptr + b * shift_stride_v * V, mask_ptr, offs, inside, channels, pixels,
        BOUND, ACC, CHANNELS_LAST, SWAPPED,
    )  # fmt: skip
    q = tl.load(grad_logdet_ptr + b).to(ACC)
    g = tl.load(grad_y_ptr + b * grad_y_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
    if NEXT:
        mask_offs = offs
        if CHANNELS_LAST:
            mask_offs = _swap(offs, channels, pixels, CHANNELS_LAST)
        keep = tl.load(next_mask_ptr + mask_offs, mask=inside, other=0) != 0
        extra = tl.load(grad_masked_ptr + b * grad_masked_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
        g += tl.where(keep, extra, 0.0)
    saved = tl.load(saved_ptr + b * saved_stride_v * V + offs, mask=inside, other=0.0).to(ACC)
    if AFFINE:
        a = tl.load(affine_ptr).to(ACC)
        c = tl.load(affine_ptr + 1).to(ACC)
    # x is the coupling's input, y its result before the multiply-add.
    if RECOMPUTE:
        y = saved
        if AFFINE:
            if INVERSE:
                y = y / a + c
            else:
                y = (y - c) / a
        if INVERSE:
            x = tl.where(passive, y, y * tl.exp(s) + t)
        else:
            x = tl.where(passive, y, (y - t) * tl.exp(-s))
    else:
        x = saved
        if INVERSE:
            y = tl.where(passive, x, (x - t) * tl.exp(-s))
        else:
            y = tl.where(passive, x, x * tl.exp(s) + t)
    if AFFINE:
        if INVERSE:
            product = tl.sum(tl.where(inside, g * (y - c), 0.0), axis=0)
            plain = -a * tl.sum(g, axis=0)
        else:
            product = tl.sum(tl.where(inside, g * y, 0.0), axis=0)
            plain = tl.sum(g, axis=0)
        place = partial_ptr + (b * n_chunks + chunk) * 2
        tl.store(place, product)
        tl.store(place + 1, plain)
        g = g * a
    slope = BOUND - s * s * (1.0 / BOUND)
    if INVERSE:
        dx = g * tl.exp(-s)
        dshift = -dx
        draw = -(g * y + q) * slope
    else:
        dx = g * tl.exp(s)
        dshift = g
        draw = (dx * x + q) * slope
    where = offs
    if SWAPPED:
        where = _swap(offs, channels, pixels, CHANNELS_LAST)
    tl.store(dx_ptr + b * n + offs, tl.where(passive, g, dx).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(draw_ptr + b * n + where, tl.where(passive, 0.0, draw).to(draw_ptr.dtype.element_ty), mask=inside)
    tl.store(dshift_ptr + b * n + where, tl.where(passive, 0.0, dshift).to(dshift_ptr.dtype.element_ty), mask=inside)


# -- launchers ------------------------------------------------------------------------------------------------------------


def _block(n: int, acc: torch.dtype) -> int:
    """Elements per program: enough programs for small images, enough work per program for large ones."""
    return 2048 if n > 8192 and acc == torch.float32 else 1024


def _conditioner_layout(raw_scale: Tensor, shift: Tensor, channels_last: bool) -> tuple[Tensor, Tensor, bool]:
    """Raw scale and shift in one layout, their own where they share one, else that of x: (raw_scale, shift, channels_last)."""
    own = is_channels_last(raw_scale)
    layout = own if own == is_channels_last(shift) else channels_last
    return laid_out(raw_scale, layout), laid_out(shift, layout), layout


def _coupling_launch(
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
    channels_last, acc = is_channels_last(x), accumulator(x.dtype)
    x = laid_out(x, channels_last)
    raw_scale, shift, layout = _conditioner_layout(raw_scale, shift, channels_last)
    batch, c, h, w = x.shape
    n = c * h * w
    y = empty_image(x.shape, x, channels_last)
    masked = x.new_empty(0) if next_mask is None else empty_image(x.shape, x, channels_last, dtype)
    if x.numel() == 0:
        return y, x.new_zeros(batch, dtype=acc), masked
    block = _block(n, acc)
    chunks, v = cdiv(n, block), vector_width(n, x.stride(0), raw_scale.stride(0), shift.stride(0))
    partial = torch.empty(batch, chunks, dtype=acc, device=x.device)
    launch(
        _coupling_fwd_kernel, batch * chunks, x, 4,
        x, raw_scale, shift, mask_bytes(mask, x.shape), mask_bytes(next_mask, x.shape), affine,
        y, None if next_mask is None else masked, partial,
        x.stride(0) // v, raw_scale.stride(0) // v, shift.stride(0) // v, n // v, chunks, c, h * w,
        V=v, BLOCK=block, ACC=triton_dtype(acc), BOUND=bound, INVERSE=inverse, CHANNELS_LAST=channels_last,
        SWAPPED=layout != channels_last, NEXT=next_mask is not None, AFFINE=affine is not None,
        WIDE=is_wide(n, block),
    )  # fmt: skip
    return y, sum_rows(partial), masked


def _coupling_backward_launch(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    saved: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last, acc = is_channels_last(saved), accumulator(saved.dtype)
    saved, grad_y = laid_out(saved, channels_last), laid_out(grad_y, channels_last)
    raw_scale, shift, layout = _conditioner_layout(raw_scale, shift, channels_last)
    batch, c, h, w = saved.shape
    n = c * h * w
    dx = empty_image(saved.shape, saved, channels_last)
    draw, dshift = (empty_image(saved.shape, v, layout) for v in (raw_scale, shift))
    if saved.numel() == 0:
        return dx, draw, dshift, saved.new_zeros(0 if affine is None else 2, dtype=acc)
    strides = [v.stride(0) for v in (saved, raw_scale, shift, grad_y)]
    if next_mask is not None:
        grad_masked = laid_out(grad_masked, channels_last)
        strides.append(grad_masked.stride(0))
    block = _block(n, acc)
    chunks, v = cdiv(n, block), vector_width(n, *strides)
    partial = saved.new_empty(0, dtype=acc) if affine is None else saved.new_empty(batch * chunks, 2, dtype=acc)
    launch(
        _coupling_bwd_kernel, batch * chunks, saved, 4,
        saved, raw_scale, shift, mask_bytes(mask, saved.shape), mask_bytes(next_mask, saved.shape), affine,
        grad_y, grad_logdet.contiguous(), None if next_mask is None else grad_masked, dx, draw, dshift,
        None if affine is None else partial,
        *(stride // v for stride in strides[:4]), strides[-1] // v, n // v, chunks, c, h * w,
        V=v, BLOCK=block, ACC=triton_dtype(acc), BOUND=bound, INVERSE=inverse, CHANNELS_LAST=channels_last,
        SWAPPED=layout != channels_last, NEXT=next_mask is not None, AFFINE=affine is not None, RECOMPUTE=recompute,
        WIDE=is_wide(n, block),
    )  # fmt: skip
    return dx, draw, dshift, partial.sum(dim=0) if affine is not None else partial


# -- op and autograd ------------------------------------------------------------------------------------------------------


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
    return empty_image(x.shape, x, channels_last), x.new_empty(x.shape[0], dtype=accumulator(x.dtype)), masked


def _coupling_on_cpu(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    next_mask, affine, _, inverse, dtype = rest[3:]
    layout = memory_format(is_channels_last(x))
    y, logdet = affine_coupling_reference(x, *rest[:3], *rest[5:7])
    masked = x.new_empty(0)
    if next_mask is not None:
        y, masked = finish_step_reference(y, next_mask, affine, inverse, dtype or x.dtype)
        masked = masked.contiguous(memory_format=layout)
    return y.contiguous(memory_format=layout), logdet, masked


def _coupling_backward_fake(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    saved: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    next_mask: Tensor | None,
    affine: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_last = is_channels_last(saved)
    own = is_channels_last(raw_scale)
    layout = own if own == is_channels_last(shift) else channels_last
    return (
        empty_image(saved.shape, saved, channels_last),
        empty_image(saved.shape, raw_scale, layout),
        empty_image(saved.shape, shift, layout),
        saved.new_empty(0 if affine is None else 2, dtype=accumulator(saved.dtype)),
    )


def _coupling_backward_on_cpu(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = affine_coupling_backward_reference(*args)
    likes = _coupling_backward_fake(*args[:9])
    dx, draw, dshift = (
        grad.contiguous(memory_format=memory_format(is_channels_last(like)))
        for grad, like in zip(grads[:3], likes[:3], strict=True)
    )
    return dx, draw, dshift, grads[3]


_forward = register(
    "affine_coupling(Tensor x, Tensor raw_scale, Tensor shift, Tensor mask, Tensor? next_mask, Tensor? affine, float bound, "
    "bool inverse, ScalarType? dtype) -> (Tensor, Tensor, Tensor)",
    reference=_coupling_on_cpu,
    triton=_coupling_launch,
    fake=_coupling_fake,
)
_backward = register(
    "affine_coupling_backward(Tensor grad_y, Tensor grad_logdet, Tensor grad_masked, Tensor saved, Tensor raw_scale, "
    "Tensor shift, Tensor mask, Tensor? next_mask, Tensor? affine, float bound, bool inverse, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_coupling_backward_on_cpu,
    triton=_coupling_backward_launch,
    fake=_coupling_backward_fake,
)


class AffineCoupling(torch.autograd.Function):
    """The op under autograd. Saves x or, with `recompute`, its own result; a second derivative is an error."""

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
        recompute: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, logdet, masked = _forward(x, raw_scale, shift, mask, next_mask, affine, bound, inverse, dtype)
        ctx.save_for_backward(y if recompute else x, raw_scale, shift, mask, next_mask, affine)
        ctx.bound, ctx.inverse, ctx.recompute = bound, inverse, recompute
        return y, logdet, masked

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("affine_coupling")
        saved = ctx.saved_tensors
        grads = _backward(grad_y, grad_logdet, grad_masked, *saved, ctx.bound, ctx.inverse, ctx.recompute)
        affine = saved[5]
        d_affine = None if affine is None else grads[3].to(affine.dtype)
        return *grads[:3], None, None, d_affine, None, None, None, None


def _check(x: Tensor, raw_scale: Tensor, shift: Tensor, mask: Tensor, bound: float) -> None:
    check_image("x", x)
    check_same_shape("raw_scale", raw_scale, x)
    check_same_shape("shift", shift, x)
    check_mask(mask, x)
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")


def affine_coupling(
    x: Tensor,
    raw_scale: Tensor,
    shift: Tensor,
    mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Transform the active part of `x`; pass the rest through.

    Args:
        x: (B, C, H, W) input (the output y when `inverse`).
        raw_scale: (B, C, H, W), the log-scale before its tanh.
        shift: (B, C, H, W).
        mask: (C, H, W) or (1, H, W), bool, True = passive (kept).
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the transform instead.
        recompute: keep the result for the backward pass instead of `x`, and rebuild `x` from it. The result is mostly kept
            anyway, by whoever reads it; the passive part is rebuilt exactly, the active part to rounding.

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
    y, logdet, _ = AffineCoupling.apply(x, raw_scale, shift, mask, None, None, bound, inverse, None, recompute)
    return y, logdet


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
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`affine_coupling`, the one-channel mix that may follow it, and the next conditioner's input, in one pass over memory.

    Args:
        x: (B, C, H, W) input (the output y when `inverse`).
        raw_scale: (B, C, H, W), the log-scale before its tanh.
        shift: (B, C, H, W).
        mask: (C, H, W) or (1, H, W), bool, True = passive (kept).
        next_mask: like `mask`; the next conditioner sees the result where it is True, and 0 elsewhere.
        bound: the log-scale lies in (-bound, bound).
        inverse: undo the coupling instead; an `affine` is then the inverse of a mix.
        affine: (2,), a factor a and a constant c: the result is ``y * a + c``, or ``(y - c) * a`` when `inverse`. With it, C = 1.
        dtype: of the next conditioner's input; that of x when None.
        recompute: see `affine_coupling`.

    Returns:
        `(y, logdet, next_input)`: y like x; logdet (B,) in nats, that of the coupling alone; next_input (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, or `bound` is not positive.

    Example:
        >>> x = torch.ones(1, 1, 1, 2)
        >>> mask = torch.tensor([[[True, False]]])
        >>> y, _, masked = coupling_step(x, torch.zeros_like(x), x, mask, ~mask, affine=torch.tensor([2.0, 1.0]))
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
    y, logdet, masked = AffineCoupling.apply(
        x, raw_scale, shift, mask, next_mask, affine, bound, inverse, dtype or x.dtype, recompute
    )
    return y, logdet, masked


def check_affine(affine: Tensor | None, x: Tensor) -> None:
    """Raise ValueError unless `affine` is None or the two numbers of a one-channel mix of `x`."""
    if affine is None:
        return
    if tuple(affine.shape) != (2,) or x.shape[1] != 1:
        raise ValueError(f"affine must be (2,) for an x with one channel, got {tuple(affine.shape)} for x {tuple(x.shape)}")
    check_device("affine", affine, x)
