"""The label parameters of many conditioners at once, in as few launches as those of one.

`label_params` of a conditioner is the definition, and what a CPU runs. A GPU would spend two fifths of the
launches of a training step on it: here layers of equal shapes are stacked, those of unequal widths padded,
and one product serves all conditioners. The modulations of all norms become one tensor, which each pass
gathers by sample once; the gradient of every norm is then a slice of one tensor's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastflow import kernels
from fastflow.models.conditioners.classification import ClassificationConditioner, DenseHead
from fastflow.models.conditioners.generation import GenerationConditioner
from fastflow.models.conditioners.label_params import LabelParams, Modulation
from fastflow.models.conditioners.leaves import EMBEDDING, Conv, NormFiLM
from fastflow.models.conditioners.network import norms
from fastflow.models.conditioners.uses import split_twice, take_entries
from fastflow.numerics import unrounded_products

Conditioner = ClassificationConditioner | GenerationConditioner


class GroupedLabelParams(NamedTuple):
    """The parameters that R labels give to many conditioners.

    Attributes:
        modulations: (R, T, 2), FiLM's scale and shift of all norms of all conditioners, one after the other.
        channels: of each conditioner's norms, and of the filling behind them; the sum is T.
        heads: the tables (R, N) of all heads of all conditioners, flat and one after the other.
        sizes: N of each conditioner's heads; none where heads know no label.
    """

    modulations: Tensor
    channels: tuple[tuple[int, ...], ...]
    heads: Tensor
    sizes: tuple[tuple[int, ...], ...]

    def by_label(self) -> list[LabelParams]:
        """The parameters of each conditioner, as tables with an entry for each label."""
        parts = iter(self.modulations.split(self._widths(), dim=1))
        tables = iter(self.heads.split(self._lengths()))
        return [
            LabelParams(
                tuple(Modulation(*part.unbind(dim=2)) for part in [next(parts) for _ in widths][:-1]),
                tuple(next(tables).view(-1, size) for size in sizes),
            )
            for widths, sizes in zip(self.channels, self.sizes, strict=True)
        ]

    def by_sample(self, label_index: Tensor) -> list[tuple[LabelParams, LabelParams]]:
        """The parameters of each conditioner for its two uses in a pass over samples, in training.

        Modulations have an entry for each sample, so that their gradients need no sum over samples of their
        own; heads have one for each label.

        Args:
            label_index: (B,) the label of each sample.
        """
        modulations = split_twice(take_entries(self.modulations, label_index), self._widths(), dim=1)
        heads = split_twice(self.heads, self._lengths(), dim=0)
        first, second = (
            self._use(iter(parts), iter(tables)) for parts, tables in zip(modulations, heads, strict=True)
        )
        return list(zip(first, second, strict=True))

    def _use(self, parts: Iterator[Tensor], tables: Iterator[Tensor]) -> list[LabelParams]:
        return [
            LabelParams(
                tuple([next(parts) for _ in widths][:-1]),
                tuple(next(tables).view(-1, size) for size in sizes),
            )
            for widths, sizes in zip(self.channels, self.sizes, strict=True)
        ]

    def _widths(self) -> list[int]:
        return [width for each in self.channels for width in each]

    def _lengths(self) -> list[int]:
        return [len(self.modulations) * size for each in self.sizes for size in each]


def can_group(nets: Sequence[Conditioner]) -> bool:
    """Whether `grouped_label_params` has a form for conditioners: all norms are group norms."""
    return all(isinstance(norm, NormFiLM) for net in nets for norm in norms(net))


def grouped_label_params(nets: Sequence[Conditioner], labels: Tensor) -> GroupedLabelParams:
    """The parameters that labels give to conditioners of one kind.

    They are those of `AffineCoupling.label_params`, with another order of additions.

    Args:
        nets: S conditioners of one task with one number of classes.
        labels: (R,) int64.
    """
    with unrounded_products(labels):
        embeddings = _embed(nets, labels)
        modulations, channels = _modulations(nets, embeddings)
        heads = [head for net in nets if isinstance(net, ClassificationConditioner) for head in net.heads()]
        tables = _head_tables(heads, embeddings) if heads else embeddings.new_empty(0)
    sizes = [
        tuple(head.label_out.out_features for head in net.heads())
        if isinstance(net, ClassificationConditioner)
        else ()
        for net in nets
    ]
    return GroupedLabelParams(modulations, channels, tables, tuple(sizes))


def _linear(x: Tensor, layers: Sequence[nn.Linear]) -> Tensor:
    """Linear layers of equal shapes, each on its own part of x (S, inputs, R).

    Weights stand on the left, so that their gradients come in their own layout and are kept without a copy.
    """
    weight = torch.stack([layer.weight for layer in layers])
    bias = torch.stack([layer.bias for layer in layers])
    return torch.baddbmm(bias[:, :, None], weight, x)


def _embed(nets: Sequence[Conditioner], labels: Tensor) -> Tensor:
    """Label embeddings (S, 128, R)."""
    each: list[Any] = [net.embedding for net in nets]
    one_layer = isinstance(each[0], nn.Linear)
    layers: list[nn.Linear] = each if one_layer else [one.fc1 for one in each]
    # A product with a one-hot code is exact, and its gradient adds labels in a fixed order.
    code = labels == torch.arange(layers[0].in_features, device=labels.device)[:, None]
    h = F.gelu(_linear(code.to(layers[0].weight.dtype).expand(len(nets), -1, -1), layers))
    if one_layer:
        # The published embedding activates twice.
        return F.gelu(h)
    h = F.gelu(_linear(h, [one.fc2 for one in each]) + _linear(h, [one.proj1 for one in each]))
    h = F.gelu(_linear(h, [one.fc3 for one in each]) + _linear(h, [one.proj2 for one in each]))
    return F.gelu(_linear(h, [one.fc4 for one in each]))


def _modulations(
    nets: Sequence[Conditioner], embeddings: Tensor
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    """FiLM of all norms, folded with their affine parts (R, T, 2), and the channels of its parts."""
    each = [norms(net) for net in nets]
    channels = [tuple(len(norm.weight) for norm in of_net) for of_net in each]
    width = max(map(sum, channels))
    filled = tuple((*used, width - sum(used)) for used in channels)
    filling = embeddings.new_zeros(max(rest for *_, rest in filled), EMBEDDING)
    weights, biases, scales, shifts = [], [], [], []
    for of_net, (*_, rest) in zip(each, filled, strict=True):
        for layers in ([norm.film.gamma for norm in of_net], [norm.film.beta for norm in of_net]):
            weights += [*(layer.weight for layer in layers), filling[:rest]]
            biases += [*(layer.bias for layer in layers), filling[:rest, 0]]
        scales += [*(norm.weight for norm in of_net), filling[:rest, 0]]
        shifts += [*(norm.bias for norm in of_net), filling[:rest, 0]]
    weight, bias = torch.cat(weights).view(len(nets), 2 * width, -1), torch.cat(biases)
    gamma, beta = torch.baddbmm(bias.view(len(nets), -1, 1), weight, embeddings).chunk(2, dim=1)
    scale, shift = (torch.cat(parts).view(len(nets), -1, 1) for parts in (scales, shifts))
    folded = torch.stack((gamma * scale, torch.addcmul(beta, gamma, shift)), dim=2)
    # From (S, channels, 2, R) to an entry of all conditioners' channels for each label.
    return folded.flatten(0, 1).permute(2, 0, 1).contiguous(), filled


def _head_tables(heads: Sequence[DenseHead], embeddings: Tensor) -> Tensor:
    """The label's share of heads, two for each of the embeddings, flat."""
    weight = torch.cat([head.label.weight for head in heads]).view(len(embeddings), -1, EMBEDDING)
    bias = torch.cat([head.label.bias for head in heads]).view(len(embeddings), -1, 1)
    features = F.gelu(torch.baddbmm(bias, weight, embeddings)).view(len(heads), -1, embeddings.shape[2])
    outputs = [head.label_out for head in heads]
    return kernels.head_tables(features, [o.weight for o in outputs], [o.bias for o in outputs])


