r"""Training in constant activation memory: a step's input is rebuilt from its output instead of being kept.

Every step is a node of autograd. The last step of a scale, before the next split, keeps its output, the anchor; the others keep
nothing but the 32-bit keys of their dropouts. In the backward pass a step undoes itself on the output that the step after it has
rebuilt. For each half of its coupling the conditioner runs once, under autograd and on the passive part, which is there bit for
bit; its result first undoes the half, then passes the gradient on. Log-scales and shifts are therefore those that made this
output, to the last bit; what drifts is the stream, by a rounding or two per step.

A backward pass costs one more evaluation of every conditioner. Normalisation over the batch cannot be replayed (its statistics
would be updated twice) and is refused by `FlowConfig`. Sources: RevNet (Gomez et al., 2017), section 3; i-RevNet and Glow for
invertible layers.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastflow.kernels._library import refuse_second_derivative
from fastflow.models.conditioners.blocks import Tables, conditioner_dtype
from fastflow.models.layers import AffineCoupling, FlowStep, Half, Keys

if TYPE_CHECKING:
    from fastflow.models.magic_flow import MagicFlow

Gradients = dict[Tensor, Tensor]


def scales(num_steps: int, split_after: tuple[int, ...]) -> list[tuple[int, int]]:
    """The ranges of steps between splits, (first, last) with the last exclusive."""
    ends = [i + 1 for i in split_after if i + 1 < num_steps] + [num_steps]
    return list(zip([0, *ends[:-1]], ends, strict=True))


def encode(model: MagicFlow, x: Tensor, labels: Tensor, rows: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """All steps of x (B, C, H, W): (the last block, the blocks split off, log-determinants (B,) of each step), as `run_steps`.

    Args:
        model: the flow.
        x: images, checked.
        labels: (R,) what the rows of the tables stand for.
        rows: (B,) the row of each sample.
    """
    h, splits, logdets = x, [], []
    device = x.device.type
    for first, last in scales(model.config.num_steps, model.config.split_after):
        tape = _Tape(model, labels, rows, last, (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)))
        for i in range(first, last):
            parameters = [p for p in model.steps[i].parameters() if p.requires_grad]
            h, logdet = _Step.apply(h, tape, i, model.steps[i].coupling.draw_keys(len(x), x.device), parameters, *parameters)
            logdets.append(logdet)
        if model.steps[last - 1].split:
            h, block = h.chunk(2, dim=1)
            splits.append(block)
    return h, splits, logdets


@dataclasses.dataclass
class _Tape:
    """What the steps of a scale hand to each other beside autograd.

    Attributes:
        model: the flow.
        labels: (R,) of the tables.
        rows: (B,) of the samples.
        last: end of the range of steps.
        autocast: (whether it is on, its dtype), as it was in the forward pass.
        masked: forward, the next conditioner's input where a step has written it.
        stream: backward, the rebuilt output of the step that is undone next.
    """

    model: MagicFlow
    labels: Tensor
    rows: Tensor
    last: int
    autocast: tuple[bool, torch.dtype]
    masked: Tensor | None = None
    stream: Tensor | None = None


class _Step(torch.autograd.Function):
    """A step. Only the last one of a scale keeps its output; the parameters are inputs so that their gradients are returned."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, tape: _Tape, i: int, keys: Keys, parameters: list[Tensor], *_: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.tape, ctx.i, ctx.keys, ctx.parameters = tape, i, keys, parameters
        h, logdet, tape.masked = run_step(tape.model, i, h, tape.masked, tape.labels, tape.rows, tape.last, keys)
        if i + 1 == tape.last:
            ctx.save_for_backward(h)
        return h, logdet

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_logdet: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative("a reversible model")
        tape: _Tape = ctx.tape
        if ctx.i + 1 == tape.last:
            (tape.stream,) = ctx.saved_tensors
        y, tape.stream = tape.stream, None
        assert y is not None
        labels, rows = tape.model.step_labels(ctx.i, tape.labels, tape.rows)
        found: Gradients = {}
        enabled, dtype = tape.autocast
        with torch.autocast(y.device.type, dtype=dtype, enabled=enabled):
            x, grad = _undo_step(tape.model.steps[ctx.i], y, grad, grad_logdet, labels, rows, ctx.keys, found)
        if ctx.i > 0 and not tape.model.steps[ctx.i - 1].split:
            tape.stream = x
        return grad, None, None, None, None, *(found.get(p) for p in ctx.parameters)


