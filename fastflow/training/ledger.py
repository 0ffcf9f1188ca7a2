"""What the host knows of the steps of a training: figures from reports that arrive without a wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastflow.training.optimizer_state import part
from fastflow.training.staging import (
    BITS,
    LOSS,
    SAMPLES,
    SKIPPED,
    SKIPPED_STEPS,
    HostReport,
    Reports,
)


class Totals(NamedTuple):
    """Figures of all steps since they were last taken.

    Attributes:
        bits_per_dim: sum over samples, in float64.
        samples: of steps that were taken.
        skipped_steps: whose loss or gradients were not finite.
    """

    bits_per_dim: float
    samples: int
    skipped_steps: int


NO_STEPS = Totals(0.0, 0, 0)


class StepFigures(NamedTuple):
    """Figures of the latest step whose report has arrived.

    Attributes:
        steps: so many reports have arrived, that of this step included.
        loss: of the step.
        bits_per_dim: mean over the step's samples; NaN where the step was skipped.
        totals: of all steps since totals were last taken, up to this one.
        skipped_in_a_row: steps without a finite one between them, up to this one.
    """

    steps: int
    loss: float
    bits_per_dim: float
    totals: Totals
    skipped_in_a_row: int


class StepLedger:
    """Takes in the reports of steps, and keeps the figures of the latest one.

    Args:
        device: that writes the reports.
        late: whether a report is handed out with the next one.

    Attributes:
        last: the latest report that has arrived; None before the first.
        figures: of that report.
    """

    def __init__(self, device: torch.device, late: bool) -> None:
        self._reports = Reports(device, late)
        self.last: HostReport | None = None
        self.figures: StepFigures | None = None

    def push(self, report: Tensor, labels: Tensor, wrong: Tensor | None) -> HostReport | None:
        """As `Reports.push`."""
        return self._note(self._reports.push(report, labels, wrong))

    def flush(self) -> HostReport | None:
        """As `Reports.flush`."""
        return self._note(self._reports.flush())

    def forget_totals(self) -> None:
        """Count the totals from here on, as the steps do."""
        if self.figures is not None:
            self.figures = self.figures._replace(totals=NO_STEPS)

    def state_dict(self) -> dict[str, Tensor]:
        """The latest report and the pending one, and the figures."""
        state: dict[str, Tensor] = {}
        for name, report in (("pending", self._reports.pending()), ("last", self.last)):
            if report is not None:
                entries = report._asdict().items()
                state |= {f"{name}.{entry}": value for entry, value in entries if value is not None}
        if self.figures is not None:
            numbers = [self.figures.steps, self.figures.bits_per_dim, *self.figures.totals]
            state["figures"] = torch.tensor(numbers, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            KeyError: an entry is missing.
        """
        self._reports.restore(_report(part(state, "pending.")))
        self.last, self.figures = _report(part(state, "last.")), None
        if self.last is not None:
            steps, own_bits, bits, samples, skipped = state["figures"].tolist()
            loss, in_a_row = float(self.last.values[LOSS]), int(self.last.values[SKIPPED])
            totals = Totals(bits, int(samples), int(skipped))
            self.figures = StepFigures(int(steps), loss, own_bits, totals, in_a_row)

    def _note(self, report: HostReport | None) -> HostReport | None:
        if report is not None:
            self.last, self.figures = report, _figures(report, self.figures)
        return report


def not_finite(report: HostReport, learning_rate: float) -> FloatingPointError:
    """The error of a training that gives up after a step."""
    loss, skipped = float(report.values[LOSS]), int(report.values[SKIPPED])
    return FloatingPointError(
        f"the loss became {loss}; steps in a row whose loss or gradients are not finite, all skipped: "
        f"{skipped}; lower learning_rate ({learning_rate}) or set dequantize"
    )


def _figures(report: HostReport, before: StepFigures | None) -> StepFigures:
    """The figures of a step, whose own bits/dim are what its totals have more than those before."""
    values = report.values
    totals = Totals(float(values[BITS]), int(values[SAMPLES]), int(values[SKIPPED_STEPS]))
    earlier = NO_STEPS if before is None else before.totals
    samples = totals.samples - earlier.samples
    bits = (totals.bits_per_dim - earlier.bits_per_dim) / samples if samples else float("nan")
    steps = 1 if before is None else before.steps + 1
    return StepFigures(steps, float(values[LOSS]), bits, totals, int(values[SKIPPED]))


def _report(values: Mapping[str, Tensor]) -> HostReport | None:
    """A report from its tensors by name; None where there are none."""
    return HostReport(values["values"], values["labels"], values.get("wrong")) if values else None
