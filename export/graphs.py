"""The exported graphs: modules of plain ATen over folded constants, which no graph computes again.

All graphs of a model hold the same constants, which an export stores once. Graphs solve and invert nothing
and do not branch on data; matrices, their inverses and log-determinants are constants. Sums of
log-likelihoods are in float64, because runtimes sum in any order, and float32 in the order of the naive sum
is off by hundredths of a nat.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    KeyEntry,
    SequenceKey,
    tree_flatten_with_path,
    tree_unflatten,
)

from fastflow.errors import UninitializedModelError
from fastflow.models.attribution import place_on_image
from fastflow.models.flow import Flow
from fastflow.models.inference import planes as plane_walk
from fastflow.models.inference.fold import fold as fold_flow
from fastflow.models.inference.planes import Planes, PlaneWalk, from_planes, to_planes
from fastflow.models.inference.steps import FoldedFlow, FoldedHalfCoupling, FoldedStep
from fastflow.numerics import normal_log_density

from .parts import Part as Part
from .parts import Parts as Parts
from .parts import TensorSlot

PRECISIONS = ("float32", "mixed")


def fold(model: Flow, precision: str = "float32") -> FoldedFlow:
    """The constants of a model, for all of its graphs.

    Args:
        model: the flow, initialised and in evaluation mode, float32, on a CPU.
        precision: ``"float32"``, or ``"mixed"``: conditioners' convolutions in float16. The stream, norms,
            heads, log-scales, shifts and sums stay in float32 or wider: log p(x|y) is near the largest number
            that float16 has.

    Raises:
        ValueError: the model or the precision does not fit.
        UninitializedModelError: the model has seen no data.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if model.training:
        raise ValueError(
            "model must be in evaluation mode to be exported (its dropout is active); call model.eval()"
        )
    if not model.initialized:
        raise UninitializedModelError
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(
            f"model must be float32 on a CPU to be exported, it is {model.dtype} on {model.device}"
        )
    labels = torch.arange(model.config.num_classes)
    with torch.no_grad():
        return fold_flow(model, model.condition(labels), torch.float16 if precision == "mixed" else None)


def _name(path: tuple[KeyEntry, ...]) -> str:
    """The name of a constant: ``step_3_halves_0_net_conv1_weight``."""
    keys = (key for key in path if isinstance(key, SequenceKey | GetAttrKey))
    return "_".join(("step", *(str(key.idx) if isinstance(key, SequenceKey) else key.name for key in keys)))


