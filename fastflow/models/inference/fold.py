"""Folding a model for scoring: everything that no image changes, computed once.

Folded are: weight norm; ActNorm into the matrix of the 1x1 convolution; GroupNorm's affine part and FiLM into
(K, C) tables; the label half of the dense heads into (K, A) tables; every log-determinant that depends on
neither image nor label into one constant. `fastflow.models.inference.planes` tells what planes are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from fastflow.models.conditioners import ClassificationConditioner, GenerationConditioner
from fastflow.models.conditioners.label_params import LabelParams, Modulation
from fastflow.models.conditioners.leaves import BatchNormFiLM, NormFiLM
from fastflow.models.conditioners.network import norms
from fastflow.models.flow import ConditionedFlow, Flow
from fastflow.models.inference.fold_leaves import fold_conv, fold_leaf
from fastflow.models.inference.leaves import ClassificationNet, Conv, DenseHeads, GenerationNet
from fastflow.models.inference.steps import FoldedFlow, FoldedHalfCoupling, FoldedStep, PlaneMix
from fastflow.models.step import FlowStep
from fastflow.numerics import LOG_2PI

# -- conditioners --------------------------------------------------------------------------------------------


def _at_least_two(table: Tensor) -> Tensor:
    """A table of at least two labels: graphs are compiled for any number of labels above one."""
    return table if table.shape[0] > 1 else table.repeat(2, 1)


def _films(
    net: ClassificationConditioner | GenerationConditioner, params: LabelParams
) -> tuple[Tensor, tuple[int, ...]]:
    """`films` and `sizes` of `FoldedHalfCoupling`."""
    pairs = list(zip(norms(net), params.tables(), strict=True))
    films = [part for norm, film in pairs for part in _with_statistics(norm, film)]
    return _at_least_two(torch.cat(films, dim=1)), tuple(2 * film.gamma.shape[1] for _, film in pairs)


def _with_statistics(norm: NormFiLM | BatchNormFiLM, film: Modulation) -> Modulation:
    """A film, with the statistics of a BatchNorm."""
    if not isinstance(norm, BatchNormFiLM):
        return film
    mean, variance = norm.norm.running_mean, norm.norm.running_var
    assert mean is not None and variance is not None
    gamma = film.gamma * torch.rsqrt(variance + norm.norm.eps)
    return Modulation(gamma, film.beta - mean * gamma)


def over_phases(weight: Tensor) -> Tensor:
    """A convolution (O, C, 5, 5) of stride 2 and padding 2 as one over phases, (O, 4C, 3, 3), padding 1."""
    padded = F.pad(weight, (0, 1, 0, 1))
    taps = [padded[:, :, y::2, x::2] for y in range(2) for x in range(2)]
    return torch.stack(taps, dim=2).flatten(1, 2)


def _leaves(net: nn.Module, kind: type[Any], pixels: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """The leaves of a network by name; the last letter of a name is its stage, whose image has `pixels`."""
    return {
        name: fold_leaf(getattr(net, name), pixels[name[-1]], dtype)
        for name in kind._fields
        if name[-1] in pixels
    }


def _classification_net(
    net: ClassificationConditioner,
    params: LabelParams,
    shape: tuple[int, ...],
    columns: Tensor,
    moved: Tensor,
    dtype: torch.dtype,
) -> ClassificationNet:
    """A classification conditioner.

    `columns` are the planes that its first convolution reads, `moved` the elements that move, -1 where there
    is no pixel.
    """
    _, height, width = shape
    pixels = {str(i): -(-height // 2**i) * -(-width // 2**i) for i in (1, 2, 3)}
    leaves = _leaves(net, ClassificationNet, pixels, dtype)
    leaves["conv1"] = _first_conv(net, columns, dtype)
    return ClassificationNet(**leaves, heads=_dense_heads(net, params, moved))


def _first_conv(net: ClassificationConditioner, columns: Tensor, dtype: torch.dtype) -> Conv:
    return fold_conv(net.conv1, dtype, over_phases(net.conv1.weight)[:, columns])


def _dense_heads(net: ClassificationConditioner, params: LabelParams, moved: Tensor) -> DenseHeads:
    heads = net.scale, net.shift
    # The encoder's output is read with its channels last.
    channels = net.conv3.out_channels
    image = torch.cat([head.image.weight.unflatten(1, (channels, -1)).mT.flatten(1) for head in heads])
    bias = torch.cat([head.image.bias for head in heads])
    return DenseHeads(image, bias, *_moved_heads(net, params, moved))


def _moved_heads(
    net: ClassificationConditioner, params: LabelParams, moved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The last maps (64, A) of the elements that move, of log-scale and of shift, and their table (K, 2A)."""
    index, there = moved.flatten().clamp_min(0), moved.flatten() >= 0
    scale, shift = (
        head.image_out.weight[index].t().contiguous().mul_(there) for head in (net.scale, net.shift)
    )
    tables = [table[:, index].mul_(there) for table in params.heads]
    return scale, shift, _at_least_two(torch.cat(tables, dim=1))


