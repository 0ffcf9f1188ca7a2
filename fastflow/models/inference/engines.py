"""Engines that score blocks of images under labels in two parts, of which the first knows no labels."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, NamedTuple, Protocol

import torch
import torch.fx.experimental._config
from torch import Tensor

from fastflow import kernels
from fastflow.kernels.checks import mark_label_index
from fastflow.models.flow import Flow
from fastflow.models.inference import planes as plane_walk
from fastflow.models.inference.correlations import lag_correlations
from fastflow.models.inference.fold import fold
from fastflow.models.inference.graphs import GraphPerSize
from fastflow.models.inference.leaves import ClassificationNet
from fastflow.models.inference.steps import FoldedHalfCoupling
from fastflow.models.step import Walk


class State(NamedTuple):
    """Images on their way, with whatever no label changes computed once per image.

    Attributes:
        planes: of the images.
        terms: (B,) parts of log p(x|y) so far, in float64.
        blocks: of the latent that were split off already; an engine's own layout.
    """

    planes: tuple[Tensor, ...]
    terms: list[Tensor]
    blocks: tuple[Any, ...] = ()


class Engine(Protocol):
    """Scores blocks of images in two parts, of which the first knows no labels."""

    def start(self, x: Tensor) -> State:
        """Everything before the first op that knows a label, for images (B, C, H, W)."""

    def finish(self, state: State, first: int, last: int) -> Tensor:
        """Log-likelihoods (B, last - first), float64, of labels `first` to `last` (exclusive)."""

    def finish_with_latents(self, state: State, first: int, last: int) -> Tensor:
        """As `finish`, with the correlations of the latent: (B, last - first, 1 + 2J) float64.

        The log-likelihood comes first, then `lag_correlations` of each of the J latent blocks under the
        label, the final block first, then those that were split off in the order of the steps.
        """


class Eager:
    """The model's own modules on their kernels, with everything that no image changes computed once.

    A sample's bits depend on neither its batch nor the number of labels beside it. Built where gradients are
    recorded, it is differentiable.
    """

    def __init__(self, model: Flow) -> None:
        config = model.config
        self.device, self.free = model.device, config.condition_from_step
        self.classes = config.num_classes
        self.flow = model.condition(torch.arange(config.num_classes, device=model.device))
        self.constant = self.flow.mixing_logdet()
        self._label_index: dict[tuple[int, int, int], Tensor] = {}

    def label_index(self, batch: int, first: int, last: int) -> Tensor:
        """The label of each sample: `first` to `last` for each of `batch` images.

        It is kept, and declared to hold labels, so that no op looks at its values.
        """
        key = batch, first, last
        if key not in self._label_index:
            index = torch.arange(first, last, device=self.device).repeat(batch)
            self._label_index[key] = mark_label_index(index, self.classes)
        return self._label_index[key]

    def start(self, x: Tensor) -> State:
        """See `Engine.start`."""
        walk = self.flow.forward(x, self.label_index(len(x), 0, 1), last=self.free)
        h, masked = (
            (walk.h, walk.masked) if walk.masked is not None else self.flow.steps[self.free].mix(walk.h)
        )
        return State((h, masked), self._terms(walk, 0), tuple(walk.blocks))

    def finish(self, state: State, first: int, last: int) -> Tensor:
        """See `Engine.finish`."""
        return self._log_probs(state, self._walk(state, first, last), last - first)

    def finish_with_latents(self, state: State, first: int, last: int) -> Tensor:
        """See `Engine.finish_with_latents`."""
        walk, labels = self._walk(state, first, last), last - first
        shared = [lag_correlations(block).repeat_interleave(labels, dim=0) for block in state.blocks]
        final, *split = [lag_correlations(block) for block in (walk.h, *walk.blocks)]
        return _joined(self._log_probs(state, walk, labels), [final, *shared, *split])

    def _walk(self, state: State, first: int, last: int) -> Walk:
        h, masked = state.planes
        batch = len(h)
        # The first conditioner takes its input once per image, and repeats it where it first knows a label.
        h = h.repeat_interleave(last - first, dim=0)
        return self.flow.forward(h, self.label_index(batch, first, last), masked, self.free)

    def _log_probs(self, state: State, walk: Walk, labels: int) -> Tensor:
        terms = self._terms(walk, self.free)
        terms += [_prior(walk.h), *(term.repeat_interleave(labels) for term in state.terms)]
        return (torch.stack(terms).sum(dim=0) + self.constant).view(-1, labels)

    def _terms(self, walk: Walk, first: int) -> list[Tensor]:
        """Log-determinants and log-densities of the blocks that were split off, in the order of the steps."""
        terms, blocks = [], iter(walk.blocks)
        for i, logdet in enumerate(walk.terms, first):
            terms.append(logdet.double())
            if self.flow.steps[i].step.split:
                terms.append(_prior(next(blocks)))
        return terms


def _prior(block: Tensor) -> Tensor:
    return kernels.latent_prior(block.flatten(1)).double()


def _joined(log_probs: Tensor, correlations: list[Tensor]) -> Tensor:
    """Log-likelihoods (B, K) and correlations (B K, 2) of J blocks as (B, K, 1 + 2J) float64."""
    together = torch.cat(correlations, dim=1).double().view(*log_probs.shape, -1)
    return torch.cat((log_probs.unsqueeze(2), together), dim=2)


class Compiled:
    """Folded couplings compiled by Inductor: one graph for all steps of one shape and any batch.

    Graphs of generation conditioners are compiled again for some numbers of samples. Compiling takes about 20
    seconds a graph (the paper preset has 13) with a cold cache; Inductor keeps its code on disk.
    """

    def __init__(self, model: Flow, dtype: torch.dtype) -> None:
        self.device = model.device
        if self.device.type == "cpu":
            _check_compiler()
        config = model.config
        self.free = config.condition_from_step
        labels = torch.arange(config.num_classes, device=self.device)
        self.model = fold(model, model.condition(labels), dtype)
        self.config, self.orders = config, plane_walk.plane_orders(self.model.steps)
        for half in (half for step in self.model.steps for half in step.halves):
            torch._dynamo.mark_dynamic(half.films, 0)
            if isinstance(half.net, ClassificationNet):
                torch._dynamo.mark_dynamic(half.net.heads.table, 0)
        options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
        self.run = torch.compile(plane_walk.run_half, options=options)

    def start(self, x: Tensor) -> State:
        """See `Engine.start`."""
        label_index = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with _settings():
            image = plane_walk.to_planes(x.permute(0, 2, 3, 1), self.model.phases)
            kept: list[tuple[int, plane_walk.Planes]] = []
            walk = self._walk((image,), label_index, range(self.free), kept)
            mixed = plane_walk.run_mix(walk.planes, self.model.steps[self.free], self.model.phases)
        return State(mixed, plane_walk.density_terms(walk), tuple(kept))

    def finish(self, state: State, first: int, last: int) -> Tensor:
        """See `Engine.finish`."""
        walk, image = self._finish(state, first, last, [])
        return self._log_probs(state, walk, image, last - first)

    def finish_with_latents(self, state: State, first: int, last: int) -> Tensor:
        """See `Engine.finish_with_latents`."""
        kept: list[tuple[int, plane_walk.Planes]] = []
        walk, image = self._finish(state, first, last, kept)
        final = plane_walk.final_block(self.config, walk.planes, self.orders[-1], self.model.phases)
        shared, split = (self._correlations(blocks) for blocks in (state.blocks, kept))
        found = [lag_correlations(final, 1, 2), *(one[image] for one in shared), *split]
        return _joined(self._log_probs(state, walk, image, last - first), found)

    def _correlations(self, kept: Iterable[tuple[int, plane_walk.Planes]]) -> list[Tensor]:
        """Correlations of the blocks that steps split off, from the index and the planes of each step."""
        blocks = [
            plane_walk.split_block(self.config, i, planes, self.orders[i], self.model.phases)
            for i, planes in kept
        ]
        return [lag_correlations(block, 1, 2) for block in blocks]

    def _finish(
        self, state: State, first: int, last: int, kept: list[tuple[int, plane_walk.Planes]]
    ) -> tuple[plane_walk.PlaneWalk, Tensor]:
        """The steps that may know the label, and the image of each of their samples."""
        image = torch.arange(len(state.planes[0]), device=self.device).repeat_interleave(last - first)
        label_index = torch.arange(first, last, device=self.device).repeat(len(state.planes[0]))
        with _settings():
            steps = range(self.free, len(self.model.steps))
            return self._walk(state.planes, label_index, steps, kept, image), image

    def _log_probs(self, state: State, walk: plane_walk.PlaneWalk, image: Tensor, labels: int) -> Tensor:
        terms = plane_walk.density_terms(walk)
        terms += [plane_walk.square_sum(walk.planes).double(), *(term[image] for term in state.terms)]
        return (torch.stack(terms).sum(dim=0) + self.model.constant).view(-1, labels)

    def _walk(
        self,
        planes: plane_walk.Planes,
        label_index: Tensor,
        indices: range,
        kept: list[tuple[int, plane_walk.Planes]],
        image: Tensor | None = None,
    ) -> plane_walk.PlaneWalk:
        """Consecutive steps; planes that a part leaves of are put into `kept`, with the step's index."""
        steps = self.model.steps[indices.start : indices.stop]

        def at_split(i: int, planes: plane_walk.Planes) -> Tensor | None:
            if indices[i] in self.config.split_after:
                kept.append((indices[i], planes))
            split = steps[i].split
            return None if split is None else plane_walk.square_sum(planes, split)

        return plane_walk.walk_planes(
            planes, label_index, steps, self.model.phases, self._half, at_split, image
        )

    def _half(
        self,
        passive: Tensor,
        moved: Tensor,
        label_index: Tensor,
        half: FoldedHalfCoupling,
        image: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        count = len(label_index)
        # Graphs are compiled for any number of samples above one, and for one tensor of planes or for two.
        if len(passive) == 1:
            both = passive is moved
            passive = passive.expand(2, *passive.shape[1:]).contiguous()
            moved = passive if both else moved.expand(2, *moved.shape[1:]).contiguous()
        if count == 1:
            label_index = label_index.expand(2).contiguous()
            image = None if image is None else image.expand(2).contiguous()
        for value in (passive, moved, label_index, *(() if image is None else (image,))):
            torch._dynamo.mark_dynamic(value, 0)
        moved, logdet = self.run(passive, moved, label_index, half, self.model.bound, image)
        return moved[:count], logdet[:count]


def _settings() -> AbstractContextManager[Any]:
    """Settings of the compiler for one graph that serves any number of samples and labels."""
    stack = ExitStack()
    # Weights differ from step to step, which must not make their shapes dynamic; there is a graph for each
    # shape.
    limits: dict[str, Any] = {"recompile_limit": 512, "accumulated_recompile_limit": 4096}
    stack.enter_context(torch._dynamo.config.patch({"automatic_dynamic_shapes": False, **limits}))
    # As many samples as labels, or images, are a coincidence.
    stack.enter_context(torch.fx.experimental._config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
    return stack


def _check_compiler() -> None:
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as error:
        raise RuntimeError(
            "engine='compile' needs a C++ compiler on a CPU (g++ or clang++ on the path, or CXX); "
            "engine='eager' needs none"
        ) from error


class CudaGraphs:
    """Passes of `Eager` captured as CUDA graphs, one for each number of images, a power of two."""

    def __init__(self, eager: Eager) -> None:
        self.eager, self.graphs = eager, GraphPerSize()

    def start(self, x: Tensor) -> State:
        """See `Engine.start`."""
        return State((x,), [])

    def finish(self, state: State, first: int, last: int) -> Tensor:
        """See `Engine.finish`."""

        def run(images: Tensor) -> Tensor:
            return self.eager.finish(self.eager.start(images), first, last)

        return self.graphs(run, (state.planes[0],), (first, last))

    def finish_with_latents(self, state: State, first: int, last: int) -> Tensor:
        """See `Engine.finish_with_latents`."""

        def run(images: Tensor) -> Tensor:
            return self.eager.finish_with_latents(self.eager.start(images), first, last)

        return self.graphs(run, (state.planes[0],), (first, last, "with latents"))
