r"""Heads of the classification conditioner together with the coupling whose log-scale and shift they give.

.. math:: r = F_s W_s^\top + S_k, \quad t = F_t W_t^\top + T_k, \quad
          (y, \log|\det|) = \text{affine\_coupling}(x, r, t)

`x` (B, C, H, W), N = C*H*W; features F (B, F); weights W (N, F); per-label tables S, T (K, N), bias included;
`label_index` (B,) gives each sample's table row k. Everything may have a float dtype of its own. Weights are
rounded to the dtype of the features; products and sums are float32 (float64 for float64 x), and r and t are
never rounded. y has the dtype of x, the log-determinant is float32 or wider.

The backward pass computes r, and t where it is needed, from the features again; a CPU without kernels keeps
tanh r. With g = dy, q = dlogdet, s = b tanh(r), dt and dr as in `affine_coupling`:

.. math:: dF = dr\,W, \quad dW = dr^\top F, \quad dS_k = \sum_{\text{label}_i = k} dr_i

and the same for the shift. On a GPU with bfloat16 or float16 features, dr and dt are rounded to that dtype
for these products, as autocast would round them. The kernels read the weight rows of active pixels only and
write neither r and t nor dr and dt. The gradient of the features is the sum, in a fixed order, of the
contributions of all blocks of pixels, each of which takes B*F numbers.

The end of a flow step is that of `affine_coupling.coupling_step`. x of any layout is copied to a contiguous
one, as the features come from a flatten in C, H, W order; the results are contiguous. Source: MAGIC-Flow,
classification conditioner.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow._deprecated import renamed_arguments
from fastflow.kernels.affine_coupling import (
    affine_coupling_backward_reference,
    affine_coupling_reference,
    check_affine,
    finish_step_reference,
)
from fastflow.kernels.checks import check_device, check_dtype, check_image, check_label_index, check_mask
from fastflow.kernels.cpu.coupling_head import ROW_GROUP, coupling_head_backward_cpu, coupling_head_cpu
from fastflow.kernels.planning import planned
from fastflow.kernels.registry import refuse_second_derivative, register, runs_triton, takes_reference
from fastflow.kernels.triton.coupling_head import PixelOrder, launch_coupling_head, pixel_order
from fastflow.kernels.triton.coupling_head_backward import launch_coupling_head_backward
from fastflow.kernels.triton.launch import cdiv
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype, full_precision

__all__ = [
    "PixelOrder",
    "coupling_head",
    "coupling_head_backward_reference",
    "coupling_head_reference",
    "coupling_head_step",
    "head_reference",
    "pixel_order",
]

Pair = tuple[Tensor, Tensor]

# -- definition ----------------------------------------------------------------------------------------------


def head_reference(x: Tensor, features: Tensor, weight: Tensor, table: Tensor, label_index: Tensor) -> Tensor:
    """One head's output in the shape of `x`, in the accumulation dtype of x."""
    acc = acc_dtype(x.dtype)
    with full_precision(x):
        product = F.linear(features.to(acc), weight.to(features.dtype).to(acc))
    return (product + table[label_index].to(acc)).view(x.shape)