def _generation_net(net: GenerationConditioner, shape: tuple[int, ...], dtype: torch.dtype) -> GenerationNet:
    leaves = _leaves(net, GenerationNet, dict.fromkeys("123", shape[1] * shape[2]), dtype)
    # Heads are never narrow: their rounding would be most of the error of a log-odds.
    scale, shift = (fold_conv(head, head.weight.dtype) for head in (net.scale, net.shift))
    return GenerationNet(**leaves, scale=scale, shift=shift)


# -- steps ---------------------------------------------------------------------------------------------------


def _planes_of(values: Tensor, phases: int, fill: float) -> Tensor:
    """(C, H, W) -> (H', W', P): phases of channels as planes, `fill` where an odd size leaves none."""
    _, height, width = values.shape
    padded = F.pad(values, (0, -width % phases, 0, -height % phases), value=fill)
    return F.pixel_unshuffle(padded, phases).permute(1, 2, 0) if phases > 1 else padded.permute(1, 2, 0)


def _halves(
    step: FlowStep, params: list[LabelParams], phases: int, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[FoldedHalfCoupling, FoldedHalfCoupling]]:
    """(columns, valid, halves) of `FoldedStep`."""
    mask = step.coupling.mask
    # Indices are float64, which pads on every device; -1 is no pixel.
    index = torch.arange(mask.numel(), device=mask.device, dtype=torch.float64).view(mask.shape)
    elements = _planes_of(index, phases, -1).long()
    there = elements >= 0
    passive = _planes_of(mask.double(), phases, 0).bool()
    active = there & ~passive
    every = torch.arange(elements.shape[2], device=mask.device)
    is_passive, is_active = (part.flatten(0, 1).any(dim=0) for part in (passive, active))
    columns: tuple[Tensor, ...]
    whole_planes = not bool((is_passive & is_active).any())
    if phases > 1 and whole_planes and bool(is_passive.any()) and bool(is_active.any()):
        columns = every[is_passive], every[is_active]
        moves = (elements[:, :, columns[1]], elements[:, :, columns[0]])
        halves = _conditioned_halves(step, params, columns, moves, dtype)
    else:
        columns = (every,)
        moves = (_at_least_one(elements[active]), _at_least_one(elements[passive]))
        first, second = _conditioned_halves(step, params, (every, every), moves, dtype)
        ranks = (_rank(active), _rank(passive)) if phases > 1 else (None, None)
        first = first._replace(passive=passive, active=active, rank=ranks[0])
        halves = first, second._replace(passive=active, active=passive, rank=ranks[1])
    numbers = there.to(step.coupling.conditioners[0].conv1.weight.dtype)
    return columns, None if bool(there.all()) else tuple(numbers[:, :, c] for c in columns), halves


def _at_least_one(elements: Tensor) -> Tensor:
    """The elements that dense heads compute: of a half that moves nothing one that is no pixel."""
    return elements if len(elements) else elements.new_full((1,), -1)


def _rank(active: Tensor) -> Tensor:
    return (active.flatten().cumsum(0) - 1).clamp_min(0).view(active.shape)