class Graph(nn.Module):
    """A graph over a folded model. Its tensors are buffers; a tensor in several places is one buffer."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, model: Flow, constants: FoldedFlow, parts: Parts | None = None) -> None:
        super().__init__()
        self.parts = parts
        self.config, self.phases, self.bound = model.config, constants.phases, constants.bound
        self.constant = constants.constant
        entries, self._spec = tree_flatten_with_path(constants.steps)
        names: dict[Hashable, str] = {}
        self._leaves: list[object] = []
        for path, leaf in entries:
            if isinstance(leaf, Tensor):
                # Constants that two halves share came from one tensor, but are two objects.
                name = names.setdefault((leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype), _name(path))
                self.register_buffer(name, leaf)
                self._leaves.append(TensorSlot(name))
            else:
                self._leaves.append(leaf)
        self._orders = plane_walk.plane_orders(constants.steps)

    @property
    def steps(self) -> tuple[FoldedStep, ...]:
        """The steps, of this module's buffers."""
        leaves = [
            getattr(self, cast(str, leaf.key)) if isinstance(leaf, TensorSlot) else leaf
            for leaf in self._leaves
        ]
        return cast(tuple[FoldedStep, ...], tree_unflatten(leaves, self._spec))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of `batch` samples."""
        raise NotImplementedError

    def _example_images(self, batch: int) -> Tensor:
        values = torch.linspace(-1.0, 1.0, batch * self.config.num_dims)
        return values.view(batch, *self.config.input_shape)

    def _example_labels(self, batch: int) -> Tensor:
        return torch.arange(batch) % self.config.num_classes

    def _start(self, image: Tensor) -> Planes:
        return (to_planes(image.permute(0, 2, 3, 1), self.phases),)

    def _log_scale_and_shift(
        self, passive: Tensor, label_index: Tensor, half: FoldedHalfCoupling, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        run = plane_walk.log_scale_and_shift if self.parts is None else self.parts
        return run(passive, label_index, half, self.bound, image)

    def _half(
        self,
        passive: Tensor,
        moved: Tensor,
        label_index: Tensor,
        half: FoldedHalfCoupling,
        image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        s, shift = self._log_scale_and_shift(passive, label_index, half, image)
        return plane_walk.transform(moved, s, shift, half, image)

    def _natural(self, planes: Planes, i: int) -> Tensor:
        """Planes of step i as (R, H, W, C)."""
        return plane_walk.natural_order(planes, self._orders[i], self.phases, self.config.step_shapes[i])

    def _split_block(self, i: int, planes: Planes) -> Tensor | None:
        """The block that step i splits off, as (R, H, W, C)."""
        if i not in self.config.split_after:
            return None
        return plane_walk.split_block(self.config, i, planes, self._orders[i], self.phases)

    def _final_block(self, planes: Planes) -> Tensor:
        """The planes that stay after the last step, as (R, H, W, C)."""
        return plane_walk.final_block(self.config, planes, self._orders[-1], self.phases)

    def _planes(self, h: Tensor, step: FoldedStep) -> Planes:
        """(R, H, W, C) as planes of a step."""
        joined = to_planes(h, self.phases)
        if len(step.columns) == 1:
            return (joined,)
        return tuple(joined.index_select(3, columns) for columns in step.columns)


class ScoreGraph(Graph):
    """image (B, C, H, W) -> log p(x|y) (B, K) in nats, float64: all labels, shared parts once per image."""

    inputs = ("image",)
    outputs: tuple[str, ...] = ("log_probs",)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """See `Graph.example`."""
        return (self._example_images(batch),)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        return self._score(image, [], [])[0]

    def _score(
        self, image: Tensor, shared: list[Tensor], split: list[Tensor]
    ) -> tuple[Tensor, PlaneWalk, Tensor]:
        """The log-likelihoods, the last walk, and the image of each of its samples.

        Latent blocks that are split off are put into `shared`, once per image, and into `split`.
        """
        free, labels, batch = self.config.condition_from_step, self.config.num_classes, image.shape[0]
        none = torch.zeros(batch, dtype=torch.int64)
        walk = self._walk(self._start(image), none, range(free), shared)
        known = plane_walk.density_terms(walk)
        planes = plane_walk.run_mix(walk.planes, self.steps[free], self.phases)
        each = torch.arange(batch).unsqueeze(1).expand(-1, labels).reshape(-1)
        label_index = torch.arange(labels).unsqueeze(0).expand(batch, -1).reshape(-1)
        walk = self._walk(planes, label_index, range(free, len(self.steps)), split, each)
        terms = [*plane_walk.density_terms(walk), plane_walk.square_sum(walk.planes).double()]
        total = _add(terms).view(-1, labels) + self.constant
        return (total + _add(known).unsqueeze(1) if known else total), walk, each

    def _walk(
        self,
        planes: Planes,
        label_index: Tensor,
        indices: range,
        blocks: list[Tensor],
        image: Tensor | None = None,
    ) -> PlaneWalk:
        steps = self.steps[indices.start : indices.stop]

        def at_split(i: int, planes: Planes) -> Tensor | None:
            self._keep(indices[i], planes, blocks)
            split = steps[i].split
            return None if split is None else plane_walk.square_sum(planes, split)

        return plane_walk.walk_planes(planes, label_index, steps, self.phases, self._half, at_split, image)

    def _keep(self, i: int, planes: Planes, blocks: list[Tensor]) -> None:
        """Nothing: the latent itself is not asked for."""


class LatentGraph(Graph):
    """image (B, C, H, W), label (B,) -> z (B, D), logdet (B,) in float64; blocks as `MagicFlow.forward`."""

    inputs, outputs = ("image", "label"), ("z", "logdet")

    def __init__(self, model: Flow, constants: FoldedFlow, parts: Parts | None = None) -> None:
        super().__init__(model, constants, parts)
        with torch.no_grad():
            self.mixing = float(sum(float(step.mixing_logdet()) for step in model.steps))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """See `Graph.example`."""
        return self._example_images(batch), self._example_labels(batch)

    def _walk(self, image: Tensor, label: Tensor, run: plane_walk.RunHalf) -> PlaneWalk:
        start = self._start(image)
        return plane_walk.walk_planes(start, label, self.steps, self.phases, run, self._split_block)

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        walk = self._walk(image, label, self._half)
        terms = [logdet.double() for pair in walk.terms for logdet in pair]
        blocks = [self._final_block(walk.planes), *(block for block in walk.splits if block is not None)]
        z = torch.cat([block.permute(0, 3, 1, 2).flatten(1) for block in blocks], dim=1)
        return z, _add(terms) + self.mixing


class AttributionGraph(LatentGraph):
    """image (B, C, H, W), label (B,) -> map (B, C, H, W), constant (B,): see `MagicFlow.attribution`."""

    inputs, outputs = ("image", "label"), ("map", "constant")

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        walk = self._walk(image, label, self._half_with_map)
        terms = []
        for i, (first, second) in enumerate(walk.terms):
            several = len(self.steps[i].columns) > 1
            terms.append(self._natural((second, first) if several else (first + second,), i))
        final = normal_log_density(self._final_block(walk.planes))
        blocks = [normal_log_density(block) for block in walk.splits if block is not None]
        attribution = place_on_image(self.config, terms, final, blocks, -1, lambda h: from_planes(h, 2))
        constant = torch.full((1,), self.mixing, dtype=torch.float64).expand(image.shape[0]).clone()
        return attribution.permute(0, 3, 1, 2), constant

    def _half_with_map(
        self,
        passive: Tensor,
        moved: Tensor,
        label_index: Tensor,
        half: FoldedHalfCoupling,
        image: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `run_half`, but with the log-determinant still on its planes."""
        s, shift = self._log_scale_and_shift(passive, label_index, half, image)
        s, shift = (plane_walk.placed(value, half, moved.shape) for value in (s, shift))
        changed = moved * s.exp() + shift
        if half.active is None:
            return changed, s
        return torch.where(half.active, changed, moved), torch.where(half.active, s, 0.0)


