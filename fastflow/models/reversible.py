r"""Training in constant activation memory: a step's input is computed from its output instead of being kept.

Every step is a node of autograd. The last step of a scale, before the next split, keeps its output, the
anchor; the others keep nothing but the 32-bit seeds of their dropouts. In the backward pass a step is
inverted on the output that the step after it has recovered. For each half of its coupling the conditioner
runs once, under autograd and on the passive part, which is there bit for bit; its result first inverts the
half, then passes the gradient on. Log-scales and shifts are therefore those that made this output, to the
last bit; the stream drifts by a rounding or two per step.

A backward pass reads weights, masks and labels again: they are held against their versions in the forward
pass, as autograd does with what it saves, and training mode and autocast are put back to what they were.
It costs one more evaluation of every conditioner. Normalisation over the batch cannot be
replayed (its statistics would be updated twice) and is refused by `FlowConfig`. Sources: RevNet (Gomez et
al., 2017), section 3; i-RevNet and Glow for invertible layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import mark_label_index
from fastflow.kernels.registry import refuse_second_derivative
from fastflow.models.conditioners.label_params import LabelParams, masked_input
from fastflow.models.coupling import AffineCoupling, HalfCoupling, Seeds, draw_seeds
from fastflow.models.step import FlowStep, Walk, condition_step, walk_forward
from fastflow.models.versions import TensorVersions

Gradients = dict[Tensor, Tensor]


def scales(splits: Sequence[bool]) -> list[tuple[int, int]]:
    """The ranges of steps between splits, (first, last) with the last exclusive.

    Args:
        splits: whether each step splits.
    """
    ends = [i + 1 for i, split in enumerate(splits) if split and i + 1 < len(splits)] + [len(splits)]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def encode(steps: Sequence[FlowStep], x: Tensor, labels: Tensor, label_index: Tensor) -> Walk:
    """All steps of x (B, C, H, W); the terms of the walk are the log-determinants (B,) of each step.

    Args:
        steps: of the flow.
        x: images, checked.
        labels: (R,) to condition on.
        label_index: (B,) the label of each sample among them.
    """
    device = x.device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    seeds = draw_seeds([step.coupling for step in steps], len(x), x.device)
    tapes = {
        i: tape
        for first, last in scales([step.split for step in steps])
        for tape in [Tape(steps, labels, label_index, last, autocast, steps[first].coupling.training)]
        for i in range(first, last)
    }

    def run(i: int, h: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        parameters = [p for p in steps[i].parameters() if p.requires_grad]
        h, logdet = ReversibleStep.apply(h, tapes[i], i, seeds[i], parameters, *parameters)
        # The tape hands the next conditioner its input, beside autograd.
        return h, logdet, None

    return walk_forward(steps, x, run)


@dataclasses.dataclass
class Tape:
    """Values that the steps of a scale hand to each other beside autograd.

    Attributes:
        steps: of the flow.
        labels: (R,) that the flow is conditioned on.
        label_index: (B,) of the samples.
        last: end of the range of steps.
        autocast: (whether it is on, its dtype), as it was in the forward pass.
        training: whether the steps were in training mode.
        masked: forward, the next conditioner's input where a step has written it.
        stream: backward, the recovered output of the step that is inverted next.
    """

    steps: Sequence[FlowStep]
    labels: Tensor
    label_index: Tensor
    last: int
    autocast: tuple[bool, torch.dtype]
    training: bool
    masked: Tensor | None = None
    stream: Tensor | None = None


class ReversibleStep(torch.autograd.Function):
    """A step of which only the last one of a scale keeps its output.

    The parameters are inputs so that their gradients are returned.
    """

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, tape: Tape, i: int, seeds: Seeds, parameters: list[Tensor], *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.tape, ctx.i, ctx.parameters = tape, i, parameters
        h, logdet, tape.masked = run_step(tape.steps, i, h, tape.masked, tape.labels, tape.label_index, seeds)
        anchor = h if i + 1 == tape.last else None
        ctx.save_for_backward(anchor, tape.labels, tape.label_index, *seeds)
        # They are taken after the step, as its first batch sets ActNorm.
        ctx.versions = TensorVersions(tape.steps[i])
        return h, logdet

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_logdet: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative(
            "a reversible model",
            "the same weights under reversible=False have any number by set_backend('reference')",
        )
        tape: Tape = ctx.tape
        step = tape.steps[ctx.i]
        anchor, labels, label_index, *seeds = ctx.saved_tensors
        _check_unchanged(ctx.i, ctx.versions)
        y, tape.stream = tape.stream if anchor is None else anchor, None
        assert y is not None
        found: Gradients = {}
        enabled, dtype = tape.autocast
        with torch.autocast(y.device.type, dtype=dtype, enabled=enabled), _mode(step, tape.training):
            labels, label_index = _labels_of(step, labels, label_index)
            y, grad = _invert_couplings(step, y, grad, grad_logdet, labels, label_index, seeds, found)
            x, grad = _invert_mix(step, y, grad, grad_logdet, found)
        if ctx.i > 0 and not tape.steps[ctx.i - 1].split:
            tape.stream = x
        return grad, None, None, None, None, *(found.get(p) for p in ctx.parameters)


def _check_unchanged(i: int, versions: TensorVersions) -> None:
    """Raise RuntimeError where step i has other weights than in the forward pass.

    The message has the words of autograd about a tensor that it saved.
    """
    change = versions.change()
    if change is not None:
        raise RuntimeError(
            "one of the tensors needed for gradient computation has been modified: the backward pass of a "
            f"reversible model computes its steps again, and step {i}'s {change} since the forward pass; "
            "call backward before the optimizer's step or any other change of the weights"
        )


@contextlib.contextmanager
def _mode(step: FlowStep, training: bool) -> Iterator[None]:
    """A block in which the step's coupling is in training mode or not, as it was in the forward pass."""
    before = step.coupling.training
    if before == training:
        yield
        return
    step.coupling.train(training)
    try:
        yield
    finally:
        step.coupling.train(before)


