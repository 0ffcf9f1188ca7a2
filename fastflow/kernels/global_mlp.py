r"""Global contexts: what a small network makes of the means over pixels, added to an image or multiplied in.

.. math:: y = x + U \operatorname{gelu}(D \bar x + d) + u \quad \text{(fusion)}, \qquad
          y = x \cdot (1 + \sigma(U \operatorname{relu}(D \bar x))) \quad \text{(context)}

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last; D is (h, C) and U (C, h). Sums and the
network are computed in float32 (float64 for float64 x) by kernels; y has the dtype of x.

Backward, with q the gradient of y, the contexts' gradient is the sum over pixels of q, or of q x times the
slope of the sigmoid; that of a mean is the same for all pixels of its channel. Source: MAGIC-Flow, published
research code; Hu et al., 2018 (squeeze-excite).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.checks import check_device, check_dtype, check_pooled_image
from fastflow.kernels.cpu.execution import on_cpu
from fastflow.kernels.cpu.linear import linear_each, whole_groups
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.planning import planned
from fastflow.kernels.pool_pixels import average_pixels
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, runs_triton
from fastflow.kernels.triton.global_mlp import launch_global_mlp, launch_global_mlp_backward
from fastflow.kernels.watching import differentiate
from fastflow.numerics import acc_dtype, full_precision

Layer = tuple[Tensor, Tensor]

# -- definition ----------------------------------------------------------------------------------------------


def global_fusion_reference(x: Tensor, down: Layer, up: Layer) -> Tensor:
    """The definition of the fusion."""
    mean, x = average_pixels(x)
    return x + linear_each(F.gelu(linear_each(mean, *down)), *up)[:, :, None, None]


def global_context_reference(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """The definition of the context."""
    mean, x = average_pixels(x)
    logits = linear_each(F.relu(linear_each(mean, down)), up)
    # Whole groups of samples are whole vectors, whose elements the sigmoid rounds alike.
    gate = torch.sigmoid(whole_groups(logits))[: x.shape[0]] if on_cpu(x) else torch.sigmoid(logits)
    return x * (1.0 + gate)[:, :, None, None]


def global_mlp_backward_reference(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor], gated: bool
) -> list[Tensor]:
    """The gradients of x and of the weights by the formulas of this module."""
    acc, layout = acc_dtype(x.dtype), memory_format(is_channels_last(x))
    mean, hidden, context = kept
    with full_precision(x):
        down, up = weights[0].to(acc), weights[1 if gated else 2].to(acc)
        q = grad.to(acc)
        if gated:
            gate = torch.sigmoid(context)
            d_context = (q * x.to(acc)).sum(dim=(2, 3)) * gate * (1.0 - gate)
            active, d_hidden = F.relu(hidden), (d_context @ up) * (hidden > 0)
            q = q * (1.0 + gate)[:, :, None, None]
        else:
            d_context = q.sum(dim=(2, 3))
            active = F.gelu(hidden)
            d_hidden = torch.ops.aten.gelu_backward(d_context @ up, hidden)
        d_mean = (d_hidden @ down) / (x.shape[2] * x.shape[3])
        d_x = (q + d_mean[:, :, None, None]).to(x.dtype).contiguous(memory_format=layout)
        matrices = d_hidden.t() @ mean, d_context.t() @ active
    d_down, d_up = matrices
    grads = [d_down, d_up] if gated else [d_down, d_hidden.sum(dim=0), d_up, d_context.sum(dim=0)]
    return [d_x, *(g.to(weight.dtype) for g, weight in zip(grads, weights, strict=True))]


# -- op and autograd -----------------------------------------------------------------------------------------


def _mlp_cpu(x: Tensor, weights: Sequence[Tensor], gated: bool) -> list[Tensor]:
    """The result and what the launcher keeps for the backward pass, in plain ATen."""
    acc, layout = acc_dtype(x.dtype), memory_format(is_channels_last(x))
    with full_precision(x):
        values = [weight.to(acc) for weight in weights]
        down, down_bias, up, up_bias = (values[0], None, values[1], None) if gated else values
        inner = x.to(acc)
        mean = inner.mean(dim=(2, 3))
        hidden = F.linear(mean, down, down_bias)
        context = F.linear(F.relu(hidden) if gated else F.gelu(hidden), up, up_bias)
        pixels = context[:, :, None, None]
        y = inner * (1.0 + torch.sigmoid(pixels)) if gated else inner + pixels
    return [y.to(x.dtype).contiguous(memory_format=layout), mean, hidden, context]


def _mlp_fake(x: Tensor, weights: Sequence[Tensor], gated: bool) -> list[Tensor]:
    sizes = x.shape[1], weights[0].shape[0], x.shape[1]
    kept = [x.new_empty(x.shape[0], size, dtype=acc_dtype(x.dtype)) for size in sizes]
    return [empty_image(x.shape, x, is_channels_last(x)), *kept]


def _backward_fake(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor], gated: bool
) -> list[Tensor]:
    d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    return [empty_image(x.shape, x, is_channels_last(x)), *d_weights]


_mlp = register(
    "global_mlp",
    definition=global_context_reference,
    cpu=_mlp_cpu,
    triton=launch_global_mlp,
    fake=_mlp_fake,
    functions=("global_context", "global_fusion"),
)
_mlp_backward = register(
    "global_mlp_backward",
    definition=global_mlp_backward_reference,
    cpu=global_mlp_backward_reference,
    triton=launch_global_mlp_backward,
    fake=_backward_fake,
)


class GlobalMlp(torch.autograd.Function):
    """The op under autograd. Saves x and the network's values; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gated: bool, *weights: Tensor) -> Tensor:
        y, *kept = _mlp(x, weights, gated)
        ctx.save_for_backward(x, *kept, *weights)
        ctx.gated = gated
        out: Tensor = y
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("global_mlp")
        x, mean, hidden, context, *weights = ctx.saved_tensors
        d_x, *d_weights = _mlp_backward(grad, x, (mean, hidden, context), tuple(weights), ctx.gated)
        return d_x, None, *d_weights


