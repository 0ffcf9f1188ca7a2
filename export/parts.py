"""The conditioners that graphs call by name: halves of one shape are one function of an export."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fastflow.models.inference import planes as plane_walk
from fastflow.models.inference.leaves import ClassificationNet
from fastflow.models.inference.steps import FoldedHalfCoupling


@dataclasses.dataclass(frozen=True)
class TensorSlot:
    """The slot of a tensor that was taken out of a tree.

    Attributes:
        key: index of the tensor in a list, or the name of a buffer.
    """

    key: int | str


def _take_tensors(tree: Any) -> tuple[list[Tensor], list[Any], TreeSpec]:
    """(tensors, leaves with a `TensorSlot` for each tensor, structure) of a tree."""
    leaves, spec = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    count = iter(range(len(tensors)))
    return tensors, [TensorSlot(next(count)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


class Part(nn.Module):
    """`log_scale_and_shift` for the halves of one shape, their tensors as inputs.

    Args:
        half: one of them.
        passive: (R, H', W', P) planes.
        bound: of the log-scale.
        per_image: whether planes come once per image.
    """

    def __init__(
        self, half: FoldedHalfCoupling, passive: Sequence[int], bound: float, per_image: bool
    ) -> None:
        super().__init__()
        tensors, self.leaves, self.spec = _take_tensors(half)
        self.kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        self.passive, self.bound, self.per_image = tuple(passive), bound, per_image

    @property
    def key(self) -> Hashable:
        """Everything that is the same for all halves that this part serves."""
        return tuple(self.kinds), tuple(self.leaves), str(self.spec), self.passive, self.bound, self.per_image

    def example(self, batch: int) -> tuple[Any, ...]:
        """Inputs; only shapes matter."""
        label_index = torch.zeros(batch + 1 if self.per_image else batch, dtype=torch.int64)
        tensors = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in self.kinds)
        image = torch.zeros_like(label_index) if self.per_image else None
        return torch.zeros(batch, *self.passive), label_index, image, tensors

    def forward(
        self, passive: Tensor, label_index: Tensor, image: Tensor | None, tensors: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """See `fastflow.models.inference.planes.log_scale_and_shift`."""
        leaves = [
            tensors[cast(int, leaf.key)] if isinstance(leaf, TensorSlot) else leaf for leaf in self.leaves
        ]
        half = tree_unflatten(leaves, self.spec)
        return plane_walk.log_scale_and_shift(passive, label_index, half, self.bound, image)


class Parts:
    """The parts that graphs call by name.

    Halves of one shape are one function, traced once, whichever graph they are in.
    """

    domain = "fastflow"

    def __init__(self) -> None:
        self.parts: dict[Hashable, Part] = {}

    def name(self, i: int) -> str:
        """The name of the i-th part."""
        return f"conditioner_{i}"

    def __call__(
        self,
        passive: Tensor,
        label_index: Tensor,
        half: FoldedHalfCoupling,
        bound: float,
        image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A call of the part of a half, as `fastflow.models.inference.planes.log_scale_and_shift`."""
        part = Part(half, [int(n) for n in passive.shape[1:]], bound, image is not None)
        self.parts.setdefault(part.key, part)
        index = list(self.parts).index(part.key)
        tensors, _, _ = _take_tensors(half)
        inputs = [passive, label_index, *(() if image is None else (image,)), *tensors]
        net = half.net
        moved = [net.heads.scale.shape[1]] if isinstance(net, ClassificationNet) else passive.shape[1:]
        s, shift = torch.onnx.ops.symbolic_multi_out(
            f"{self.domain}::{self.name(index)}",
            inputs,
            dtypes=[passive.dtype] * 2,
            shapes=[[label_index.shape[0], *moved]] * 2,
            version=1,
        )
        return s, shift
