"""The two-sided masked coupling of a flow step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastflow import kernels
from fastflow.models.conditioners import ClassificationConditioner, GenerationConditioner
from fastflow.models.conditioners.label_params import CouplingMask, LabelParams, NextInput
from fastflow.models.conditioners.uses import narrowed, replaced_parameters, two_uses
from fastflow.models.config import FlowConfig, Shape
from fastflow.numerics import acc_dtype, unrounded_products

Conditioner = ClassificationConditioner | GenerationConditioner
Seeds = tuple[Tensor | None, Tensor | None]
ConvWeights = tuple[list[Tensor], list[Tensor]]


class HalfCoupling(NamedTuple):
    """One half of a coupling.

    Attributes:
        net_index: of its conditioner and of that one's label parameters in their lists.
        net: its conditioner.
        mask: what it keeps.
    """

    net_index: int
    net: Conditioner
    mask: CouplingMask


class AffineCoupling(nn.Module):
    """Two masked affine couplings in a row.

    The first moves the pixels where the mask is False, the second the others. Both halves ask the same
    conditioner unless ``config.share_halves`` is False. Source: MAGIC-Flow; RealNVP for the form.

    Args:
        config: the model.
        step: index of this step.
        shape: (C, H, W) of its input.
        mask: (C, H, W) bool, True = passive in the first half.
    """

    mask: Tensor
    opposite: Tensor
    first_order: Tensor
    second_order: Tensor
    conditioners: Sequence[Conditioner]

    def __init__(self, config: FlowConfig, step: int, shape: Shape, mask: Tensor) -> None:
        super().__init__()
        self.bound = config.scale_bound
        self.register_buffer("mask", mask)
        # Kernels of the heads read a mask as an order of pixels and a count. The count is a Python number,
        # lest every call wait for the device.
        self.ordered = config.task == "classification"
        self.active = (0, 0)
        self.register_buffer("opposite", ~mask, persistent=False)
        for name in ("first_order", "second_order"):
            self.register_buffer(
                name, torch.empty(0, dtype=torch.int32, device=mask.device), persistent=False
            )
        _read_mask(self)
        self.register_load_state_dict_post_hook(_read_mask)
        conditioner = ClassificationConditioner if config.task == "classification" else GenerationConditioner
        count = 1 if config.share_halves else 2
        # A ModuleList is declared as the sequence that it is.
        self.conditioners = nn.ModuleList(  # type: ignore[assignment]
            conditioner(config, step, shape) for _ in range(count)
        )

    def halves(self) -> tuple[HalfCoupling, HalfCoupling]:
        """The two halves in forward order."""
        first = self._mask(self.mask, self.first_order, self.active[0])
        second = self._mask(self.opposite, self.second_order, self.active[1])
        return HalfCoupling(0, self.conditioners[0], first), HalfCoupling(-1, self.conditioners[-1], second)

    def _mask(self, passive: Tensor, pixels: Tensor, active: int) -> CouplingMask:
        return CouplingMask(passive, kernels.PixelOrder(pixels, active) if self.ordered else None)

    def label_params(self, labels: Tensor) -> list[LabelParams]:
        """The parameters that `labels` (R,) give each conditioner, in the parameters' dtype.

        Rounded by autocast or to TF32, they would shift whole labels.
        """
        with unrounded_products(labels):
            return [net.label_params(labels) for net in self.conditioners]

    def draw_seeds(self, batch: int, device: torch.device) -> Seeds:
        """Seeds of the dropouts of the two halves, in forward order."""
        first, second = self.conditioners[0], self.conditioners[-1]
        return first.draw_seeds(batch, device), second.draw_seeds(batch, device)

    def forward(
        self,
        x: Tensor,
        masked: Tensor,
        label_params: list[LabelParams],
        label_index: Tensor,
        inverse: bool = False,
        next_input: NextInput | None = None,
        seeds: Seeds | None = None,
        conv_weights: ConvWeights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Both halves.

        Args:
            x: (B, C, H, W).
            masked: x as the first conditioner sees it; one image may stand for several consecutive labels.
            label_params: of each conditioner.
            label_index: (B,) the entry of each sample in them.
            inverse: undo the coupling instead.
            next_input: what follows.
            seeds: those of `draw_seeds`, fresh ones when None.
            conv_weights: of the normed convolutions for each half, where they were computed ahead.

        Returns:
            `(y, logdet, following)`: y like x, logdet (B,), y as `next_input` says or None.
        """
        halves = list(zip(self.halves(), seeds or self.draw_seeds(x.shape[0], x.device), strict=True))
        (first, first_seeds), (second, second_seeds) = reversed(halves) if inverse else halves
        uses = self._parameters_of_uses(conv_weights)
        with uses[inverse]:
            params = first.net.encode(masked, label_params[first.net_index], label_index, first_seeds)
            x, logdet, between = first.net.transform(
                x, params, label_params[first.net_index], label_index, first.mask, self.bound, inverse,
                NextInput(second.mask.passive),
            )  # fmt: skip
        assert between is not None
        with uses[not inverse]:
            params = second.net.encode(between, label_params[second.net_index], label_index, second_seeds)
            x, more, following = second.net.transform(
                x, params, label_params[second.net_index], label_index, second.mask, self.bound, inverse,
                next_input,
            )  # fmt: skip
        return x, logdet + more, following

    def _parameters_of_uses(
        self, conv_weights: ConvWeights | None
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Blocks in which the conditioners of the first and of the second half take parameters of their own.

        The gradients of a shared conditioner's two uses are then added in one call. Without weights that were
        computed ahead, modules take their parameters as they are.
        """
        if conv_weights is None:
            return nullcontext(), nullcontext()
        nets = self.conditioners[0], self.conditioners[-1]
        values = [[getattr(module, name) for module, name in net.image_slots()] for net in nets]
        if nets[0] is nets[1]:
            values = list(two_uses(narrowed(nets[0].image_slots(), values[0])))
        slots = [[*((conv, "weight") for conv in net.normed_convs()), *net.image_slots()] for net in nets]
        first, second = (
            replaced_parameters(where, [*weights, *rest])
            for where, weights, rest in zip(slots, conv_weights, values, strict=True)
        )
        return first, second

    def forward_with_map(
        self, x: Tensor, label_params: list[LabelParams], label_index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `forward`, but with the log-determinant still on its elements: (y, (B, C, H, W))."""
        acc = acc_dtype(x.dtype)
        log_scales = torch.zeros_like(x, dtype=acc)
        for index, net, (passive, _) in self.halves():
            raw_scale, shift = net(x.masked_fill(~passive, 0.0), label_params[index], label_index)
            x, _ = kernels.affine_coupling(x, raw_scale, shift, passive, self.bound)
            log_scales = log_scales + (self.bound * torch.tanh(raw_scale.to(acc))).masked_fill(passive, 0.0)
        return x, log_scales


def draw_seeds(couplings: Sequence[AffineCoupling], batch: int, device: torch.device) -> list[Seeds]:
    """Seeds of the dropouts of `couplings` in forward order, in one draw from the default generator.

    They are the numbers that `AffineCoupling.draw_seeds` of one coupling after the other gives on a CPU.
    """
    nets = [net for one in couplings for net in (one.conditioners[0], one.conditioners[-1])]
    counts = [net.dropouts for net in nets]
    if not any(counts):
        return [(None, None)] * len(couplings)
    drawn = kernels.dropout_seeds(sum(counts) * batch, device).view(sum(counts), batch).split(counts)
    seeds = [part if count else None for part, count in zip(drawn, counts, strict=True)]
    return list(zip(seeds[::2], seeds[1::2], strict=True))


def _read_mask(module: AffineCoupling, _: Any = None) -> None:
    _put(module, "opposite", ~module.mask)
    if module.ordered:
        first, second = kernels.pixel_order(module.mask), kernels.pixel_order(module.opposite)
        _put(module, "first_order", first.pixels)
        _put(module, "second_order", second.pixels)
        module.active = (first.active, second.active)


def _put(module: AffineCoupling, name: str, value: Tensor) -> None:
    """Write into a buffer, which captured graphs read where it lies, or replace one that does not fit."""
    before = module._buffers.get(name)
    fits = before is not None and before.shape == value.shape and before.device == value.device
    if before is not None and fits and not before.is_inference():
        before.copy_(value)
    else:
        setattr(module, name, value)
