r"""Atrous spatial pyramid with squeeze-excite gates.

With branches :math:`p_i = B_i * x + b_i`, gates :math:`g_i` per sample and the columns :math:`W_i` of the
last map,

.. math:: y = \sum_i W_i \operatorname{diag}(g_i) p_i + b, \qquad
          g = \sigma(U \operatorname{relu}(D \bar p + d) + u)

where :math:`\bar p` are the branches' means over pixels. The gated pyramid is never in memory: a matrix per
sample :math:`A_i = W_i \operatorname{diag}(g_i)` maps each branch, and the undilated branch is one with x
itself, which :math:`A_0 B_0` maps. Kernels add the constant :math:`b + \sum_i A_i b_i` to the products, so
that the library's convolutions, of the dilated branches, have no biases.

Backward, with q the gradient of y and S sums over pixels: :math:`S q p_i^\top` is the gradient of a map; from
it follow those of gates, of the weights and of the means :math:`m_i`; a branch gets
:math:`A_i^\top q + m_i / HW`.

`x` is (B, C, H, W) of any float dtype, contiguous or channels_last; the result has its dtype, or that of
autocast, which the convolutions follow. Sums, gates and maps are made in float32 (float64 for float64 x), and
maps are rounded to 16 bits beside an x of 16 bits. Kernels take three dilated branches; on a CPU large images
take `fastflow.kernels.cpu.pyramid`. Sources: Chen et al., 2017 (ASPP); Hu et al., 2018 (squeeze-excite).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.kernels.checks import check_device, check_dtype, check_pooled_image
from fastflow.kernels.cpu.convolution import convolve
from fastflow.kernels.cpu.execution import on_cpu
from fastflow.kernels.cpu.linear import linear_each
from fastflow.kernels.cpu.pyramid import (
    MAX_SMALL_ELEMENTS,
    PyramidWeights,
    atrous_pyramid_cpu,
    gated_maps,
    takes_folded_kernels,
)
from fastflow.kernels.layouts import empty_image, is_channels_last, memory_format
from fastflow.kernels.pool_pixels import average_pixels
from fastflow.kernels.registry import is_recorded, refuse_second_derivative, register, runs_triton
from fastflow.kernels.triton.pyramid import (
    BRANCHES,
    DILATED,
    launch_atrous_pyramid,
    unpack,
)
from fastflow.kernels.triton.pyramid_backward import launch_atrous_pyramid_backward
from fastflow.numerics import acc_dtype, full_precision

# -- definition ----------------------------------------------------------------------------------------------


def atrous_pyramid_reference(x: Tensor, weights: PyramidWeights) -> Tensor:
    """The definition: each branch is mapped by a sample's matrix and added to the result."""
    mean, x = average_pixels(x)
    point, point_bias = weights.point
    means = [linear_each(mean, point.flatten(1), point_bias)]
    branches = []
    for (weight, bias), dilation in zip(weights.dilated, weights.dilations, strict=True):
        pair = (dilation, dilation)
        mean, branch = average_pixels(convolve(x, weight, bias, padding=pair, dilation=pair))
        means.append(mean)
        branches.append(branch.flatten(2))
    (first, *maps), constant = gated_maps(means, weights)
    out = torch.baddbmm(constant[:, :, None], first, x.flatten(2))
    for mapped, branch in zip(maps, branches, strict=True):
        out = torch.baddbmm(out, mapped, branch)
    return out.unflatten(2, x.shape[2:])


