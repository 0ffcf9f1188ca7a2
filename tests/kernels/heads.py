"""Arguments of `coupling_head` for its tests."""

from __future__ import annotations

import torch
from numerics import F64, masks, rand, random_mask


def mask_of(kind, shape):
    if kind == "random":
        return random_mask(*shape, seed=3, share=0.3)
    if kind == "channel":
        return (torch.arange(shape[0]) < shape[0] // 2)[:, None, None].expand(shape).contiguous()
    return masks(kind, shape)


def arguments(batch, shape, features=64, classes=7, stream=F64, net=None, device="cpu"):
    """x, two features, two weights, two tables; then the label index."""
    net, size = net or stream, shape[0] * shape[1] * shape[2]
    values = [rand(batch, *shape, dtype=stream, device=device)]
    values += [rand(batch, features, dtype=net, seed=i, device=device) for i in (1, 2)]
    # The numbers fit the narrow dtype, so that the op does not round them.
    values += [
        (rand(size, features, seed=i, device=device) / features**0.5).to(net).to(stream) for i in (3, 4)
    ]
    values += [rand(classes, size, dtype=net, seed=i, device=device) for i in (5, 6)]
    return values, (torch.arange(batch, device=device) * 5 + 1) % classes
