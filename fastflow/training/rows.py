"""Which rows of a batch a process computes, and random numbers that do not depend on how many share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class BatchRows:
    """Every `step`-th of the `whole` rows of a batch, from row `first` on.

    Attributes:
        first: index of the first row.
        step: distance of two rows.
        whole: rows of the batch, over all processes.
    """

    first: int
    step: int
    whole: int

    @classmethod
    def all(cls, whole: int) -> BatchRows:
        """Every row of a batch of `whole` rows."""
        return cls(0, 1, whole)

    @property
    def index(self) -> slice:
        """What picks the rows of an array of `whole` rows."""
        return slice(self.first, self.whole, self.step)

    def __len__(self) -> int:
        """How many rows these are."""
        return len(range(self.first, self.whole, self.step))

    def draw(self, function: Callable[..., Tensor], *shape: int, **options: Any) -> Tensor:
        """Random numbers (n, *shape) for the n rows, out of those that are drawn for the whole batch.

        Args:
            function: draws numbers of a shape, such as `torch.rand`.
            shape: of the numbers of one row.
            options: keywords of the function.
        """
        return function((self.whole, *shape), **options)[self.index]


def merged(values: Tensor, rows: BatchRows) -> Tensor:
    """Values (n, ...) of some rows at their places in a batch (whole, ...), zero elsewhere."""
    whole = torch.zeros((rows.whole, *values.shape[1:]), dtype=values.dtype, device=values.device)
    whole[rows.index] = values
    return whole
