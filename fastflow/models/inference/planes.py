"""The walk over planes: couplings as plain functions of folded constants.

The stream is held in *planes*: for the classification conditioner the four phases of each channel, (R, H/2,
W/2, 4C), for the generation conditioner the channels themselves, (R, H, W, C). The strided 5x5 convolution
that opens a classification conditioner is a 3x3 convolution over planes. A mask with structure (checkerboard,
channel, stripes) makes each plane passive or active as a whole; a step then holds its stream as two tensors,
the passive planes and the active ones: the first convolution reads the one, half of its inputs being known
zeros otherwise, the heads compute the values that move the other, and nothing is gathered or scattered. The
halves of a step exchange the roles. Other masks keep all planes in one tensor. Whatever lies between two
couplings (split, squeeze, ActNorm, 1x1 convolution, the next step's order of planes) is one matrix over the
planes of a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastflow.models.conditioners.network import encode_full_resolution, encode_strided
from fastflow.models.config import FlowConfig, Shape
from fastflow.models.inference.leaves import ClassificationNet, FoldedFilm
from fastflow.models.inference.steps import FoldedHalfCoupling, FoldedStep
from fastflow.numerics import acc_dtype, sum_per_sample

Planes = tuple[Tensor, ...]
# How a walk runs a half: (passive, moved, label_index, half, image) -> (moved, term), see `run_half`.
RunHalf = Callable[[Tensor, Tensor, Tensor, FoldedHalfCoupling, Tensor | None], tuple[Tensor, Tensor]]


# -- halves --------------------------------------------------------------------------------------------------


def log_scale_and_shift(
    passive: Tensor, label_index: Tensor, half: FoldedHalfCoupling, bound: float, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """How a half moves planes.

    Args:
        passive: (R, H', W', P) planes that the conditioner sees.
        label_index: (R,) the label of each sample.
        half: its constants.
        bound: of the log-scale.
        image: (R,) names the image of `passive` that each sample starts from; whatever no label changes is
            then computed once per image.

    Returns:
        `(log-scale, shift)`: (R, H', W', P) of generation conditioners, (R, A) of the elements that move for
        others;
        `placed` makes planes of them.
    """
    a = passive if half.passive is None else torch.where(half.passive, passive, 0.0)
    a = a.permute(0, 3, 1, 2)
    a, dtype = a.to(acc_dtype(a.dtype)), a.dtype
    tables = half.films.index_select(0, label_index).split(half.sizes, dim=1)
    films = [FoldedFilm(table, image if i == 0 else None) for i, table in enumerate(tables)]
    if isinstance(half.net, ClassificationNet):
        raw, shift = half.net.heads(encode_strided(half.net, a, films), label_index)
        return bound * torch.tanh(raw), shift
    assert half.active is not None
    v = encode_full_resolution(half.net, a, films)
    raw, shift = half.net.scale(v).to(dtype), half.net.shift(v).to(dtype)
    s = torch.where(half.active, bound * torch.tanh(raw.permute(0, 2, 3, 1)), 0.0)
    return s, shift.permute(0, 2, 3, 1)


def placed(values: Tensor, half: FoldedHalfCoupling, shape: Sequence[int]) -> Tensor:
    """Results of `log_scale_and_shift` as planes of `shape`; any number where a half moves nothing."""
    if values.ndim == 4:
        return values
    if half.rank is None:
        return values.view(-1, *shape[1:])
    return values.index_select(1, half.rank.flatten()).view(-1, *half.rank.shape)


def run_half(
    passive: Tensor,
    moved: Tensor,
    label_index: Tensor,
    half: FoldedHalfCoupling,
    bound: float,
    image: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One half of a coupling.

    Args:
        passive: see `log_scale_and_shift`.
        moved: planes that it moves; the same tensor where planes are passive and active at once.
        label_index: see `log_scale_and_shift`.
        half: see `log_scale_and_shift`.
        bound: see `log_scale_and_shift`.
        image: names the image of `passive` and `moved` that each sample starts from.

    Returns:
        `(moved, logdet)`: the planes after the half, and (R,) in nats, float32 or wider.
    """
    return transform(moved, *log_scale_and_shift(passive, label_index, half, bound, image), half, image)


