"""The networks of the conditioners, each written once, over any leaves that have these names.

The leaves are the modules of a model, or constants that were folded out of them
(`fastflow.models.inference.fold`). They share a call signature: convolutions, gates, contexts and pyramids
take an image, norms an image and what the label brings to them, residual blocks an image and two such values.
Source: MAGIC-Flow, published research code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def encode_strided(net: Any, a: Tensor, films: Sequence[Any]) -> Tensor:
    """The encoder of a classification conditioner.

    Args:
        net: leaves.
        a: (B, C, H, W) masked input.
        films: what the label brings to each of the seven norms.

    Returns:
        (B, f3, ceil(H/8), ceil(W/8)), what the dense heads read.
    """
    v = net.norm1(net.conv1(a), films[0])
    v = net.cbam2(net.norm2(net.conv2(v), films[1]))
    v = net.residual2(v, films[2:4])
    v = net.cbam3(net.norm3(net.conv3(v), films[4]))
    out: Tensor = net.residual3(v, films[5:7])
    return out


def encode_full_resolution(net: Any, a: Tensor, films: Sequence[Any]) -> Tensor:
    """The encoder of a generation conditioner.

    Args:
        net: leaves.
        a: (B, C, H, W) masked input.
        films: what the label brings to each of the seven norms.

    Returns:
        (B, f3, H, W), what the convolutional heads read.
    """
    v = net.cbam1(net.norm1(net.conv1(a), films[0]))
    v = net.aspp1(net.global1(v))
    v = net.cbam2(net.norm2(net.conv2(v), films[1]))
    v = net.aspp2(net.global2(net.residual2(v, films[2:4])))
    v = net.cbam3(net.norm3(net.conv3(v), films[4]))
    out: Tensor = net.aspp3(net.global3(net.residual3(v, films[5:7])))
    return out


def norms(net: Any) -> tuple[Any, ...]:
    """The seven norms of a conditioner, in the order in which its encoder uses them."""
    second, third = net.residual2, net.residual3
    return net.norm1, net.norm2, second.norm1, second.norm2, net.norm3, third.norm1, third.norm2


def residual_block(block: Any, v: Tensor, films: Sequence[Any]) -> Tensor:
    """Two convolutions with norms; the input is added before the last activation."""
    first = block.norm1(block.conv1(v), films[0])
    out: Tensor = block.norm2(block.conv2(first), films[1], residual=v)
    return out