def _conditioned_halves(
    step: FlowStep,
    params: list[LabelParams],
    reads: tuple[Tensor, ...],
    moves: tuple[Tensor, ...],
    dtype: torch.dtype,
) -> tuple[FoldedHalfCoupling, FoldedHalfCoupling]:
    """The conditioners of the two halves; whatever they share is kept once."""
    one, other = step.coupling.conditioners[0], step.coupling.conditioners[-1]
    shape = step.coupling.mask.shape
    if isinstance(one, GenerationConditioner):
        first = FoldedHalfCoupling(_generation_net(one, shape, dtype), *_films(one, params[0]))
    else:
        net = _classification_net(one, params[0], shape, reads[0], moves[0], dtype)
        first = FoldedHalfCoupling(net, *_films(one, params[0]))
    if isinstance(other, GenerationConditioner):
        if other is one:
            return first, first
        return first, FoldedHalfCoupling(_generation_net(other, shape, dtype), *_films(other, params[-1]))
    if other is not one:
        net = _classification_net(other, params[-1], shape, reads[1], moves[1], dtype)
        return first, FoldedHalfCoupling(net, *_films(other, params[-1]))
    shared = first.net
    assert isinstance(shared, ClassificationNet)
    heads = DenseHeads(shared.heads.weight, shared.heads.bias, *_moved_heads(other, params[-1], moves[1]))
    return first, first._replace(net=shared._replace(conv1=_first_conv(other, reads[1], dtype), heads=heads))


def _mix(
    step: FlowStep,
    before: Tensor,
    columns: tuple[Tensor, ...],
    sources: tuple[int, ...] | None,
    phases: int,
    dtype: torch.dtype,
) -> PlaneMix:
    """The map from planes in the order of `before`, split-off ones included, to tensors of `columns`."""
    matrix, constant = step.mixing(torch.float64)
    if sources is not None:
        count = len(columns)
        return PlaneMix((matrix[0, 0].to(dtype),) * count, (constant[0].to(dtype),) * count, sources)
    if phases > 1 and not step.squeeze:
        # The matrix of channels serves each phase.
        matrix = torch.kron(matrix, torch.eye(phases * phases, dtype=matrix.dtype, device=matrix.device))
        constant = constant.repeat_interleave(phases * phases)
    size = len(matrix)
    matrix = torch.where((before < size)[:, None], matrix.t()[before.clamp_max(size - 1)], 0.0)
    if phases > 1 and step.squeeze:
        # Phases are taken after the mix.
        columns = (torch.arange(size, device=matrix.device),)
    weights = tuple(matrix[:, c].to(dtype).contiguous() for c in columns)
    return PlaneMix(weights, tuple(constant[c].to(dtype) for c in columns), None)


def _sources(parts: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """The tensor of `parts` that holds each of `columns`; None where one is spread over several."""
    found = [[k for k, part in enumerate(parts) if torch.equal(part, wanted)] for wanted in columns]
    return tuple(k[0] for k in found) if all(found) else None


@torch.no_grad()
def fold(flow: Flow, conditioned: ConditionedFlow, dtype: torch.dtype | None = None) -> FoldedFlow:
    """Fold a flow that is initialised.

    Args:
        flow: the flow.
        conditioned: it given all labels.
        dtype: of the conditioners' convolutions but for the heads; that of the flow when None.
    """
    phases = 2 if flow.config.task == "classification" else 1
    channels = flow.config.input_shape[0]
    # The image comes in the natural order of its planes.
    parts: tuple[Tensor, ...] = (torch.arange(channels * phases * phases, device=flow.device),)
    split, folded = False, []
    for i, step in enumerate(flow.steps):
        columns, valid, halves = _halves(step, conditioned.steps[i].label_params, phases, dtype or flow.dtype)
        before = torch.cat(parts)
        if step.squeeze and phases == 1:
            # Channels that a split left are squeezed, before the matrix.
            before = torch.arange(step.conv.log_s.numel(), device=flow.device)
        one_channel = step.conv.log_s.numel() == 1 and not step.squeeze and not split
        sources = _sources(parts, columns) if one_channel else None
        mix = _mix(step, before, columns, sources, phases, flow.dtype)
        parts, split = columns, step.split
        joined = torch.cat(columns)
        # The last step's split stays: nothing follows that it would be left out of.
        leaves = split and i + 1 < len(flow.steps)
        leaving = torch.nonzero(joined >= len(joined) // 2).flatten() if leaves else None
        folded.append(FoldedStep(step.squeeze, step.uses_label, mix, columns, valid, halves, leaving))
    logdets = sum(float(step.mixing_logdet()) for step in conditioned.steps)
    constant = logdets - 0.5 * LOG_2PI * flow.config.num_dims
    steps: tuple[FoldedStep, ...] = tree_map_only(Tensor, Tensor.detach, tuple(folded))
    return FoldedFlow(steps, phases, constant, flow.config.scale_bound)
