"""The coupling head on CPUs, written by hand in few passes over memory.

ATen's products take rows in groups of `ROW_GROUP` and compute the rest by another routine, which rounds
differently. Rows therefore come in whole groups here, which makes a sample's bits independent of its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.layouts import laid_out
from fastflow.numerics import acc_dtype, full_precision, sum_per_sample

ROW_GROUP = 4


def _whole_groups(value: Tensor) -> Tensor:
    """`value` with zeros after its last row, up to a whole number of groups."""
    extra = -len(value) % ROW_GROUP
    return F.pad(value, (0, 0) * (value.ndim - 1) + (0, extra)) if extra else value


def _head(features: Tensor, weight: Tensor, table: Tensor, label_index: Tensor, acc: torch.dtype) -> Tensor:
    """The output of one head for rows in whole groups, in memory of its own."""
    out = table.to(acc).index_select(0, label_index)
    return out.addmm_(features.to(acc), weight.to(features.dtype).to(acc).t())


def _active_ones(mask: Tensor, shape: tuple[int, ...], acc: torch.dtype) -> Tensor:
    """(N,): 1 where active, 0 where passive."""
    return (~mask).expand(shape).reshape(-1).to(acc)


def coupling_head_cpu(
    x: Tensor,
    scale_features: Tensor,
    shift_features: Tensor,
    scale_weight: Tensor,
    shift_weight: Tensor,
    scale_table: Tensor,
    shift_table: Tensor,
    label_index: Tensor,
    mask: Tensor,
    order: Tensor | None,
    active: int,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
    dtype: torch.dtype | None,
    keep_tanh: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, log-determinant, masked copy of y, tanh of the raw scale in whole groups of rows).

    The third is empty without `next_mask`, the fourth without `keep_tanh`.
    """
    batch, acc = len(x), acc_dtype(x.dtype)
    ones = _active_ones(mask, x.shape[1:], acc)
    flat, labels = laid_out(x, False).flatten(1).to(acc), _whole_groups(label_index)
    with full_precision(x):
        tanh_raw = _head(_whole_groups(scale_features), scale_weight, scale_table, labels, acc).tanh_()
        t = _head(_whole_groups(shift_features), shift_weight, shift_table, labels, acc)[:batch].mul_(ones)
    factor = bound * ones
    s = tanh_raw[:batch] * factor if keep_tanh else tanh_raw[:batch].mul_(factor)
    logdet = sum_per_sample(s)
    if inverse:
        y, logdet = torch.sub(flat, t, out=t).mul_(s.neg_().exp_()), -logdet
    else:
        y = t.addcmul_(flat, s.exp_())
    if affine is not None:
        a, c = affine.to(acc)
        y = y.sub_(c).mul_(a) if inverse else torch.addcmul(c, y, a)
    y = y.to(x.dtype).view(x.shape)
    masked = x.new_empty(0) if next_mask is None else torch.where(next_mask, y, 0.0).to(dtype or x.dtype)
    return y, logdet, masked, tanh_raw if keep_tanh else x.new_empty(0, dtype=acc)


def coupling_head_backward_cpu(
    grad_y: Tensor,
    grad_logdet: Tensor,
    grad_masked: Tensor,
    tanh_raw: Tensor,
    x: Tensor,
    scale_features: Tensor,
    shift_features: Tensor,
    scale_weight: Tensor,
    shift_weight: Tensor,
    scale_table: Tensor,
    shift_table: Tensor,
    label_index: Tensor,
    mask: Tensor,
    order: Tensor | None,
    active: int,
    next_mask: Tensor | None,
    affine: Tensor | None,
    bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, features, weights, tables and affine; pairs are ordered (log-scale, shift)."""
    batch, acc = len(x), acc_dtype(x.dtype)
    ones = _active_ones(mask, x.shape[1:], acc)
    factor = bound * ones
    grad, flat = grad_y.flatten(1).to(acc), x.flatten(1).to(acc)
    if next_mask is not None:
        grad = torch.where(next_mask, grad_masked.to(acc), 0.0).flatten(1).add_(grad)
    scale_groups, shift_groups = _whole_groups(scale_features), _whole_groups(shift_features)
    s = tanh_raw * factor
    growth = s[:batch].neg().exp_() if inverse else s[:batch].exp()
    with full_precision(x):
        # y is the coupling's result before the multiply-add. Without one, only the inverse reads it.
        y = flat
        if inverse or affine is not None:
            t = _head(shift_groups, shift_weight, shift_table, _whole_groups(label_index), acc)
            t = t[:batch].mul_(ones)
            y = torch.sub(flat, t, out=t).mul_(growth) if inverse else t.addcmul_(flat, growth)
        d_affine = x.new_empty(0, dtype=acc)
        if affine is not None:
            a, c = affine.to(acc)
            total = grad.sum()
            d_affine = torch.stack(
                ((grad * (y - c)).sum(), -a * total) if inverse else ((grad * y).sum(), total)
            )
            grad = grad * a
        d_x = growth.mul_(grad)
        q = grad_logdet[:, None].to(acc)
        # dr = (g x e^s + q) b (1 - tanh^2 r). It comes in whole groups, since the gradient of the features is
        # a product over its rows.
        d_raw = torch.addcmul(factor, tanh_raw, s, value=-1.0)
        d_raw[:batch].mul_(torch.addcmul(q, grad, y).neg_() if inverse else torch.addcmul(q, d_x, flat))
        d_raw[batch:] = 0.0
        d_shift = _whole_groups(d_x * -ones if inverse else grad * ones)
        d_scale_features = (d_raw @ scale_weight.to(scale_features.dtype).to(acc))[:batch]
        d_shift_features = (d_shift @ shift_weight.to(shift_features.dtype).to(acc))[:batch]
        d_scale_weight = d_raw.t() @ scale_groups.to(acc)
        d_shift_weight = d_shift.t() @ shift_groups.to(acc)
    return (
        d_x.to(x.dtype).view(x.shape),
        d_scale_features.to(scale_features.dtype).contiguous(),
        d_shift_features.to(shift_features.dtype).contiguous(),
        d_scale_weight.to(scale_weight.dtype).contiguous(),
        d_shift_weight.to(shift_weight.dtype).contiguous(),
        _table_gradient(scale_table, label_index, d_raw[:batch]),
        _table_gradient(shift_table, label_index, d_shift[:batch]),
        d_affine,
    )


def _table_gradient(table: Tensor, label_index: Tensor, grad: Tensor) -> Tensor:
    """The gradient of a head's table from that of its output, to which each sample's table row is added."""
    out = torch.zeros(table.shape, dtype=grad.dtype).index_add_(0, label_index, grad)
    return out.to(table.dtype).contiguous()
