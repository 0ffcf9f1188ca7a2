"""What is exported: modules of plain ATen over the constants of `fastflow.models.folded`, which no graph computes again.

All graphs of a model hold the same constants: what is exported stores them once. Nothing of what they run solves, inverts or
branches on data; matrices, their inverses and log-determinants are constants. Sums of log-likelihoods are in float64, because
runtimes sum in any order, and float32 in the order of the naive sum is off by hundredths of a nat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import GetAttrKey, KeyEntry, SequenceKey, TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from fastflow.errors import UninitializedModelError
from fastflow.kernels._library import accumulator
from fastflow.models import folded
from fastflow.models.folded import LOG_2PI, Half, Planes, Step
from fastflow.models.magic_flow import MagicFlow

PRECISIONS = ("float32", "mixed")


def fold(model: MagicFlow, precision: str = "float32") -> folded.Folded:
    """The constants of a model, for all of its graphs.

    Args:
        model: the flow, initialised and in evaluation mode, float32, on a CPU.
        precision: ``"float32"``, or ``"mixed"``: conditioners' convolutions in float16. The stream, norms, heads, log-scales,
            shifts and sums stay in float32 or wider: log p(x|y) is near the largest number that float16 has.

    Raises:
        ValueError: the model or the precision does not fit.
        UninitializedModelError: the model has seen no data.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if model.training:
        raise ValueError("model must be in evaluation mode to be exported (its dropout is active); call model.eval()")
    if not model.initialized:
        raise UninitializedModelError
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"model must be float32 on a CPU to be exported, it is {model.dtype} on {model.device}")
    labels = torch.arange(model.config.num_classes)
    with torch.no_grad():
        return folded.fold(model, model.label_tables(labels), torch.float16 if precision == "mixed" else None)


def _name(path: tuple[KeyEntry, ...]) -> str:
    """Of a constant: ``step_3_halves_0_net_conv1_weight``."""
    keys = (key for key in path if isinstance(key, SequenceKey | GetAttrKey))
    return "_".join(("step", *(str(key.idx) if isinstance(key, SequenceKey) else key.name for key in keys)))


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor was taken out of a tree."""

    index: int | str


def _take_tensors(tree: Any) -> tuple[list[Tensor], list[Any], TreeSpec]:
    """(tensors, leaves with a `_Place` for each tensor, structure) of a tree."""
    leaves, spec = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    count = iter(range(len(tensors)))
    return tensors, [_Place(next(count)) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


class Part(nn.Module):
    """`folded.log_scale_and_shift` for the halves of one shape, their tensors as inputs.

    Args:
        half: one of them.
        passive: (R, H', W', P) planes.
        bound: of the log-scale.
        spread: whether planes come once per image.
    """

    def __init__(self, half: Half, passive: Sequence[int], bound: float, spread: bool) -> None:
        super().__init__()
        tensors, self.leaves, self.spec = _take_tensors(half)
        self.kinds = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        self.passive, self.bound, self.spread = tuple(passive), bound, spread

    @property
    def key(self) -> Hashable:
        """What is the same of all halves that this part serves."""
        return tuple(self.kinds), tuple(self.leaves), str(self.spec), self.passive, self.bound, self.spread

    def example(self, batch: int) -> tuple[Any, ...]:
        """Inputs; only shapes matter."""
        rows = torch.zeros(batch + 1 if self.spread else batch, dtype=torch.int64)
        tensors = tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in self.kinds)
        return torch.zeros(batch, *self.passive), rows, torch.zeros_like(rows) if self.spread else None, tensors

    def forward(self, passive: Tensor, rows: Tensor, image: Tensor | None, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """See `folded.log_scale_and_shift`."""
        leaves = [tensors[cast(int, leaf.index)] if isinstance(leaf, _Place) else leaf for leaf in self.leaves]
        return folded.log_scale_and_shift(passive, rows, tree_unflatten(leaves, self.spec), self.bound, image)


class Parts:
    """The parts that graphs call by name: halves of one shape are one function, traced once, whichever graph they are in."""

    domain = "fastflow"

    def __init__(self) -> None:
        self.parts: dict[Hashable, Part] = {}

    def name(self, i: int) -> str:
        """Of the i-th part."""
        return f"conditioner_{i}"

    def __call__(
        self, passive: Tensor, rows: Tensor, half: Half, bound: float, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """A call of the part of a half, as `folded.log_scale_and_shift`."""
        part = Part(half, [int(n) for n in passive.shape[1:]], bound, image is not None)
        self.parts.setdefault(part.key, part)
        place = list(self.parts).index(part.key)
        tensors, _, _ = _take_tensors(half)
        inputs = [passive, rows, *(() if image is None else (image,)), *tensors]
        moves = [half.net.heads.scale.shape[1]] if isinstance(half.net, folded.ClassificationNet) else passive.shape[1:]
        s, shift = torch.onnx.ops.symbolic_multi_out(
            f"{self.domain}::{self.name(place)}",
            inputs,
            dtypes=[passive.dtype] * 2,
            shapes=[[rows.shape[0], *moves]] * 2,
            version=1,
        )
        return s, shift


class Graph(nn.Module):
    """A graph over a folded model. Its tensors are buffers, a tensor in several places one buffer."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    def __init__(self, model: MagicFlow, constants: folded.Folded, parts: Parts | None = None) -> None:
        super().__init__()
        self.parts = parts
        self.config, self.phases, self.bound = model.config, constants.phases, constants.bound
        self.constant = constants.constant
        entries, self._spec = tree_flatten_with_path(constants.steps)
        names: dict[Hashable, str] = {}
        self._leaves: list[object] = []
        for path, leaf in entries:
            if isinstance(leaf, Tensor):
                # What two halves share came from one tensor, but is two objects.
                name = names.setdefault((leaf.data_ptr(), leaf.shape, leaf.stride(), leaf.dtype), _name(path))
                self.register_buffer(name, leaf)
                self._leaves.append(_Place(name))
            else:
                self._leaves.append(leaf)
        # Where each plane of the natural order stands.
        self._orders = [torch.argsort(torch.cat(step.columns)) for step in constants.steps]

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps, of this module's buffers."""
        leaves = [getattr(self, cast(str, leaf.index)) if isinstance(leaf, _Place) else leaf for leaf in self._leaves]
        return cast(tuple[Step, ...], tree_unflatten(leaves, self._spec))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """Inputs of `batch` samples."""
        raise NotImplementedError

    def _example_images(self, batch: int) -> Tensor:
        return torch.linspace(-1.0, 1.0, batch * self.config.num_dims).view(batch, *self.config.input_shape)

    def _example_labels(self, batch: int) -> Tensor:
        return torch.arange(batch) % self.config.num_classes

    def _start(self, image: Tensor) -> Planes:
        return (folded.to_planes(image.permute(0, 2, 3, 1), self.phases),)

    def _terms(self, passive: Tensor, rows: Tensor, half: Half, image: Tensor | None = None) -> tuple[Tensor, Tensor]:
        run = folded.log_scale_and_shift if self.parts is None else self.parts
        return run(passive, rows, half, self.bound, image)

    def _half(
        self, passive: Tensor, moved: Tensor, rows: Tensor, half: Half, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return folded.move(moved, *self._terms(passive, rows, half, image), half, image)

    def _natural(self, planes: Planes, i: int) -> Tensor:
        """Planes of step i as (R, H, W, C)."""
        joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1).index_select(3, self._orders[i])
        _, height, width = self.config.step_shapes[i]
        return from_planes(joined, self.phases)[:, :height, :width]

    def _kept(self, planes: Planes) -> Tensor:
        """What the last step leaves of its planes, as (R, H, W, C)."""
        last = len(self.steps) - 1
        h = self._natural(planes, last)
        return h.chunk(2, dim=-1)[0] if last in self.config.split_after else h

    def _planes(self, h: Tensor, step: Step) -> Planes:
        """(R, H, W, C) as planes of a step."""
        joined = folded.to_planes(h, self.phases)
        return (joined,) if len(step.columns) == 1 else tuple(joined.index_select(3, columns) for columns in step.columns)