def _labels_of(step: FlowStep, labels: Tensor, label_index: Tensor) -> tuple[Tensor, Tensor]:
    """Labels that a step is conditioned on and each sample's index: one label where the step ignores it."""
    if step.uses_label:
        return labels, label_index
    ignored = mark_label_index(torch.zeros_like(label_index), 1)
    return torch.zeros(1, dtype=torch.int64, device=labels.device), ignored


@torch.no_grad()
def run_step(
    steps: Sequence[FlowStep],
    i: int,
    h: Tensor,
    masked: Tensor | None,
    labels: Tensor,
    label_index: Tensor,
    seeds: Seeds,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Step i, conditioned by itself: (h, log-determinant (B,), the next conditioner's input or None).

    As in `ConditionedFlow.forward`, h is then already mixed by the next step, whose inverse undoes that.
    """
    step = condition_step(steps, i, labels)
    _, label_index = _labels_of(steps[i], labels, label_index)
    if masked is None:
        h, masked = step.mix(h)
    h, logdet, masked = step.forward(h, masked, label_index, seeds)
    return h, logdet.double() + steps[i].mixing_logdet(), masked


def _invert_couplings(
    step: FlowStep,
    y: Tensor,
    grad: Tensor,
    grad_logdet: Tensor,
    labels: Tensor,
    label_index: Tensor,
    seeds: Sequence[Tensor | None],
    found: Gradients,
) -> tuple[Tensor, Tensor]:
    """The input of a step's coupling from its output y, and its gradient; others go to `found`."""
    with torch.enable_grad():
        label_params = step.coupling.label_params(labels)
    # The halves share label parameters: their gradients are gathered before they go on to the parameters.
    leaves = [params.leaves() for params in label_params]
    gathered: Gradients = {}
    for half, half_seeds in reversed(list(zip(step.coupling.halves(), seeds, strict=True))):
        y, grad = invert_half(
            step.coupling,
            half,
            y,
            grad,
            grad_logdet,
            leaves[half.net_index],
            label_index,
            half_seeds,
            gathered,
        )
    outputs, grads = [], []
    for params, copies in zip(label_params, leaves, strict=True):
        for tensor, copy in zip(params.tensors(), copies.tensors(), strict=True):
            if tensor.requires_grad and copy in gathered:
                outputs.append(tensor)
                grads.append(gathered.pop(copy))
    _add(found, gathered)
    _differentiate(outputs, grads, [p for p in step.coupling.parameters() if p.requires_grad], found)
    return y, grad


def invert_half(
    coupling: AffineCoupling,
    half: HalfCoupling,
    y: Tensor,
    grad: Tensor,
    grad_logdet: Tensor,
    label_params: LabelParams,
    label_index: Tensor,
    seeds: Tensor | None,
    found: Gradients,
) -> tuple[Tensor, Tensor]:
    """The input of a half from its output y, and its gradient.

    Gradients of the label parameters and of the conditioner's parameters are added to `found`. The
    conditioner runs once.
    """
    net, mask = half.net, half.mask
    masked = masked_input(y, mask.passive).requires_grad_()
    with torch.enable_grad():
        params = net.encode(masked, label_params, label_index, seeds)
    detached = (params[0].detach(), params[1].detach())
    with torch.no_grad():
        x, _, _ = net.transform(y, detached, label_params, label_index, mask, coupling.bound, True, None)
    x.requires_grad_()
    with torch.enable_grad():
        again, logdet, _ = net.transform(
            x, params, label_params, label_index, mask, coupling.bound, False, None
        )
    leaves = [t for t in label_params.tensors() if t.requires_grad]
    leaves += [p for p in net.parameters() if p.requires_grad]
    more: Gradients = {}
    _differentiate([again, logdet], [grad, grad_logdet.to(logdet.dtype)], [x, masked, *leaves], more)
    through = more.pop(masked, None)
    grad = more.pop(x)
    if through is not None:
        grad = grad + through.to(grad.dtype).masked_fill(~mask.passive, 0.0)
    _add(found, more)
    return x.detach(), grad


def _invert_mix(
    step: FlowStep, y: Tensor, grad: Tensor, grad_logdet: Tensor, found: Gradients
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        x = step.unmix(y)
    x.requires_grad_()
    with torch.enable_grad():
        again, logdet = step.mix(x), step.mixing_logdet()
    parameters = [p for part in (step.actnorm, step.conv) for p in part.parameters() if p.requires_grad]
    more: Gradients = {}
    _differentiate([again, logdet], [grad, grad_logdet.sum().to(logdet.dtype)], [x, *parameters], more)
    grad = more.pop(x)
    _add(found, more)
    return x.detach(), grad


def _differentiate(
    outputs: list[Tensor], grads: list[Tensor], inputs: list[Tensor], found: Gradients
) -> None:
    """Add the gradients of `inputs` to `found`, those that there are."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not pairs or not inputs:
        return
    values = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    _add(found, {leaf: value for leaf, value in zip(inputs, values, strict=True) if value is not None})


def _add(found: Gradients, more: Gradients) -> None:
    for leaf, value in more.items():
        found[leaf] = found[leaf] + value if leaf in found else value