def _run(x: Tensor, weights: tuple[Tensor, ...], gated: bool) -> Tensor:
    if not is_recorded(x, *weights):
        out: Tensor = _mlp(x, weights, gated)[0]
        return out
    result: Tensor = differentiate(GlobalMlp, x, gated, *weights)
    return result


def _check(x: Tensor, named: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    for name, (value, shape) in named.items():
        if tuple(value.shape) != shape:
            raise ValueError(f"{name} must be {shape} for x {tuple(x.shape)}, got {tuple(value.shape)}")
        check_dtype(name, value)
        check_device(name, value, x)


@planned
def global_fusion(x: Tensor, down: Layer, up: Layer) -> Tensor:
    """``x + mlp(mean over pixels)``, with a GELU in the MLP.

    Args:
        x: (B, C, H, W).
        down: (h, C) and its bias (h,).
        up: (C, h) and its bias (C,).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: x is not a floating-point image batch, has no pixels or channels, or a weight's shape,
            dtype or device does not fit.
    """
    check_pooled_image(x)
    channels, hidden = x.shape[1], down[0].shape[0]
    _check(
        x,
        {
            "down": (down[0], (hidden, channels)),
            "down's bias": (down[1], (hidden,)),
            "up": (up[0], (channels, hidden)),
            "up's bias": (up[1], (channels,)),
        },
    )
    if runs_triton(x):
        return _run(x, (*down, *up), False)
    return global_fusion_reference(x, down, up)


@planned
def global_context(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """``x * (1 + sigmoid(mlp(mean over pixels)))``, with a ReLU in the MLP.

    Args:
        x: (B, C, H, W).
        down: (h, C).
        up: (C, h).

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: as `global_fusion`.
    """
    check_pooled_image(x)
    channels, hidden = x.shape[1], down.shape[0]
    _check(x, {"down": (down, (hidden, channels)), "up": (up, (channels, hidden))})
    if runs_triton(x):
        return _run(x, (down, up), True)
    return global_context_reference(x, down, up)