def coupling_head_reference(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    label_index: Tensor,
    mask: Tensor,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """The definition, in plain ATen. Pairs are ordered (log-scale, shift)."""
    heads = zip(features, weights, tables, strict=True)
    raw_scale, shift = (head_reference(x, *head, label_index) for head in heads)
    return affine_coupling_reference(x, raw_scale, shift, mask, bound, inverse)


def coupling_head_backward_reference(
    grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor, tanh_raw: Tensor,
    x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
    scale_table: Tensor, shift_table: Tensor, label_index: Tensor, mask: Tensor, order: Tensor | None,
    active: int, next_mask: Tensor | None, affine: Tensor | None, bound: float, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, features, weights, tables and affine (empty without `affine`), in plain ATen."""
    raw_scale = head_reference(x, scale_features, scale_weight, scale_table, label_index)
    shift = head_reference(x, shift_features, shift_weight, shift_table, label_index)
    d_x, d_raw, d_shift, d_affine = affine_coupling_backward_reference(
        grad_y, grad_logdet, grad_masked, x, raw_scale, shift, mask, next_mask, affine, bound, inverse
    )
    d_scale_features, d_scale_weight, d_scale_table = _head_gradients(
        d_raw, scale_features, scale_weight, scale_table, label_index
    )
    d_shift_features, d_shift_weight, d_shift_table = _head_gradients(
        d_shift, shift_features, shift_weight, shift_table, label_index
    )
    return (
        d_x, d_scale_features, d_shift_features, d_scale_weight, d_shift_weight, d_scale_table, d_shift_table,
        d_affine,
    )  # fmt: skip


def _head_gradients(
    grad: Tensor, features: Tensor, weight: Tensor, table: Tensor, label_index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features, weight and table from that of one head's output."""
    acc, grad = grad.dtype, grad.flatten(1)
    with full_precision(grad):
        d_features = grad @ weight.to(features.dtype).to(acc)
        d_weight = grad.t() @ features.to(acc)
    d_table = torch.zeros_like(table, dtype=acc).index_add_(0, label_index, grad)
    return d_features.to(features.dtype), d_weight.to(weight.dtype), d_table.to(table.dtype)


# -- op and autograd -----------------------------------------------------------------------------------------


def _head_fake(
    x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
    scale_table: Tensor, shift_table: Tensor, label_index: Tensor, mask: Tensor, order: Tensor | None,
    active: int, next_mask: Tensor | None, affine: Tensor | None, bound: float, inverse: bool,
    dtype: torch.dtype | None, keep_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = acc_dtype(x.dtype)
    y, masked = torch.empty(x.shape, dtype=x.dtype, device=x.device), x.new_empty(0)
    if next_mask is not None:
        masked = torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)
    kept: tuple[int, ...] = (0,)
    if keep_tanh and not runs_triton(x):
        kept = (cdiv(x.shape[0], ROW_GROUP) * ROW_GROUP, scale_weight.shape[0])
    return y, x.new_empty(x.shape[0], dtype=acc), masked, x.new_empty(kept, dtype=acc)


def _head_backward_fake(
    grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor, tanh_raw: Tensor,
    x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
    scale_table: Tensor, shift_table: Tensor, label_index: Tensor, mask: Tensor, order: Tensor | None,
    active: int, next_mask: Tensor | None, affine: Tensor | None, bound: float, inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    return (
        like(x),
        like(scale_features),
        like(shift_features),
        like(scale_weight),
        like(shift_weight),
        like(scale_table),
        like(shift_table),
        x.new_empty(0 if affine is None else 2, dtype=acc_dtype(x.dtype)),
    )


_forward = register(
    "coupling_head",
    definition=coupling_head_reference,
    cpu=coupling_head_cpu,
    triton=launch_coupling_head,
    fake=_head_fake,
    functions=("coupling_head", "coupling_head_step"),
)
_backward = register(
    "coupling_head_backward",
    definition=coupling_head_backward_reference,
    cpu=coupling_head_backward_cpu,
    triton=launch_coupling_head_backward,
    fake=_head_backward_fake,
)


class CouplingHead(torch.autograd.Function):
    """The op under autograd. Saves its arguments and, on a CPU without kernels, tanh r.

    A second derivative is an error.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
        scale_table: Tensor, shift_table: Tensor, label_index: Tensor, mask: Tensor, order: Tensor | None,
        active: int, next_mask: Tensor | None, affine: Tensor | None, bound: float, inverse: bool,
        dtype: torch.dtype | None, keep_tanh: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        heads = scale_features, shift_features, scale_weight, shift_weight, scale_table, shift_table
        y, logdet, masked, tanh_raw = _forward(
            x, *heads, label_index, mask, order, active, next_mask, affine, bound, inverse, dtype, keep_tanh
        )
        ctx.save_for_backward(tanh_raw, x, *heads, label_index, mask, order, next_mask, affine)
        ctx.active, ctx.bound, ctx.inverse = active, bound, inverse
        return y, logdet, masked

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor, grad_logdet: Tensor, grad_masked: Tensor
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("coupling_head")
        tanh_raw, x, *heads, label_index, mask, order, next_mask, affine = ctx.saved_tensors
        d_x, *d_heads, d_affine = _backward(
            grad_y, grad_logdet, grad_masked, tanh_raw, x, *heads, label_index, mask, order, ctx.active,
            next_mask, affine, ctx.bound, ctx.inverse,
        )  # fmt: skip
        d_affine = None if affine is None else d_affine.to(affine.dtype)
        return d_x, *d_heads, None, None, None, None, None, d_affine, None, None, None, None


def _apply(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    label_index: Tensor,
    mask: Tensor,
    order: PixelOrder | None,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if order is None and runs_triton(x):
        order = pixel_order(mask, x.shape[1:])
    pixels, active = order or (None, 0)
    inputs = x, *features, *weights, *tables
    keep_tanh = torch.is_grad_enabled() and any(v.requires_grad for v in (*inputs, affine) if v is not None)
    y, logdet, masked = differentiate(
        CouplingHead, *inputs, label_index, mask, pixels, active, next_mask, affine, bound, inverse, dtype,
        keep_tanh,
    )  # fmt: skip
    return y, logdet, masked


def _check(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    label_index: Tensor,
    mask: Tensor,
    bound: float,
    order: PixelOrder | None,
) -> None:
    check_image("x", x)
    check_mask(mask, x)
    batch, size = x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]
    for name, pair in (("features", features), ("weights", weights), ("tables", tables)):
        for value in pair:
            check_dtype(name, value)
            check_device(name, value, x)
    width = features[0].shape[-1] if features[0].ndim else 0
    expected = (
        ("features", features, (batch, width), "(B, F)"),
        ("weights", weights, (size, width), "(N, F)"),
        ("tables", tables, (tables[0].shape[0] if tables[0].ndim else 0, size), "(K, N)"),
    )
    for name, pair, shape, words in expected:
        for value in pair:
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} must be {words} = {shape} for x {tuple(x.shape)}, got {tuple(value.shape)}"
                )
    check_label_index(label_index, batch, len(tables[0]), x)
    if order is not None and (order.pixels.dtype != torch.int32 or tuple(order.pixels.shape) != (size,)):
        raise ValueError(
            f"order must hold int32 ({size},), got {order.pixels.dtype} {tuple(order.pixels.shape)}"
        )
    if order is not None and not 0 <= order.active <= size:
        raise ValueError(f"order must count between 0 and {size} active pixels, got {order.active}")
    if not bound > 0:
        raise ValueError(f"bound must be positive, got {bound}")


@planned
@renamed_arguments(rows="label_index")
def coupling_head(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    label_index: Tensor,
    mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    order: PixelOrder | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute log-scale and shift from features and labels, and couple. Pairs are ordered (log-scale, shift).

    With `inverse` and the same other arguments, y becomes x again: its passive part bit for bit, its active
    part to rounding, since log-scale and shift are the same bits in both directions.

    Args:
        x: (B, C, H, W), N = C*H*W.
        features: two (B, F).
        weights: two (N, F).
        tables: two (K, N).
        label_index: (B,) int64, the table row of each sample. The values of a tensor are checked once, which
            waits for a CUDA device; they are not checked in a graph that is compiled, exported or captured.
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        bound: the log-scale lies in (-bound, bound).
        inverse: compute x from y instead.
        order: `pixel_order` of the mask, for kernels; None computes it, which waits for the device.

    Returns:
        `(y, logdet)`: y like x, contiguous; logdet (B,) in nats, float32 or wider.

    Raises:
        ValueError: a shape, dtype or device does not fit, an index is not in [0, K), or `bound` is not
            positive.

    Example:
        >>> x, mask = torch.ones(1, 1, 1, 2), torch.tensor([[[True, False]]])
        >>> f, w, table = torch.ones(1, 1), torch.ones(2, 1), torch.zeros(3, 2)
        >>> y, logdet = coupling_head(x, (f, f), (0 * w, w), (table, table), torch.tensor([2]), mask)
        >>> y.flatten().tolist(), logdet.tolist()
        ([1.0, 2.0], [0.0])
    """
    _check(x, features, weights, tables, label_index, mask, bound, order)
    if takes_reference():
        return coupling_head_reference(x, features, weights, tables, label_index, mask, bound, inverse)
    y, logdet, _ = _apply(
        x, features, weights, tables, label_index, mask, order, None, None, bound, inverse, None
    )
    return y, logdet


@planned
@renamed_arguments(rows="label_index")
def coupling_head_step(
    x: Tensor,
    features: Pair,
    weights: Pair,
    tables: Pair,
    label_index: Tensor,
    mask: Tensor,
    next_mask: Tensor,
    bound: float = 0.5,
    inverse: bool = False,
    *,
    affine: Tensor | None = None,
    dtype: torch.dtype | None = None,
    order: PixelOrder | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`coupling_head` with the end of `coupling_step`: the multiply-add and the next conditioner's input.

    Args:
        x: (B, C, H, W), N = C*H*W.
        features: two (B, F).
        weights: two (N, F).
        tables: two (K, N).
        label_index: (B,) int64, see `coupling_head`.
        mask: (C, H, W) or (1, H, W), bool, True = passive.
        next_mask: like `mask`; the next conditioner sees the result where it is True, and 0 elsewhere.
        bound: the log-scale lies in (-bound, bound).
        inverse: compute x from y instead.
        affine: (2,), see `coupling_step`.
        dtype: of the next conditioner's input; that of x when None.
        order: see `coupling_head`.

    Returns:
        `(y, logdet, next_input)`: y like x, contiguous; logdet (B,) in nats, that of the coupling alone;
            next_input (B, C, H, W).

    Raises:
        ValueError: a shape, dtype or device does not fit, an index is not in [0, K), or `bound` is not
            positive.
    """
    _check(x, features, weights, tables, label_index, mask, bound, order)
    check_mask(next_mask, x, "next_mask")
    check_affine(affine, x)
    if takes_reference():
        y, logdet = coupling_head_reference(x, features, weights, tables, label_index, mask, bound, inverse)
        y, masked = finish_step_reference(y, next_mask, affine, inverse, dtype or x.dtype)
        return y, logdet, masked
    return _apply(
        x, features, weights, tables, label_index, mask, order, next_mask, affine, bound, inverse,
        dtype or x.dtype,
    )  # fmt: skip
