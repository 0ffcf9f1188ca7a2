"""The parameters of all steps of a flow that a pass can compute together, in few launches on a GPU.

A CPU, the reference backend and graphs that are compiled or exported take the label parameters of each step
by itself, which is the definition.
"""

from __future__ import annotations

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
from fastflow.models.step import FlowStep, HalfParams


class FlowLabelParams:
    """The parameters that R labels give to all steps.

    Args:
        steps: of the flow.
        labels: (R,) int64.

    Attributes:
        by_label: of each step, those of its conditioners.
    """

    by_label: list[list[LabelParams]]

    def __init__(self, steps: Sequence[FlowStep], labels: Tensor) -> None:
        self._steps = steps
        self._groups: list[tuple[list[tuple[int, int]], GroupedLabelParams]] = []
        nets = [net for step in steps for net in step.coupling.conditioners]
        if not runs_triton(labels) or torch.compiler.is_compiling() or not can_group(nets):
            self.by_label = [step.label_params(labels) for step in steps]
            return
        self.by_label = [[] for _ in steps]
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
            for (i, _), params in zip(places, group.by_label(), strict=True):
                self.by_label[i].append(params)

    def by_sample(self, label_index: Tensor) -> list[HalfParams] | None:
        """The parameters of each step for samples with `label_index` (B,), in a pass that records gradients.

        None where a pass takes `by_label`.
        """
        if not self._groups or not torch.is_grad_enabled():
            return None
        halves: list[list[LabelParams]] = [[] for _ in self._steps]
        for places, group in self._groups:
            uses_label = self._steps[places[0][0]].uses_label
            index = label_index if uses_label else torch.zeros_like(label_index)
            for (i, j), uses in zip(places, group.by_sample(index), strict=True):
                shared = len(self._steps[i].coupling.conditioners) == 1
                halves[i] += uses if shared else uses[j : j + 1]
        nets = [(step.coupling.conditioners[0], step.coupling.conditioners[-1]) for step in self._steps]
        # A conditioner that both halves share gives each its own use; others are used once.
        convs = [conv for first, _ in nets for conv in first.normed_convs()]
        convs += [conv for first, last in nets if last is not first for conv in last.normed_convs()]
        weights = iter(grouped_weight_norm(convs))
        firsts = [[next(weights) for _ in first.normed_convs()] for first, _ in nets]
        lasts = [
            own if last is first else [next(weights) for _ in last.normed_convs()]
            for (first, last), own in zip(nets, firsts, strict=True)
        ]
        return [
            HalfParams(params, ([use[0] for use in first], [use[1] for use in last]))
            for params, first, last in zip(halves, firsts, lasts, strict=True)
        ]
