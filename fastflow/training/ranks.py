"""What ranks of a training tell one another about its state; one rank alone tells nobody."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning_fabric import Fabric
from torch import Tensor


def of_all_ranks(fabric: Fabric, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of every rank, (ranks, ...) on the host. All ranks must call it together, with equal shapes."""
    if fabric.world_size == 1:
        return {name: value.detach().cpu()[None] for name, value in tensors.items()}
    return {
        name: fabric.all_gather(value.detach().to(fabric.device)).cpu()  # type: ignore[union-attr]
        for name, value in tensors.items()
    }


def of_this_rank(fabric: Fabric, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's part of what `of_all_ranks` gave."""
    return {name: value[fabric.global_rank] for name, value in tensors.items()}


def highest(fabric: Fabric, value: int) -> int:
    """The highest value of all ranks, which must call it together."""
    if fabric.world_size == 1:
        return value
    local = torch.tensor(value, device=fabric.device)
    return int(fabric.all_reduce(local, reduce_op="max"))  # type: ignore[arg-type]