def from_planes(planes: Tensor, phases: int) -> Tensor:
    """The inverse of `folded.to_planes`: (R, H', W', C phases^2) -> (R, phases H', phases W', C)."""
    if phases == 1:
        return planes
    _, height, width, size = planes.shape
    channels = size // phases**2
    blocks = planes.reshape(-1, height, width, channels, phases, phases).permute(0, 1, 4, 2, 5, 3)
    return blocks.reshape(-1, height * phases, width * phases, channels)


class ScoreGraph(Graph):
    """image (B, C, H, W) -> log p(x|y) (B, K) in nats, float64: all labels, what they share computed once per image."""

    inputs, outputs = ("image",), ("log_probs",)

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """See `Graph.example`."""
        return (self._example_images(batch),)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        steps, free, labels, batch = self.steps, self.config.condition_from_step, self.config.num_classes, image.shape[0]
        none = torch.zeros(batch, dtype=torch.int64)
        planes, shared = folded.run_steps(self._start(image), none, None, steps[:free], self.phases, self._half)
        planes = folded.run_mix(planes, steps[free], self.phases)
        each = torch.arange(batch).unsqueeze(1).expand(-1, labels).reshape(-1)
        rows = torch.arange(labels).unsqueeze(0).expand(batch, -1).reshape(-1)
        planes, terms = folded.run_steps(planes, rows, each, steps[free:], self.phases, self._half)
        total = _add([*terms, folded.square_sum(planes).double()]).view(-1, labels) + self.constant
        return total + _add(shared).unsqueeze(1) if shared else total