def grouped_weight_norm(convs: Sequence[Conv]) -> list[tuple[Tensor, Tensor]]:
    """The weights of normed convolutions, each for two uses; those with rows of one shape in one launch.

    Args:
        convs: of `normed_conv`; under autocast their weights come in its dtype.
    """
    device = _norm_and_direction(convs[0])[1].device.type
    narrow = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    by_shape: dict[torch.Size, list[int]] = {}
    for i, conv in enumerate(convs):
        by_shape.setdefault(_norm_and_direction(conv)[1].shape[1:], []).append(i)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for indices in by_shape.values():
        pairs = [_norm_and_direction(convs[i]) for i in indices]
        weight = torch._weight_norm(torch.cat([v for _, v in pairs]), torch.cat([g for g, _ in pairs]), 0)
        if narrow is not None and weight.dtype == torch.float32:
            weight = weight.to(narrow)
        first, second = split_twice(weight, [len(v) for _, v in pairs], dim=0)
        found.update(zip(indices, zip(first, second, strict=True), strict=True))
    return [found[i] for i in range(len(convs))]


def _norm_and_direction(conv: Conv) -> tuple[Tensor, Tensor]:
    parametrization: Any = conv.get_submodule("parametrizations.weight")
    return parametrization.original0, parametrization.original1
