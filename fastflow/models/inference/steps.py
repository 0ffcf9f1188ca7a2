"""Constants of a folded flow: its steps, their couplings and what lies between them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastflow.models.inference.leaves import ClassificationNet, GenerationNet


class FoldedHalfCoupling(NamedTuple):
    """One half of a coupling.

    Attributes:
        net: its conditioner.
        films: (K, sum of 2C), FiLM folded with the affine part of each norm in order of use, scale then
            shift.
        sizes: columns that each norm takes of `films`.
        passive: (H', W', P), which elements of the one tensor of planes are kept; None where whole planes
            are.
        active: (H', W', P), which of them move.
        rank: (H', W', P), where each element stands among those that dense heads compute (anywhere for the
            others).
    """

    net: ClassificationNet | GenerationNet
    films: Tensor
    sizes: tuple[int, ...]
    passive: Tensor | None = None
    active: Tensor | None = None
    rank: Tensor | None = None


class PlaneMix(NamedTuple):
    """The maps between two couplings: one of all planes of a pixel for each tensor of the next planes.

    Attributes:
        weights: a matrix (from, to) for each tensor.
        biases: a constant (to,) for each tensor.
        sources: where a step of one channel only exchanges roles, the tensor that each one comes from.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    sources: tuple[int, ...] | None


class FoldedStep(NamedTuple):
    """One flow step.

    Attributes:
        squeeze: 2x2 blocks of pixels become channels before the mix.
        uses_label: whether its conditioners know the label.
        mix: from the planes of the step before to those of this one.
        columns: for each tensor of planes, which of all planes it holds.
        valid: for each tensor, (H', W', P) of 0 and 1, where an odd size leaves phases without a pixel; None
            where all have one.
        halves: the two halves; in the second the passive and the active tensor exchange their roles.
        split: which of the tensors' planes, joined, leave as latent after this step; None where none does,
            and for the last step.
    """

    squeeze: bool
    uses_label: bool
    mix: PlaneMix
    columns: tuple[Tensor, ...]
    valid: tuple[Tensor, ...] | None
    halves: tuple[FoldedHalfCoupling, FoldedHalfCoupling]
    split: Tensor | None


class FoldedFlow(NamedTuple):
    """A folded model.

    Attributes:
        steps: its steps.
        phases: 2 where planes are the phases of channels, else 1.
        constant: the part of log p(x|y) that neither image nor label changes: log-determinants and the
            prior's normalisation, in nats.
        bound: of the log-scale.
    """

    steps: tuple[FoldedStep, ...]
    phases: int
    constant: float
    bound: float