@torch.no_grad()
def run_step(
    model: MagicFlow, i: int, h: Tensor, masked: Tensor | None, labels: Tensor, rows: Tensor, last: int, keys: Keys
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Step i with tables of its own: (h, log-determinant (B,), the next conditioner's input where it is written beside h).

    As in `MagicFlow.run_steps`, h is then already mixed by the next step, which is undone with that step.
    """
    step = model.steps[i]
    if masked is None:
        h, masked = step.mix_masked(h)
    step_labels, step_rows = model.step_labels(i, labels, rows)
    tables = step.coupling.tables(step_labels)
    h, logdet, masked = step.coupling(h, masked, tables, step_rows, then=model.following(i, last), keys=keys)
    return h, logdet.double() + step.mixing_logdet(), masked


def _undo_step(
    step: FlowStep, y: Tensor, grad: Tensor, grad_logdet: Tensor, labels: Tensor, rows: Tensor, keys: Keys, found: Gradients
) -> tuple[Tensor, Tensor]:
    """The input of a step from its output y, and its gradient; those of the step's parameters are added to `found`."""
    with torch.enable_grad():
        tables = step.coupling.tables(labels)
    # The tables are shared by the halves: their gradients are gathered before they go on to the parameters.
    leaves = [Tables(*_map_tables(table)) for table in tables]
    gathered: Gradients = {}
    for half, half_keys in reversed(list(zip(step.coupling.halves(), keys, strict=True))):
        y, grad = undo_half(step.coupling, half, y, grad, grad_logdet, leaves[half.place], rows, half_keys, gathered)
    outputs, grads = [], []
    for table, leaf in zip(tables, leaves, strict=True):
        for tensor, copy in zip(_flat(table), _flat(leaf), strict=True):
            if tensor.requires_grad and copy in gathered:
                outputs.append(tensor)
                grads.append(gathered.pop(copy))
    _add(found, gathered)
    _differentiate(outputs, grads, [p for p in step.coupling.parameters() if p.requires_grad], found)
    return _undo_mix(step, y, grad, grad_logdet, found)


def undo_half(
    coupling: AffineCoupling,
    half: Half,
    y: Tensor,
    grad: Tensor,
    grad_logdet: Tensor,
    tables: Tables,
    rows: Tensor,
    keys: Tensor | None,
    found: Gradients,
) -> tuple[Tensor, Tensor]:
    """The input of a half from its output y, and its gradient.

    Gradients of the tables and of the conditioner's parameters are added to `found`. The conditioner runs once.
    """
    net, passive = half.net, half.passive
    masked = y.masked_fill(~passive.mask, 0.0).to(conditioner_dtype(y)).requires_grad_()
    with torch.enable_grad():
        driven = net.encode(masked, tables, rows, keys)
    detached = (driven[0].detach(), driven[1].detach())
    with torch.no_grad():
        x, _, _ = net.couple(y, detached, tables, rows, passive, coupling.bound, True, None)
    x.requires_grad_()
    with torch.enable_grad():
        again, logdet, _ = net.couple(x, driven, tables, rows, passive, coupling.bound, False, None)
    leaves = [t for t in _flat(tables) if t.requires_grad] + [p for p in net.parameters() if p.requires_grad]
    more: Gradients = {}
    _differentiate([again, logdet], [grad, grad_logdet.to(logdet.dtype)], [x, masked, *leaves], more)
    through = more.pop(masked, None)
    grad = more.pop(x)
    if through is not None:
        grad = grad + through.to(grad.dtype).masked_fill(~passive.mask, 0.0)
    _add(found, more)
    return x.detach(), grad


def _undo_mix(step: FlowStep, y: Tensor, grad: Tensor, grad_logdet: Tensor, found: Gradients) -> tuple[Tensor, Tensor]:
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


def _flat(tables: Tables) -> list[Tensor]:
    return [t for film in tables.films for t in film] + list(tables.heads)


def _map_tables(tables: Tables) -> tuple[Any, ...]:
    """Copies of tables that are leaves of autograd."""
    films = tuple(type(film)(*(t.detach().requires_grad_(t.requires_grad) for t in film)) for film in tables.films)
    return films, tuple(t.detach().requires_grad_(t.requires_grad) for t in tables.heads)


def _differentiate(outputs: list[Tensor], grads: list[Tensor], inputs: list[Tensor], found: Gradients) -> None:
    """Add the gradients of `inputs` to `found`, those that there are."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    if not pairs or not inputs:
        return
    values = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    _add(found, {leaf: value for leaf, value in zip(inputs, values, strict=True) if value is not None})


def _add(found: Gradients, more: Gradients) -> None:
    for leaf, value in more.items():
        found[leaf] = found[leaf] + value if leaf in found else value