class LatentGraph(Graph):
    """image (B, C, H, W), label (B,) -> z (B, D), logdet (B,) in nats, float64; blocks of z as in `MagicFlow.forward`."""

    inputs, outputs = ("image", "label"), ("z", "logdet")

    def __init__(self, model: MagicFlow, constants: folded.Folded, parts: Parts | None = None) -> None:
        super().__init__(model, constants, parts)
        with torch.no_grad():
            self.mixing = float(sum(float(step.mixing_logdet()) for step in model.steps))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """See `Graph.example`."""
        return self._example_images(batch), self._example_labels(batch)

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        planes, blocks, terms = self._start(image), [], []
        for i, step in enumerate(self.steps):
            planes = folded.run_mix(planes, step, self.phases)
            rows = label if i >= self.config.condition_from_step else torch.zeros_like(label)
            planes, logdets = folded.run_coupling(planes, rows, step, self._half)
            terms += [logdet.double() for logdet in logdets]
            if i in self.config.split_after:
                blocks.append(self._natural(planes, i).chunk(2, dim=-1)[1])
        blocks.insert(0, self._kept(planes))
        z = torch.cat([block.permute(0, 3, 1, 2).flatten(1) for block in blocks], dim=1)
        return z, _add(terms) + self.mixing


class AttributionGraph(LatentGraph):
    """image (B, C, H, W), label (B,) -> map (B, C, H, W), constant (B,): the terms of log p(x|y), see `MagicFlow.attribution`."""

    inputs, outputs = ("image", "label"), ("map", "constant")

    def forward(self, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        planes, spread, split_off = self._start(image), torch.zeros_like(image.permute(0, 2, 3, 1)), []
        for i, step in enumerate(self.steps):
            planes = folded.run_mix(planes, step, self.phases)
            rows = label if i >= self.config.condition_from_step else torch.zeros_like(label)
            planes, (first, second) = folded.run_coupling(planes, rows, step, self._half_with_map)
            terms = (first + second,) if len(planes) == 1 else (second, first)
            if step.squeeze:
                spread = folded.to_planes(spread, 2)
            spread = spread + self._natural(terms, i)
            if i in self.config.split_after:
                spread, rest = spread.chunk(2, dim=-1)
                split_off.append(rest + _log_density(self._natural(planes, i).chunk(2, dim=-1)[1]))
        spread = spread + _log_density(self._kept(planes))
        for i, step in reversed(list(enumerate(self.steps))):
            if i in self.config.split_after:
                spread = torch.cat((spread, split_off.pop()), dim=-1)
            if step.squeeze:
                spread = from_planes(spread, 2)
        constant = torch.full((1,), self.mixing, dtype=torch.float64).expand(image.shape[0]).clone()
        return spread.permute(0, 3, 1, 2), constant

    def _half_with_map(
        self, passive: Tensor, moved: Tensor, rows: Tensor, half: Half, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `folded.run_half`, but with the log-determinant still spread over planes."""
        s, shift = self._terms(passive, rows, half, image)
        s, shift = folded.placed(s, half, moved.shape), folded.placed(shift, half, moved.shape)
        changed = moved * s.exp() + shift
        if half.active is None:
            return changed, s
        return torch.where(half.active, changed, moved), torch.where(half.active, s, 0.0)


def _add(terms: Sequence[Tensor]) -> Tensor:
    """Sum of terms (R,), by fours: ONNX Runtime does not capture a CUDA graph where more than 32 tensors are joined."""
    while len(terms) > 1:
        terms = [sum(terms[i + 1 : i + 4], start=terms[i]) for i in range(0, len(terms), 4)]
    return terms[0]


def _log_density(z: Tensor) -> Tensor:
    z = z.to(accumulator(z.dtype))
    return -0.5 * (z * z + LOG_2PI)


class SampleGraph(Graph):
    """z (B, D), label (B,) -> image (B, C, H, W), see `MagicFlow.inverse`."""

    inputs, outputs = ("z", "label"), ("image",)

    def __init__(self, model: MagicFlow, constants: folded.Folded, parts: Parts | None = None) -> None:
        super().__init__(model, constants, parts)
        for i, step in enumerate(model.steps):
            with torch.no_grad():
                scale, weight = step.actnorm.log_scale.double().exp(), step.conv.weight()
                inverse = step.conv.inverse_weight() / scale[:, None]
                bias = weight @ step.actnorm.bias.double()
            self.register_buffer(f"step_{i}_unmix_weight", inverse.t().to(model.dtype).contiguous())
            self.register_buffer(f"step_{i}_unmix_bias", -(inverse @ bias).to(model.dtype))

    def example(self, batch: int) -> tuple[Tensor, ...]:
        """See `Graph.example`."""
        return self._example_images(batch).flatten(1), self._example_labels(batch)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """See the class."""
        shapes = self.config.latent_shapes
        parts = z.split([c * height * width for c, height, width in shapes], dim=1)
        blocks = [part.reshape(-1, *shape).permute(0, 2, 3, 1) for part, shape in zip(parts, shapes, strict=True)]
        h = blocks.pop(0)
        for i, step in reversed(list(enumerate(self.steps))):
            if i in self.config.split_after:
                h = torch.cat((h, blocks.pop()), dim=-1)
            planes = self._planes(h, step)
            rows = label if i >= self.config.condition_from_step else torch.zeros_like(label)
            for k, half in reversed(list(enumerate(step.halves))):
                passive, moved = planes[k % len(planes)], planes[(k + 1) % len(planes)]
                moved = folded.move_back(moved, *self._terms(passive, rows, half), half)
                planes = (moved,) if len(planes) == 1 else (passive, moved) if k == 0 else (moved, passive)
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