def atrous_pyramid_backward_reference(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor], dilations: Sequence[int]
) -> list[Tensor]:
    """The gradients of x and of the weights by the formulas of this module."""
    named, acc = unpack(weights, dilations), acc_dtype(x.dtype)
    *dilated, maps, means, hidden, gates = kept
    layout, (channels, height, width) = memory_format(is_channels_last(x)), x.shape[1:]
    with full_precision(x):
        (point, point_bias), (down, _), (up, _), (output, _) = (
            [value.flatten(1).to(acc) if value.ndim > 1 else value.to(acc) for value in layer]
            for layer in (named.point, named.down, named.up, named.output)
        )
        biases = torch.cat([point_bias, *(bias.to(acc) for _, bias in named.dilated)])
        q = grad.flatten(2).to(acc)
        d_maps = torch.cat([q @ v.flatten(2).to(acc).mT for v in (x, *dilated)], dim=2)
        d_constant = q.sum(dim=2)
        d_gated = torch.cat((d_maps[:, :, :channels] @ point.t(), d_maps[:, :, channels:]), dim=2)
        d_gated = d_gated + d_constant[:, :, None] * biases
        d_logits = (d_gated * output).sum(dim=1) * gates * (1.0 - gates)
        d_hidden = (d_logits @ up) * (hidden > 0)
        d_pyramid, of_x = d_hidden @ down, means[:, 4 * channels :]
        d_bias = d_pyramid + torch.einsum("bo,ok,bk->bk", d_constant, output, gates)
        gated = output[:, :channels] * gates[:, None, :channels]
        d_point = (gated.mT @ d_maps[:, :, :channels]).sum(dim=0) + d_pyramid[:, :channels].t() @ of_x
        first, *others = d_pyramid.chunk(BRANCHES, dim=1)
        d_mean = torch.cat((first @ point, *others), dim=1) / (height * width)
        d_all = (maps.to(acc).mT @ q + d_mean[:, :, None]).unflatten(2, (height, width))
        d_x, *d_branches = d_all.chunk(BRANCHES, dim=1)
        d_dilated = []
        for d_branch, (weight, bias), d, d_bias_of in zip(
            d_branches, named.dilated, dilations, d_bias.chunk(BRANCHES, dim=1)[1:], strict=True
        ):
            geometry = (1, 1), (d, d), (d, d), False, (0, 0), 1, (True, True, False)
            part, d_weight, _ = torch.ops.aten.convolution_backward(
                d_branch.to(x.dtype), x, weight.to(x.dtype), None, *geometry
            )
            d_x = d_x + part
            d_dilated += [d_weight.to(weight.dtype), d_bias_of.sum(dim=0).to(bias.dtype)]
    grads = [
        d_point, d_bias[:, :channels].sum(dim=0), *d_dilated,
        d_hidden.t() @ means[:, : 4 * channels], d_hidden.sum(dim=0),
        d_logits.t() @ hidden, d_logits.sum(dim=0),
        (d_gated * gates[:, None]).sum(dim=0), d_constant.sum(dim=0),
    ]  # fmt: skip
    d_weights = [
        value.reshape(like.shape).to(like.dtype).contiguous()
        for value, like in zip(grads, weights, strict=True)
    ]
    return [d_x.to(x.dtype).contiguous(memory_format=layout), *d_weights]


# -- op and autograd -----------------------------------------------------------------------------------------


