"""Parameters that a label gives to a conditioner, as tables with one entry for each label.

Everything a conditioner knows of the label is FiLM's scale and shift, folded with the norm's own affine part,
and (in the classification conditioner) the label's share of the heads. Tables are computed once per pass and
gathered by the label index of each sample, so K labels of one image cost K entries, not K embeddings per
image.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow import kernels


class Modulation(NamedTuple):
    """FiLM folded with a norm's affine part: two (R, C) tables."""

    gamma: Tensor
    beta: Tensor


class LabelParams(NamedTuple):
    """The parameters that R labels give to a conditioner.

    Attributes:
        films: modulations in the order in which the conditioner's norms use them: tables, or, where a pass
            has gathered them, (B, C, 2) with an entry for each sample.
        heads: (R, D) tables of the scale head and of the shift head; empty where heads know no label.
    """

    films: tuple[Modulation | Tensor, ...]
    heads: tuple[Tensor, ...] = ()

    def first(self, count: int) -> LabelParams:
        """The entries of the first `count` labels."""
        return self._each(lambda table: table[:count])

    def tables(self) -> list[Modulation]:
        """The modulations, which must be tables."""
        return [film for film in self.films if isinstance(film, Modulation)]

    def tensors(self) -> list[Tensor]:
        """All tables."""
        films = [film if isinstance(film, Modulation) else (film,) for film in self.films]
        return [table for film in films for table in film] + list(self.heads)

    def leaves(self) -> LabelParams:
        """Copies of the tables that are leaves of autograd."""
        return self._each(lambda table: table.detach().requires_grad_(table.requires_grad))

    def _each(self, change: Callable[[Tensor], Tensor]) -> LabelParams:
        films = tuple(
            Modulation(*map(change, film)) if isinstance(film, Modulation) else change(film)
            for film in self.films
        )
        return LabelParams(films, tuple(map(change, self.heads)))


class Dropout(NamedTuple):
    """A dropout: its probability, and the seed (B,) that says which elements of each sample it drops."""

    p: float
    seeds: Tensor


class Film(NamedTuple):
    """Label information for one norm of a pass over samples.

    Attributes:
        modulation: of each label, or (B, C, 2) of each sample.
        label_index: (B,) the entry of each sample.
        dropout: after the activation, or None.
    """

    modulation: Modulation | Tensor
    label_index: Tensor
    dropout: Dropout | None = None


class CouplingMask(NamedTuple):
    """The elements that a half of a coupling keeps.

    Attributes:
        passive: (C, H, W), True where an element is kept.
        order: the order of the pixels for kernels that read it.
    """

    passive: Tensor
    order: kernels.PixelOrder | None = None


class NextInput(NamedTuple):
    """The input of the next conditioner, which a coupling writes while its result is at hand.

    Attributes:
        visible: (C, H, W), True where the next conditioner sees the result.
        affine: (2,), the factor and the constant of a step of one channel that lies between; None without
            one.
    """

    visible: Tensor
    affine: Tensor | None = None


def conditioner_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a conditioner reads a stream `x`: that of autocast where it is on."""
    device = x.device.type
    if x.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def masked_input(x: Tensor, visible: Tensor) -> Tensor:
    """The stream `x` as a conditioner reads it: zero where `visible` (C, H, W) is False."""
    return x.masked_fill(~visible, 0.0).to(conditioner_dtype(x))


def repeat_labels(v: Tensor, count: int) -> Tensor:
    """`v` with `count` samples: images that came once for several labels are repeated for each of them."""
    return v if v.shape[0] == count else v.repeat_interleave(count // v.shape[0], dim=0)