def _add(terms: Sequence[Tensor]) -> Tensor:
    """Sum of terms (R,), by fours: ONNX Runtime captures no CUDA graph where over 32 tensors are joined."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 4], start=terms[i]) for i in range(0, len(terms), 4)]
    return terms[0]


class SampleGraph(Graph):
    """z (B, D), label (B,) -> image (B, C, H, W), see `MagicFlow.inverse`."""

    inputs, outputs = ("z", "label"), ("image",)

    def __init__(self, model: Flow, constants: FoldedFlow, parts: Parts | None = None) -> None:
        super().__init__(model, constants, parts)
        for i, step in enumerate(model.steps):
            with torch.no_grad():
                inverse, bias = step.inverse_matrix(torch.float64), step.mixing(torch.float64).bias
            self.register_buffer(f"step_{i}_unmix_weight", inverse.t().to(model.dtype).contiguous())
            self.register_buffer(f"step_{i}_unmix_bias", -(inverse @ bias).to(model.dtype))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """See `Graph.example`."""
        return self._example_images(batch).flatten(1), self._example_labels(batch)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        shapes = self.config.latent_shapes
        parts = z.split([c * height * width for c, height, width in shapes], dim=1)
        blocks = [
            part.reshape(-1, *shape).permute(0, 2, 3, 1) for part, shape in zip(parts, shapes, strict=True)
        ]
        h = blocks.pop(0)
        for i, step in reversed(list(enumerate(self.steps))):
            if i in self.config.split_after:
                h = torch.cat((h, blocks.pop()), dim=-1)
            label_index = label if step.uses_label else torch.zeros_like(label)
            planes = plane_walk.run_inverse_coupling(
                self._planes(h, step), label_index, step, self._log_scale_and_shift
            )
            h = self._natural(planes, i)
            h = h @ getattr(self, f"step_{i}_unmix_weight") + getattr(self, f"step_{i}_unmix_bias")
            if step.squeeze:
                h = from_planes(h, 2)
        return h.permute(0, 3, 1, 2)


GRAPHS: dict[str, type[Graph]] = {
    "score": ScoreGraph,
    "sample": SampleGraph,
    "latent": LatentGraph,
    "attribution": AttributionGraph,
}