def _pyramid_cpu(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    """The result and what the launcher keeps for the backward pass, in plain ATen."""
    named, acc = unpack(weights, dilations), acc_dtype(x.dtype)
    layout, channels = memory_format(is_channels_last(x)), x.shape[1]
    with full_precision(x):
        (point, point_bias), down, up, (output, bias) = (
            [value.flatten(1).to(acc) if value.ndim > 1 else value.to(acc) for value in layer]
            for layer in (named.point, named.down, named.up, named.output)
        )
        branches = [
            F.conv2d(x, weight.to(x.dtype), None, padding=d, dilation=d).contiguous(memory_format=layout)
            for (weight, _), d in zip(named.dilated, named.dilations, strict=True)
        ]
        biases = torch.cat([point_bias, *(b.to(acc) for _, b in named.dilated)])
        of_x, *others = (v.to(acc).mean(dim=(2, 3)) for v in (x, *branches))
        pyramid = torch.cat((of_x @ point.t(), *others), dim=1) + biases
        hidden = F.relu(F.linear(pyramid, *down))
        gates = torch.sigmoid(F.linear(hidden, *up))
        gated = output * gates[:, None]
        maps = torch.cat((gated[:, :, :channels] @ point, gated[:, :, channels:]), dim=2).to(x.dtype)
        inputs = torch.cat([v.flatten(2) for v in (x, *branches)], dim=1).to(acc)
        y = maps.to(acc) @ inputs + (bias + gated @ biases)[:, :, None]
    y = y.to(x.dtype).unflatten(2, x.shape[2:]).contiguous(memory_format=layout)
    return [y, *branches, maps, torch.cat((pyramid, of_x), dim=1), hidden, gates]


def _pyramid_fake(x: Tensor, weights: Sequence[Tensor], dilations: Sequence[int]) -> list[Tensor]:
    acc, channels_last = acc_dtype(x.dtype), is_channels_last(x)
    batch, channels = x.shape[:2]
    images = [empty_image(x.shape, x, channels_last) for _ in range(BRANCHES)]
    hidden = weights[-5].shape[0]
    sizes = BRANCHES * channels + channels, hidden, BRANCHES * channels
    kept = [x.new_empty(batch, size, dtype=acc) for size in sizes]
    return [*images, x.new_empty(batch, channels, BRANCHES * channels), *kept]


def _pyramid_backward_fake(
    grad: Tensor, x: Tensor, kept: Sequence[Tensor], weights: Sequence[Tensor], dilations: Sequence[int]
) -> list[Tensor]:
    d_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    return [empty_image(x.shape, x, is_channels_last(x)), *d_weights]


_pyramid = register(
    "atrous_pyramid",
    definition=atrous_pyramid_reference,
    cpu=_pyramid_cpu,
    triton=launch_atrous_pyramid,
    fake=_pyramid_fake,
    functions=("atrous_pyramid",),
    limit=f"other than {DILATED} dilated branches plain ATen",
)
_pyramid_backward = register(
    "atrous_pyramid_backward",
    definition=atrous_pyramid_backward_reference,
    cpu=atrous_pyramid_backward_reference,
    triton=launch_atrous_pyramid_backward,
    fake=_pyramid_backward_fake,
)


class AtrousPyramid(torch.autograd.Function):
    """The op under autograd. Saves x, the dilated branches and the maps; a second derivative is an error."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dilations: tuple[int, ...], *weights: Tensor) -> Tensor:
        y, *kept = _pyramid(x, weights, dilations)
        ctx.save_for_backward(x, *weights, *kept)
        ctx.dilations, ctx.count = dilations, 1 + len(weights)
        out: Tensor = y
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("atrous_pyramid")
        # A checkpoint hands saved tensors out once.
        saved = ctx.saved_tensors
        x, weights, kept = saved[0], saved[1 : ctx.count], saved[ctx.count :]
        d_x, *d_weights = _pyramid_backward(grad, x, kept, weights, ctx.dilations)
        return d_x, None, *d_weights


def _check(x: Tensor, weights: PyramidWeights) -> None:
    check_pooled_image(x)
    channels, hidden = x.shape[1], weights.down[0].shape[0]
    columns = (1 + len(weights.dilated)) * channels
    square = ((channels, channels, 3, 3), (channels,))
    if len(weights.dilations) != len(weights.dilated):
        raise ValueError(
            f"dilations must be one for each of {len(weights.dilated)} branches, got {weights.dilations}"
        )
    layers = [
        ("point", weights.point, ((channels, channels, 1, 1), (channels,))),
        *((f"dilated[{i}]", layer, square) for i, layer in enumerate(weights.dilated)),
        ("down", weights.down, ((hidden, columns), (hidden,))),
        ("up", weights.up, ((columns, hidden), (columns,))),
        ("output", weights.output, ((channels, columns, 1, 1), (channels,))),
    ]
    for name, layer, shapes in layers:
        for value, shape in zip(layer, shapes, strict=True):
            if tuple(value.shape) != shape:
                raise ValueError(
                    f"{name} must be {shapes[0]} and {shapes[1]} for x {tuple(x.shape)}, "
                    f"got {tuple(value.shape)}"
                )
            check_dtype(name, value)
            check_device(name, value, x)


def _autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that convolutions of x have."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def atrous_pyramid(x: Tensor, weights: PyramidWeights) -> Tensor:
    """The gated pyramid of an image.

    Args:
        x: (B, C, H, W).
        weights: of the branches, the gates and the last map.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: x is not a floating-point image batch, has no pixels or channels, or a weight's shape,
            dtype or device does not fit.
    """
    _check(x, weights)
    if runs_triton(x) and len(weights.dilated) == DILATED:
        x = x.to(_autocast_dtype(x))
        pairs = (weights.point, *weights.dilated, weights.down, weights.up, weights.output)
        values = [value for pair in pairs for value in pair]
        if not is_recorded(x, *values):
            out: Tensor = _pyramid(x, values, weights.dilations)[0]
            return out
        result: Tensor = AtrousPyramid.apply(x, weights.dilations, *values)
        return result
    if takes_folded_kernels(x):
        return atrous_pyramid_cpu(x, weights)
    if on_cpu(x) and x.shape[1] * x.shape[2] * x.shape[3] > MAX_SMALL_ELEMENTS:
        # Dilated convolutions of contiguous planes are up to three times slower on CPUs.
        x = x.contiguous(memory_format=torch.channels_last)
    return atrous_pyramid_reference(x, weights)