def transform(
    moved: Tensor, s: Tensor, shift: Tensor, half: FoldedHalfCoupling, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`run_half` of the log-scale and shift that are known already."""
    if image is not None:
        moved = moved.index_select(0, image)
    changed = moved * placed(s.exp(), half, moved.shape) + placed(shift, half, moved.shape)
    return (changed if half.active is None else torch.where(half.active, changed, moved)), _sum_log_scales(s)


def inverse_transform(moved: Tensor, s: Tensor, shift: Tensor, half: FoldedHalfCoupling) -> Tensor:
    """The planes that `transform` moved, from where it moved them to."""
    before = (moved - placed(shift, half, moved.shape)) * placed((-s).exp(), half, moved.shape)
    return before if half.active is None else torch.where(half.active, before, moved)


def _sum_log_scales(s: Tensor) -> Tensor:
    """Sum per sample: over pixels first, then over channels. Runtimes sum naively, hence in float64."""
    if torch.compiler.is_exporting():
        return s.double().flatten(1).sum(dim=1)
    return s.sum(dim=(1, 2)).sum(dim=1) if s.ndim == 4 else s.sum(dim=1)


# -- couplings and mixes -------------------------------------------------------------------------------------


def run_coupling(
    planes: Planes, label_index: Tensor, step: FoldedStep, run: RunHalf, image: Tensor | None = None
) -> tuple[Planes, tuple[Tensor, Tensor]]:
    """Both halves of a coupling, each by `run`: (planes, the terms of the two halves)."""
    terms = []
    for k, half in enumerate(step.halves):
        passive, moved = planes[k % len(planes)], planes[(k + 1) % len(planes)]
        start = image if k == 0 else None
        moved, term = run(passive, moved, label_index, half, start)
        if len(planes) > 1:
            passive = passive if start is None else passive.index_select(0, start)
        planes = _exchanged(planes, k, passive, moved)
        terms.append(term)
    return planes, (terms[0], terms[1])


def run_inverse_coupling(
    planes: Planes,
    label_index: Tensor,
    step: FoldedStep,
    terms: Callable[[Tensor, Tensor, FoldedHalfCoupling], tuple[Tensor, Tensor]],
) -> Planes:
    """The inverse of both halves; `terms` gives log-scale and shift of (passive, label_index, half)."""
    for k, half in reversed(list(enumerate(step.halves))):
        passive, moved = planes[k % len(planes)], planes[(k + 1) % len(planes)]
        moved = inverse_transform(moved, *terms(passive, label_index, half), half)
        planes = _exchanged(planes, k, passive, moved)
    return planes


def _exchanged(planes: Planes, k: int, passive: Tensor, moved: Tensor) -> Planes:
    """The planes of a step after its half k."""
    if len(planes) == 1:
        return (moved,)
    return (passive, moved) if k == 0 else (moved, passive)


def run_mix(planes: Planes, step: FoldedStep, phases: int) -> Planes:
    """The planes that a step's coupling starts from, of those that the step before left."""
    mix = step.mix
    if mix.sources is not None:
        parts = zip(mix.sources, mix.weights, mix.biases, strict=True)
        mixed = tuple(torch.addcmul(bias, planes[k], weight) for k, weight, bias in parts)
    else:
        joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
        if step.squeeze and phases == 1:
            joined = to_planes(joined[..., : len(mix.weights[0]) // 4], 2)
        flat = joined.flatten(0, 2)
        products = [torch.addmm(b, flat, w) for w, b in zip(mix.weights, mix.biases, strict=True)]
        mixed = tuple(product.view(-1, *joined.shape[1:3], product.shape[1]) for product in products)
        if step.squeeze and phases > 1:
            joined = to_planes(mixed[0], phases)
            several = len(step.columns) > 1
            mixed = tuple(joined.index_select(3, c) for c in step.columns) if several else (joined,)
    if step.valid is not None:
        mixed = tuple(part * valid for part, valid in zip(mixed, step.valid, strict=True))
    return mixed


# -- the walk ------------------------------------------------------------------------------------------------


class PlaneWalk(NamedTuple):
    """The results of steps on planes.

    Attributes:
        planes: of the last step.
        terms: of the two halves of each step.
        splits: the result of `at_split` for each step.
    """

    planes: Planes
    terms: list[tuple[Tensor, Tensor]]
    splits: list[Any]


def walk_planes(
    planes: Planes,
    label_index: Tensor,
    steps: Sequence[FoldedStep],
    phases: int,
    run: RunHalf,
    at_split: Callable[[int, Planes], Any],
    image: Tensor | None = None,
) -> PlaneWalk:
    """Consecutive steps.

    Args:
        planes: of the step before; with `image`, once per image and mixed by the first step already.
        label_index: (R,) the label of each sample.
        steps: to run.
        phases: of planes.
        run: runs a half.
        at_split: called with the index and the planes after each step; says what is kept of the planes that
            it splits off, None where it splits nothing.
        image: (R,) the image that each sample starts from.
    """
    terms, splits = [], []
    ignored = label_index if all(step.uses_label for step in steps) else torch.zeros_like(label_index)
    for i, step in enumerate(steps):
        start = image if i == 0 else None
        if start is None:
            planes = run_mix(planes, step, phases)
        planes, pair = run_coupling(planes, label_index if step.uses_label else ignored, step, run, start)
        terms.append(pair)
        splits.append(at_split(i, planes))
    return PlaneWalk(planes, terms, splits)


# -- layouts and sums ----------------------------------------------------------------------------------------


def to_planes(x: Tensor, phases: int) -> Tensor:
    """(R, H, W, C) -> (R, H', W', C phases^2): the phases of each channel side by side.

    They are 0 where an odd size leaves none.
    """
    if phases == 1:
        return x
    _, height, width, channels = x.shape
    if height % phases or width % phases:
        x = F.pad(x, (0, 0, 0, -width % phases, 0, -height % phases))
    rows, columns = x.shape[1] // phases, x.shape[2] // phases
    blocks = x.reshape(-1, rows, phases, columns, phases, channels)
    return blocks.permute(0, 1, 3, 5, 2, 4).reshape(-1, rows, columns, channels * phases * phases)


def from_planes(planes: Tensor, phases: int) -> Tensor:
    """The inverse of `to_planes`: (R, H', W', C phases^2) -> (R, phases H', phases W', C)."""
    if phases == 1:
        return planes
    _, height, width, size = planes.shape
    channels = size // phases**2
    blocks = planes.reshape(-1, height, width, channels, phases, phases).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(-1, height * phases, width * phases, channels)


def plane_orders(steps: Sequence[FoldedStep]) -> list[Tensor]:
    """For each step, where each plane of the natural order stands among its tensors of planes, joined."""
    return [torch.argsort(torch.cat(step.columns)) for step in steps]


def natural_order(planes: Planes, order: Tensor, phases: int, shape: Shape) -> Tensor:
    """Planes of a step of `shape` (C, H, W) as (R, H, W, C); `order` is its entry of `plane_orders`."""
    joined = torch.cat(planes, dim=-1).index_select(3, order) if len(planes) > 1 else planes[0]
    return from_planes(joined, phases)[:, : shape[1], : shape[2]]


def split_block(config: FlowConfig, i: int, planes: Planes, order: Tensor, phases: int) -> Tensor:
    """The latent block that step i splits off, of its planes, as (R, H, W, C)."""
    return natural_order(planes, order, phases, config.step_shapes[i]).chunk(2, dim=-1)[1]


def final_block(config: FlowConfig, planes: Planes, order: Tensor, phases: int) -> Tensor:
    """The latent block that stays after the last step, of its planes, as (R, H, W, C)."""
    last = len(config.step_shapes) - 1
    h = natural_order(planes, order, phases, config.step_shapes[last])
    return h.chunk(2, dim=-1)[0] if last in config.split_after else h


def square_sum(planes: Planes, split: Tensor | None = None) -> Tensor:
    """-1/2 of the sum of squares (R,), of the planes that `split` names in the joined tensors or of all."""
    joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
    flat = (joined if split is None else joined.index_select(3, split)).flatten(1)
    if torch.compiler.is_exporting():
        return -0.5 * flat.double().square().sum(dim=1)
    return -0.5 * sum_per_sample(flat * flat)


def density_terms(walk: PlaneWalk) -> list[Tensor]:
    """Parts (R,) of log p(x|y) in float64, of a walk whose `at_split` returned square sums."""
    terms = []
    for pair, split in zip(walk.terms, walk.splits, strict=True):
        terms += [*pair] if split is None else [*pair, split]
    return [term.double() for term in terms]
