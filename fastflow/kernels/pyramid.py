r"""Atrous spatial pyramid with squeeze-excite gates.

With branches :math:`p_i = B_i * x + b_i`, gates :math:`g_i` per sample and the columns :math:`W_i` of the
last map,

.. math:: y = \sum_i W_i \operatorname{diag}(g_i) p_i + b, \qquad
          g = \sigma(U \operatorname{relu}(D \bar p + d) + u)

where :math:`\bar p` are the branches' means over pixels. Neither the pyramid nor its gated form is ever in
memory at once: a matrix per sample maps each branch, and the undilated branch is one with x itself.

`x` is (B, C, H, W). There is no Triton kernel yet; on a CPU large images take `fastflow.kernels.cpu.pyramid`.
Sources: Chen et al., 2017 (ASPP); Hu et al., 2018 (squeeze-excite).
"""

from __future__ import annotations

import torch
from torch import Tensor

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
from fastflow.kernels.pool_pixels import average_pixels
from fastflow.kernels.registry import register


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


def atrous_pyramid(x: Tensor, weights: PyramidWeights) -> Tensor:
    """The gated pyramid of an image.

    Args:
        x: (B, C, H, W).
        weights: of the branches, the gates and the last map.

    Returns:
        (B, C, H, W).
    """
    if takes_folded_kernels(x):
        return atrous_pyramid_cpu(x, weights)
    if on_cpu(x) and x.shape[1] * x.shape[2] * x.shape[3] > MAX_SMALL_ELEMENTS:
        # Dilated convolutions of contiguous planes are up to three times slower on CPUs.
        x = x.contiguous(memory_format=torch.channels_last)
    return atrous_pyramid_reference(x, weights)


register(
    "atrous_pyramid",
    definition=atrous_pyramid_reference,
    cpu=atrous_pyramid_cpu,
    triton=None,
    fake=torch.empty_like,
    functions=("atrous_pyramid",),
)
