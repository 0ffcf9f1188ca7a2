"""The parameters of all steps of a flow that a pass can compute together, in few launches on a GPU.

A CPU, the reference backend and graphs that are compiled or exported take the label parameters of each step
by itself, which is the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastflow.kernels.registry import runs_triton
from fastflow.models.conditioners.grouped import (
    GroupedLabelParams,
    can_group,
    grouped_label_params,
    grouped_weight_norm,
)
from fastflow.models.conditioners.label_params import LabelParams
from fastflow.models.coupling import ConvWeights
from fastflow.models.step import FlowStep, HalfParams


class FlowLabelParams:
    """The parameters that R labels give to all steps.

    Args:
        steps: of the flow.
        labels: (R,) int64.
    """

    def __init__(self, steps: Sequence[FlowStep], labels: Tensor) -> None:
        self._steps = steps
        self._groups: list[tuple[list[tuple[int, int]], GroupedLabelParams]] = []
        nets = [net for step in steps for net in step.coupling.conditioners]
        if not runs_triton(labels) or torch.compiler.is_compiling() or not can_group(nets):
            self._by_step = [step.label_params(labels) for step in steps]
            return
        for uses_label in (True, False):
            places = [
                (i, j)
                for i, step in enumerate(steps)
                if step.uses_label == uses_label
                for j in range(len(step.coupling.conditioners))
            ]
            if not places:
                continue
            group = grouped_label_params(
                [steps[i].coupling.conditioners[j] for i, j in places],
                labels if uses_label else labels.new_zeros(1),
            )
            self._groups.append((places, group))

    def of_step(self, i: int) -> list[LabelParams]:
        """The parameters of each conditioner of step i, as tables with an entry for each label."""
        return self._by_step[i]

    @functools.cached_property
    def _by_step(self) -> list[list[LabelParams]]:
        # Passes over samples take no tables, so that these views are made for those who ask.
        found: list[list[LabelParams]] = [[] for _ in self._steps]
        for places, group in self._groups:
            for (i, _), params in zip(places, group.by_label(), strict=True):
                found[i].append(params)
        return found

    def by_sample(self, label_index: Tensor, steps: range) -> dict[int, HalfParams] | None:
        """The parameters of some steps for a pass over samples; None where it takes those of `of_step`.

        Args:
            label_index: (B,) the label of each sample.
            steps: indices of the steps that the pass walks.
        """
        if not self._groups or not steps:
            return None
        halves: dict[int, list[LabelParams]] = {i: [] for i in range(len(self._steps))}
        for places, group in self._groups:
            if not any(i in steps for i, _ in places):
                continue
            uses_label = self._steps[places[0][0]].uses_label
            index = label_index if uses_label else torch.zeros_like(label_index)
            for (i, j), uses in zip(places, group.by_sample(index), strict=True):
                shared = len(self._steps[i].coupling.conditioners) == 1
                halves[i] += uses if shared else uses[j : j + 1]
        weights = self._conv_weights(steps)
        return {i: HalfParams(halves[i], weights.get(i)) for i in steps}

    def _conv_weights(self, steps: range) -> dict[int, ConvWeights]:
        """The weights of normed convolutions for both halves of each step; none where they are folded."""
        couplings = {i: self._steps[i].coupling for i in steps}
        convs = [
            conv for each in couplings.values() for net in each.conditioners for conv in net.normed_convs()
        ]
        if not convs:
            return {}
        weights = iter(grouped_weight_norm(convs))
        found = {}
        for i, each in couplings.items():
            uses = [[next(weights) for _ in net.normed_convs()] for net in each.conditioners]
            # A conditioner that both halves share gives each its own use; others are used once.
            found[i] = [first for first, _ in uses[0]], [second for _, second in uses[-1]]
        return found
