"""A flow step, and the same step given labels: everything that no image changes, computed first."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastflow import kernels
from fastflow.errors import UninitializedModelError
from fastflow.kernels.lu_mixing import inverse_mixing_reference
from fastflow.models.conditioners.label_params import LabelParams, NextInput, conditioner_dtype
from fastflow.models.config import FlowConfig, Shape
from fastflow.models.coupling import AffineCoupling, ConvWeights, Seeds
from fastflow.models.layers import ActNorm, InvertibleConv1x1
from fastflow.models.mixing import Mixing, StepMap, step_logdet, step_map, step_maps


class FlowStep(nn.Module):
    """ActNorm, invertible 1x1 convolution, coupling; with the squeeze before them where the layout has one.

    Args:
        config: the model.
        step: index of this step.
        shape: (C, H, W) that the step transforms, after its squeeze.
        mask: (C, H, W) bool, True = passive in the first half.
    """

    def __init__(self, config: FlowConfig, step: int, shape: Shape, mask: Tensor) -> None:
        super().__init__()
        self.squeeze = step in config.squeeze_before
        self.split = step in config.split_after
        self.uses_label = step >= config.condition_from_step
        self.pixels = shape[1] * shape[2]
        self.actnorm = ActNorm(shape[0])
        self.conv = InvertibleConv1x1(shape[0])
        self.coupling = AffineCoupling(config, step, shape, mask)

    def initialize(self, x: Tensor) -> None:
        """Set ActNorm from the step's first batch x (B, C', H', W'); nothing where it is set.

        Raises:
            UninitializedModelError: it is not set and the step is not in training mode.
        """
        if self.actnorm.ready:
            return
        if not self.training:
            raise UninitializedModelError
        self.actnorm.initialize(kernels.squeeze2x2(x) if self.squeeze else x)

    def label_params(self, labels: Tensor) -> list[LabelParams]:
        """The parameters that `labels` (R,) give each conditioner; those of one label where it knows none."""
        return self.coupling.label_params(labels if self.uses_label else labels.new_zeros(1))

    def mixing_layer(self) -> kernels.MixingLayer:
        """The parameters of ActNorm and convolution."""
        conv, norm = self.conv, self.actnorm
        lu = conv.lower, conv.upper, conv.log_s
        return kernels.MixingLayer(*lu, norm.log_scale, norm.bias, conv.permutation, conv.sign, self.pixels)

    def mixing(self, dtype: torch.dtype) -> Mixing:
        """The affine map of the channels, computed in float64."""
        mixing = step_map(self.mixing_layer(), dtype).mixing
        assert mixing is not None
        return mixing

    def inverse_matrix(self, dtype: torch.dtype) -> Tensor:
        """The inverse (C, C) of the matrix of `mixing`, from the factors of the 1x1 convolution."""
        return inverse_mixing_reference(self.mixing_layer()).to(dtype)

    def mixing_logdet(self) -> Tensor:
        """Log-determinant of ActNorm and convolution, a scalar in float64 that no sample or label changes."""
        return step_logdet(self.mixing_layer())

    @property
    def may_be_applied_before(self) -> bool:
        """Whether the mix has a single channel, so that the coupling before the step can apply it."""
        return self.conv.log_s.numel() == 1 and not self.squeeze and self.actnorm.ready

    def affine(self, inverse: bool = False) -> Tensor | None:
        """The mix of a step of one channel as (2,), a factor and a constant; None where it is more.

        The coupling before such a step applies it while its result is at hand. With `inverse`, they are the
        factor and the constant of `unmix`.
        """
        if not self.may_be_applied_before:
            return None
        return step_map(self.mixing_layer(), self.actnorm.bias.dtype, True, inverse).affine

    def mix(self, x: Tensor) -> Tensor:
        """Squeeze, ActNorm and convolution: x (B, C', H', W') -> (B, C, H, W).

        The first training batch sets ActNorm.
        """
        self.initialize(x)
        return kernels.channel_mix(x, *self.mixing(x.dtype), squeeze=self.squeeze)

    def unmix(self, y: Tensor) -> Tensor:
        """Inverse of `mix`."""
        if not self.actnorm.ready:
            raise UninitializedModelError
        found = step_map(self.mixing_layer(), y.dtype, inverse=True)
        assert found.mixing is not None
        return kernels.channel_unmix(y, *found.mixing, self.squeeze, found.inverse_matrix)


class HalfParams(NamedTuple):
    """The parameters that a pass over samples has computed ahead for the halves of a step's coupling.

    Attributes:
        label_params: of each half.
        conv_weights: of the normed convolutions of each half's conditioner; None where modules have them.
    """

    label_params: list[LabelParams]
    conv_weights: ConvWeights | None


@dataclasses.dataclass(frozen=True)
class ConditionedStep:
    """A step given labels.

    Attributes:
        step: the step.
        label_params_of: finds `label_params` for the index of a step.
        index: of the step.
        mixing: the affine map of the channels; None as long as ActNorm waits for its first batch, and where
            the coupling before the step applies it.
        logdet: of that map, a scalar in float64; None as long as ActNorm waits for its first batch.
        inverse_matrix: of `mixing`, where the inverse was asked for.
        next_input: what the coupling does of the next step in the forward direction.
        previous_input: what the inverse coupling does of its own inverse mix, for the step before it.
    """

    step: FlowStep
    label_params_of: Callable[[int], list[LabelParams]]
    index: int
    mixing: Mixing | None = None
    logdet: Tensor | None = None
    inverse_matrix: Tensor | None = None
    next_input: NextInput | None = None
    previous_input: NextInput | None = None

    @property
    def label_params(self) -> list[LabelParams]:
        """The parameters of each conditioner for R labels, or for one where the step ignores the label."""
        return self.label_params_of(self.index)

    def mixing_logdet(self) -> Tensor:
        """Log-determinant of ActNorm and convolution, a scalar in float64; after the first batch."""
        return self.step.mixing_logdet() if self.logdet is None else self.logdet

    def mix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mix of x, and the result as the first conditioner of the coupling sees it."""
        self.step.initialize(x)
        mixing = self.step.mixing(x.dtype) if self.mixing is None else self.mixing
        return kernels.channel_mix_masked(
            x, *mixing, self.step.coupling.mask, self.step.squeeze, dtype=conditioner_dtype(x)
        )

    def forward(
        self,
        h: Tensor,
        masked: Tensor | None,
        label_index: Tensor,
        seeds: Seeds | None = None,
        params: HalfParams | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The step.

        Args:
            h: (B, C', H', W'), or the mixed (B, C, H, W) where `masked` is given.
            masked: what the first conditioner reads, where the step before has written it.
            label_index: (B,).
            seeds: of the dropouts, fresh ones when None.
            params: of the halves, where they were computed ahead for these samples.

        Returns:
            `(h, logdet, masked)`: the result, the coupling's log-determinant (B,), and the input of the next
            step's first conditioner where it is written already; h is then mixed by the next step.
        """
        if masked is None:
            h, masked = self.mix(h)
        label_params, conv_weights = params if params is not None else (self.label_params, None)
        return self.step.coupling(
            h,
            masked,
            label_params,
            label_index,
            next_input=self.next_input,
            seeds=seeds,
            conv_weights=conv_weights,
        )

    def forward_with_map(self, h: Tensor, label_index: Tensor) -> tuple[Tensor, Tensor]:
        """The step on h (B, C', H', W'), its log-determinant still on its elements: (h, (B, C, H, W))."""
        self.step.initialize(h)
        mixing = self.step.mixing(h.dtype) if self.mixing is None else self.mixing
        h = kernels.channel_mix(h, *mixing, squeeze=self.step.squeeze)
        return self.step.coupling.forward_with_map(h, self.label_params, label_index)

    def inverse(
        self, h: Tensor, masked: Tensor | None, label_index: Tensor, params: HalfParams | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The inverse step: (h, the input of the previous step's second conditioner if it is written)."""
        label_params, conv_weights = params if params is not None else (self.label_params, None)
        if masked is None:
            # The second half's conditioner goes first; it sees what the first half moves.
            masked = h.masked_fill(self.step.coupling.mask, 0.0).to(conditioner_dtype(h))
        h, _, masked = self.step.coupling(
            h,
            masked,
            label_params,
            label_index,
            inverse=True,
            next_input=self.previous_input,
            conv_weights=conv_weights,
        )
        if self.previous_input is None:
            assert self.mixing is not None and self.inverse_matrix is not None
            h = kernels.channel_unmix(h, *self.mixing, self.step.squeeze, self.inverse_matrix)
        return h, masked


def condition_step(steps: Sequence[FlowStep], i: int, labels: Tensor) -> ConditionedStep:
    """Step i given `labels` (R,), for the forward direction; its mix is left to the first image."""
    affine = steps[i + 1].affine() if i + 1 < len(steps) and not steps[i].split else None
    following = _next_input(steps, i + 1, affine, inverse=False)
    params = steps[i].label_params(labels)
    return ConditionedStep(steps[i], lambda _: params, i, next_input=following)


def condition_steps(
    steps: Sequence[FlowStep],
    label_params_of: Callable[[int], list[LabelParams]],
    dtype: torch.dtype,
    inverse: bool = False,
) -> list[ConditionedStep]:
    """All steps given labels, for one direction, in one call.

    It computes mixing matrices, constants and log-determinants.

    Args:
        steps: of the flow.
        label_params_of: finds the label parameters of a step's conditioners by its index.
        dtype: of the stream.
        inverse: prepare the inverse direction instead of the forward one.
    """
    applied = [_is_applied_before(steps, i) for i in range(len(steps))]
    if all(step.actnorm.ready for step in steps):
        maps = step_maps([step.mixing_layer() for step in steps], applied, dtype, inverse)
    else:
        maps = [_forward_map(step, dtype, pair) for step, pair in zip(steps, applied, strict=True)]
    inputs = [_next_input(steps, i, one.affine, inverse) for i, one in enumerate(maps)]
    none: list[NextInput | None] = [None] * len(steps)
    following, previous = (none, inputs) if inverse else ([*inputs[1:], None], none)
    return [
        ConditionedStep(step, label_params_of, i, one.mixing, one.logdet, one.inverse_matrix, *written)
        for i, (step, one, *written) in enumerate(zip(steps, maps, following, previous, strict=True))
    ]


def _forward_map(step: FlowStep, dtype: torch.dtype, applied: bool) -> StepMap:
    if not step.actnorm.ready:
        return StepMap()
    return step_map(step.mixing_layer(), dtype, applied)._replace(logdet=step.mixing_logdet())


def _is_applied_before(steps: Sequence[FlowStep], i: int) -> bool:
    """Whether the coupling before step i applies the mix of step i, in both directions."""
    return i > 0 and not steps[i - 1].split and steps[i].may_be_applied_before


def _next_input(steps: Sequence[FlowStep], i: int, affine: Tensor | None, inverse: bool) -> NextInput | None:
    """The input that a coupling writes where it applies the mix of step i, or its inverse."""
    if affine is None:
        return None
    return NextInput(steps[i - 1].coupling.opposite if inverse else steps[i].coupling.mask, affine)


# How a walk runs a step: (index, h, masked input of its first conditioner or None) -> (h, term, masked input
# of the next).
RunStep = Callable[[int, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


class Walk(NamedTuple):
    """The results of steps on images.

    Attributes:
        h: the stream (B, C, H, W).
        masked: the input of the next conditioner where it is written already; h is then mixed by the next
            step.
        terms: of each step: the coupling's log-determinant (B,), or whatever else the walk's `run` returned.
        blocks: split off, in the order of the steps.
    """

    h: Tensor
    masked: Tensor | None
    terms: list[Tensor]
    blocks: list[Tensor]


def walk_forward(
    steps: Sequence[FlowStep],
    h: Tensor,
    run: RunStep,
    masked: Tensor | None = None,
    first: int = 0,
    last: int | None = None,
) -> Walk:
    """The steps from `first` on, before `last`, each by `run`, with the splits between them."""
    terms, blocks = [], []
    for i in range(first, len(steps) if last is None else last):
        h, term, masked = run(i, h, masked)
        terms.append(term)
        if steps[i].split:
            h, block = h.chunk(2, dim=1)
            blocks.append(block)
    return Walk(h, masked, terms, blocks)
