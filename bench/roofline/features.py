"""The ops of conditioners: norms, poolings and gates on features, and the classification heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.roofline.machine import BOUND, CLASSES, Shape
from bench.roofline.works import Tensors, Work, dtype_name
from fastflow import kernels
from fastflow.kernels.affine_coupling import finish_step_reference
from fastflow.kernels.cbam import cbam_reference
from fastflow.kernels.coupling_head import coupling_head_reference
from fastflow.kernels.norm_film_act import norm_film_act_reference
from fastflow.kernels.norm_modulate_act import norm_modulate_act_reference
from fastflow.kernels.registry import OPS
from fastflow.numerics import acc_dtype

# A norm's group of the first fits a block and is read once; one of the second is split, and read twice.
FEATURE_SHAPES: tuple[Shape, ...] = ((16, 46, 46), (16, 92, 92))
GROUPS = 8
EPS = 1e-5
DROPOUT = 0.3
HEAD_FEATURES = 64


def feature_works(
    shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Work]:
    """Norms, poolings and gates on features (C, H, W) of a conditioner, C a multiple of 8."""
    c, h, w = shape
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    x, residual = (torch.randn(batch, *shape, **kind).requires_grad_() for _ in range(2))
    gamma, beta = (torch.randn(CLASSES, c, device=device).requires_grad_() for _ in range(2))
    inputs = (x, gamma, beta, torch.arange(batch, device=device) % CLASSES)
    seeds = torch.arange(batch, dtype=torch.int32, device=device)
    channel = torch.randn(batch, c, **kind).requires_grad_()
    spatial = torch.randn(batch, 1, h, w, **kind).requires_grad_()
    about = (shape, dtype_name(dtype))
    return [
        Work("norm_film_act", *about, inputs, inputs, _norm_composite, _norm_public),
        _norm_residual((*inputs, residual), about),
        _norm_dropout((*inputs, seeds), about),
        _norm_modulate((x, torch.randn(batch, c, 2, device=device).requires_grad_()), about),
        *_pools(x, channel, spatial, about),
        _cbam(x, about),
    ]


# -- norms ---------------------------------------------------------------------------------------------------


def _norm_composite(
    x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, residual: Tensor | None = None
) -> Tensors:
    return (norm_film_act_reference(x, GROUPS, gamma, beta, label_index, residual, EPS),)


def _norm_public(
    x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, residual: Tensor | None = None
) -> Tensors:
    return (kernels.norm_film_act(x, GROUPS, gamma, beta, label_index, residual),)


def _norm_residual(inputs: Tensors, about: tuple[Shape, str]) -> Work:
    return Work("norm_film_act +residual", *about, inputs, inputs, _norm_composite, _norm_public)


def _norm_dropout(inputs: Tensors, about: tuple[Shape, str]) -> Work:
    def composite(x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, seeds: Tensor) -> Tensors:
        (y,) = _norm_composite(x, gamma, beta, label_index)
        return (torch.native_dropout(y, DROPOUT, True)[0],)

    def public(x: Tensor, gamma: Tensor, beta: Tensor, label_index: Tensor, seeds: Tensor) -> Tensors:
        return (kernels.norm_film_act(x, GROUPS, gamma, beta, label_index, dropout=DROPOUT, seeds=seeds),)

    return Work("norm_film_act +dropout", *about, inputs, inputs, composite, public)


def _norm_modulate(inputs: Tensors, about: tuple[Shape, str]) -> Work:
    return Work(
        "norm_modulate_act", *about, inputs, inputs,
        composite=lambda x, modulation: (norm_modulate_act_reference(x, GROUPS, modulation, None, EPS),),
        public=lambda x, modulation: (kernels.norm_modulate_act(x, GROUPS, modulation),),
    )  # fmt: skip


# -- poolings and gates --------------------------------------------------------------------------------------


def average_pixels(x: Tensor) -> Tensor:
    """The definition of `kernels.average_pixels`, (B, C, H, W) -> (B, C), without the x that is handed on."""
    return x.flatten(2).mean(dim=2, dtype=acc_dtype(x.dtype)).to(x.dtype)


def _pools(x: Tensor, channel: Tensor, spatial: Tensor, about: tuple[Shape, str]) -> list[Work]:
    return [
        Work(
            "pool_pixels", *about, (x,), (),
            composite=lambda x: (OPS["pool_pixels"].definition(x), x.view_as(x)),
            public=kernels.pool_pixels,
            handed_on=1,
        ),
        Work(
            "average_pixels", *about, (x,), (),
            composite=lambda x: (average_pixels(x), x.view_as(x)),
            public=kernels.average_pixels,
            handed_on=1,
        ),
        Work(
            "pool_channels", *about, (x, channel), (x, channel),
            composite=lambda x, channel: (OPS["pool_channels"].definition(x, channel), x.view_as(x)),
            public=kernels.pool_channels,
            handed_on=1,
        ),
        Work(
            "apply_gates", *about, (x, channel, spatial), (x, channel, spatial),
            composite=lambda *inputs: (OPS["apply_gates"].definition(*inputs),),
            public=lambda *inputs: (kernels.apply_gates(*inputs),),
        ),
    ]  # fmt: skip


def _cbam(x: Tensor, about: tuple[Shape, str]) -> Work:
    channels = x.shape[1]
    weights = tuple(
        torch.randn(shape, device=x.device).requires_grad_()
        for shape in ((1, channels), (channels, 1), (1, 2, 7, 7))
    )
    return Work(
        "cbam", *about, (x, *weights), (x, *weights),
        composite=lambda *inputs: (cbam_reference(*inputs),),
        public=lambda *inputs: (kernels.cbam(*inputs),),
    )  # fmt: skip


# -- heads ---------------------------------------------------------------------------------------------------


def head_works(
    shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Work]:
    """The classification heads with their coupling on a checkerboard of active pixels, products included."""
    n = shape[0] * shape[1] * shape[2]
    x = torch.randn(batch, *shape, device=device).requires_grad_()

    def pair(*size: int, **kind: Any) -> tuple[Tensor, Tensor]:
        """A (log-scale, shift) pair of random tensors."""
        scale, shift = (torch.randn(*size, device=device, **kind) for _ in range(2))
        return scale, shift

    features = pair(batch, HEAD_FEATURES, dtype=dtype)
    weights = pair(n, HEAD_FEATURES)
    for weight in weights:
        weight /= HEAD_FEATURES
    heads = tuple(tensor.requires_grad_() for tensor in (*features, *weights, *pair(CLASSES, n)))
    label_index = torch.arange(batch, device=device) % CLASSES
    pixels = torch.arange(n, dtype=torch.int32, device=device)
    mask = (pixels % 2 == 0).view(shape)
    next_mask = ~mask
    order = kernels.PixelOrder(torch.cat((pixels[1::2], pixels[::2])), n // 2)

    def composite(
        x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
        scale_table: Tensor, shift_table: Tensor, label_index: Tensor, mask: Tensor,
        next_mask: Tensor | None = None,
    ) -> Tensors:  # fmt: skip
        features, weights = (scale_features, shift_features), (scale_weight, shift_weight)
        tables = (scale_table, shift_table)
        y, logdet = coupling_head_reference(x, features, weights, tables, label_index, mask, BOUND, False)
        if next_mask is None:
            return y, logdet
        return y, logdet, finish_step_reference(y, next_mask, None, False, dtype)[1]

    def public(
        x: Tensor, scale_features: Tensor, shift_features: Tensor, scale_weight: Tensor, shift_weight: Tensor,
        scale_table: Tensor, shift_table: Tensor, label_index: Tensor, mask: Tensor,
        next_mask: Tensor | None = None,
    ) -> Tensors:  # fmt: skip
        features, weights = (scale_features, shift_features), (scale_weight, shift_weight)
        arguments = x, features, weights, (scale_table, shift_table), label_index, mask
        if next_mask is None:
            return kernels.coupling_head(*arguments, bound=BOUND, order=order)
        return kernels.coupling_head_step(*arguments, next_mask, bound=BOUND, dtype=dtype, order=order)

    # The backward pass needs neither the shift nor its table. It needs the shift's features, for the gradient
    # of their weight.
    *needed, shift_table = (x, *heads)
    inputs, saved = (*needed, shift_table, label_index, mask), (*needed, label_index, mask)
    about = (shape, dtype_name(dtype))
    return [
        Work("coupling_head", *about, inputs, saved, composite, public),
        Work("coupling_head_step", *about, (*inputs, next_mask), (*saved, next_mask), composite, public),
    ]
