"""The phases of a training: which objective, for which share of the steps, at how many passes.

A strong discriminative term from the first step on holds the likelihood back; as a last phase it separates
the classes at little cost in bits/dim. So a schedule names objectives in turn.

Everything here is decided by the number of a step, so a training that goes on later needs no more than that
number to know its phase.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from fastflow.errors import did_you_mean
from fastflow.training.objective import OBJECTIVES


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a training with one objective.

    Attributes:
        objective: ``"likelihood"``, ``"pairwise"`` or ``"hybrid"`` (see `fastflow.training.objective`).
        share: of all steps, in (0, 1].
        weight: of the discriminative term; None takes `TrainConfig.contrast_weight`.
        temperature: nats of log-odds that count as one logit in it; None takes
            `TrainConfig.contrast_temperature`.
        rivals: R, wrong labels that ``"hybrid"`` compares the right one with, drawn by how hard they are;
            None and K - 1 or more take all.
        ramp: share of the phase over which the weight grows linearly to its value, in [0, 1].
        rate: factor of the learning rate.
        restart_average: whether the average of the weights begins anew with the phase.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    objective: str = "likelihood"
    share: float = 1.0
    weight: float | None = None
    temperature: float | None = None
    rivals: int | None = None
    ramp: float = 0.0
    rate: float = 1.0
    restart_average: bool = False

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
                f"{did_you_mean(self.objective, OBJECTIVES)}"
            )
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"share must lie in (0, 1], got {self.share!r}")
        if not 0.0 <= self.ramp <= 1.0:
            raise ValueError(f"ramp must lie in [0, 1], got {self.ramp!r}")
        if self.weight is not None and not self.weight >= 0.0:
            raise ValueError(f"weight must be at least 0, got {self.weight!r}")
        for name in ("temperature", "rate"):
            value = getattr(self, name)
            if value is not None and not value > 0.0:
                raise ValueError(f"{name} must be positive, got {value!r}")
        if self.rivals is None:
            return
        if self.objective != "hybrid":
            raise ValueError(f"rivals belong to the objective hybrid, got {self.rivals} of {self.objective}")
        if self.rivals < 1:
            raise ValueError(f"rivals must be at least 1, got {self.rivals}; leave it away for all labels")

    def drawn(self, classes: int) -> int:
        """How many wrong labels are drawn for each image, of K `classes`; 0 where none or all are taken."""
        if classes < 2 or self.objective == "likelihood":
            return 0
        if self.objective == "pairwise":
            return 1
        return 0 if self.rivals is None or self.rivals >= classes - 1 else self.rivals

    def weight_at(self, step: int, steps: int) -> float:
        """The weight in a step, counted from 0, of the phase's so many steps.

        Raises:
            ValueError: the phase leaves its weight to `TrainConfig`.
        """
        if self.weight is None:
            raise ValueError("the weight of the phase is None: take it from TrainConfig.phases")
        ramp = self.ramp * steps
        return self.weight if step + 1 >= ramp else self.weight * (step + 1) / ramp


class Moment(NamedTuple):
    """What the number of a step decides.

    Attributes:
        phase: index of its phase.
        weight: of the discriminative term.
        rate: factor of the learning rate.
        restarts_average: whether the average of the weights begins anew with this step.
    """

    phase: int
    weight: float
    rate: float
    restarts_average: bool = False


def passes(objective: str, classes: int, rivals: int | None = None) -> int:
    """Passes through the flow that a training step makes for each image, forward and back.

    Args:
        objective: one of `OBJECTIVES`.
        classes: K; with one, every objective is the likelihood.
        rivals: of ``"hybrid"``; None takes all.

    Returns:
        1 of ``"likelihood"``, 2 of ``"pairwise"``, 1 + min(R, K - 1) of ``"hybrid"``.

    Raises:
        ValueError: there is no such objective, or it takes no `rivals`.
    """
    phase = Phase(objective, rivals=rivals)
    if objective == "hybrid":
        return 1 + (phase.drawn(classes) or classes - 1)
    return 1 + phase.drawn(classes)


def check_schedule(phases: Sequence[Phase]) -> None:
    """Check that shares of phases make a whole.

    Raises:
        ValueError: they do not, or an entry is no `Phase`.
    """
    for phase in phases:
        if not isinstance(phase, Phase):
            raise ValueError(f"schedule must hold Phase objects, got {phase!r}; parse_schedule reads text")
    total = sum(phase.share for phase in phases)
    if phases and abs(total - 1.0) > 1e-6:
        shares = " + ".join(f"{phase.share:g}" for phase in phases)
        raise ValueError(f"schedule: the shares of the phases must sum to 1, got {shares} = {total:g}")


def phase_starts(phases: Sequence[Phase], steps: int) -> list[int]:
    """The first step of each phase, and `steps` at the end; a phase that rounds to no step is passed over."""
    sums = list(itertools.accumulate(phase.share for phase in phases))
    return [0, *(round(done * steps) for done in sums[:-1]), steps]


def moment(phases: Sequence[Phase], step: int, steps: int) -> Moment:
    """What a step, counted from 0, does.

    Args:
        phases: with weights, as `TrainConfig.phases` gives them.
        step: of the whole training; one that lies beyond it does what the last one does.
        steps: of the whole training.
    """
    starts = phase_starts(phases, steps)
    step = min(step, steps - 1)
    index = max(i for i, start in enumerate(starts[:-1]) if start <= step)
    phase, begin, end = phases[index], starts[index], starts[index + 1]
    restarts = phase.restart_average and step == begin and index > 0
    return Moment(index, phase.weight_at(step - begin, end - begin), phase.rate, restarts)


def mean_passes(phases: Sequence[Phase], span: range, steps: int, classes: int) -> float:
    """Mean number of passes for each image in a span of the steps, as of an epoch.

    Args:
        phases: of the training, with weights.
        span: steps, counted from 0.
        steps: of the whole training.
        classes: K.
    """
    made = [passes(phase.objective, classes, phase.rivals) for phase in phases]
    return sum(made[moment(phases, step, steps).phase] for step in span) / len(span)


def describe(phases: Sequence[Phase], classes: int) -> str:
    """One line: ``likelihood 80 % of steps, 1 pass an image; hybrid 20 %, 4 passes``."""
    parts = []
    for i, phase in enumerate(phases):
        count = passes(phase.objective, classes, phase.rivals)
        of_steps, an_image = (" of steps", " an image") if i == 0 else ("", "")
        noun = "pass" if count == 1 else "passes"
        parts.append(f"{phase.objective} {100 * phase.share:g} %{of_steps}, {count} {noun}{an_image}")
    return "; ".join(parts)


# -- text and JSON -------------------------------------------------------------------------------------------


def _flag(text: str) -> bool:
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    return values[text.lower()]


_FORMS = {
    "weight": (float, "a number"),
    "temperature": (float, "a number"),
    "rivals": (int, "a whole number"),
    "ramp": (float, "a number"),
    "rate": (float, "a number"),
    "restart_average": (_flag, "true or false"),
}


def parse_schedule(text: str) -> tuple[Phase, ...]:
    """Phases from text such as ``likelihood:0.8,hybrid:0.2:weight=0.1:rivals=3:ramp=0.25``.

    Phases are separated by commas; each is an objective, its share of the steps, and fields of `Phase`. A
    single phase may leave its share away.

    Raises:
        ValueError: a phase cannot be read, or the shares do not sum to 1; the message names it.
    """
    parts = [part.strip() for part in text.split(",")]
    phases = tuple(_parse_phase(part, i, len(parts)) for i, part in enumerate(parts, 1))
    check_schedule(phases)
    return phases


def _parse_phase(part: str, number: int, count: int) -> Phase:
    where = f"schedule: phase {number}, {part!r}"
    objective, *others = (word.strip() for word in part.split(":"))
    values: dict[str, Any] = {"objective": objective}
    if others and "=" not in others[0]:
        values["share"] = _number("share", others.pop(0), float, "a number", where)
    elif count > 1:
        raise ValueError(f"{where}: a share of the steps must follow the objective, as in {objective}:0.2")
    for word in others:
        name, equals, value = (piece.strip() for piece in word.partition("="))
        if name not in _FORMS:
            raise ValueError(
                f"{where}: {name!r} is unknown{did_you_mean(name, _FORMS)}; there are {', '.join(_FORMS)}"
            )
        if not equals:
            raise ValueError(f"{where}: {name} needs a value, as in {name}=1")
        values[name] = _number(name, value, *_FORMS[name], where)
    try:
        return Phase(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _number(name: str, text: str, read: Any, form: str, where: str) -> Any:
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"{where}: {name} must be {form}, got {text!r}") from None


def format_schedule(phases: Iterable[Phase]) -> str:
    """The text that `parse_schedule` reads as these phases; fields at their defaults are left away."""
    parts = []
    for phase in phases:
        words = [phase.objective, repr(phase.share)]
        for field in dataclasses.fields(Phase):
            value = getattr(phase, field.name)
            if field.name in _FORMS and value != field.default:
                words.append(f"{field.name}={str(value).lower()}")
        parts.append(":".join(words))
    return ",".join(parts)


def phase_from_dict(values: Mapping[str, Any]) -> Phase:
    """A phase from the JSON form of `dataclasses.asdict`.

    Raises:
        ValueError: a key is unknown, for which the nearest is offered, or a value is out of range.
    """
    known = [field.name for field in dataclasses.fields(Phase)]
    for name in values:
        if name not in known:
            raise ValueError(
                f"schedule: {name!r} is no field of a phase{did_you_mean(name, known)}; "
                f"there are {', '.join(known)}"
            )
    return Phase(**values)
