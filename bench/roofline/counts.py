"""The counts of works, a row for each pass, and what the rows are held against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.roofline.counting import Counter, kernels_chosen, touched_bytes, two_passes
from bench.roofline.features import FEATURE_SHAPES, feature_works, head_works
from bench.roofline.machine import BANDWIDTH, MAX_OVER_COMPOSITE, MAX_OVER_NEEDED, PAPER_SHAPES, PASSES
from bench.roofline.works import OP_SHAPES, Tensors, Work, half_steps, op_works


class Row(NamedTuple):
    """One pass of one work.

    Attributes:
        name: of the work.
        steps: of the paper's model that have the shape; empty for a single op.
        shape: such as ``4x92x92``.
        dtype: of the conditioner's tensors.
        passes: one of `PASSES`.
        needed: the fewest bytes.
        moved: bytes of the package's ops.
        composite: bytes of plain ATen.
        launches: of the package's ops.
        composite_launches: of plain ATen.
    """

    name: str
    steps: str
    shape: str
    dtype: str
    passes: str
    needed: int
    moved: int
    composite: int
    launches: int
    composite_launches: int

    @property
    def over_needed(self) -> float:
        """Moved over needed bytes."""
        return self.moved / self.needed

    @property
    def over_composite(self) -> float:
        """Moved bytes over those of plain ATen."""
        return self.moved / self.composite

    @property
    def half_step(self) -> bool:
        """Whether it is a half-step, for which there are targets, and no single op."""
        return bool(self.steps)

    def bound_us(self, device: str) -> float:
        """Microseconds that the moved bytes take at the bandwidth of a device of `BANDWIDTH`."""
        return self.moved / BANDWIDTH[device] * 1e6

    def misses(self) -> list[str]:
        """The targets that this row does not meet."""
        over = []
        if self.over_needed > MAX_OVER_NEEDED:
            over.append(f"{self.over_needed:.2f} x needed")
        if self.over_composite > MAX_OVER_COMPOSITE:
            over.append(f"{self.over_composite:.2f} of the composite")
        return over


def needed_bytes(work: Work, outputs: Tensors) -> tuple[int, int]:
    """The fewest bytes of a forward pass, and of a forward and a backward pass.

    Forward, they are inputs and outputs. Backward reads what must be kept and the outputs' gradients and
    writes the inputs'.
    """
    # The definition may return views (a squeeze of one row); a result is as large as its shape says.
    sizes = [output.numel() * output.element_size() for output in outputs]
    forward = touched_bytes(work.inputs) + sum(sizes[: len(sizes) - work.handed_on])
    return forward, forward + touched_bytes(work.saved) + sum(sizes) + touched_bytes(work.leaves)


def count(work: Work, steps: str = "") -> list[Row]:
    """The rows of a work, one for each of `PASSES`; `steps` are the paper's that a half-step stands for."""
    composite = list(two_passes(Counter(), lambda: work.composite(*work.inputs), work.leaves))
    with kernels_chosen():
        moved = list(two_passes(Counter(), lambda: work.public(*work.inputs), work.leaves))
    _, outputs = composite[0]
    needed = needed_bytes(work, outputs)
    about = (work.name, steps, "x".join(map(str, work.shape)), work.dtype)
    return [
        Row(*about, passes, fewest, ours.bytes, plain.bytes, ours.launches, plain.launches)
        for passes, fewest, (ours, _), (plain, _) in zip(PASSES, needed, moved, composite, strict=True)
    ]


def rows(batch: int) -> list[Row]:
    """Every op at its shapes and every half-step's coupling at the paper's; ops have no `steps`."""
    found = []
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            cases = [("", work) for shape in OP_SHAPES for work in op_works(shape, batch, dtype)]
            cases += [("", work) for shape in FEATURE_SHAPES for work in feature_works(shape, batch, dtype)]
            cases += [("", work) for shape in OP_SHAPES for work in head_works(shape, batch, dtype)]
            cases += [
                (steps, work)
                for steps, shape in PAPER_SHAPES.items()
                for work in half_steps(shape, batch, dtype)
            ]
            found += [row for steps, work in cases for row in count(work, steps)]
    return found
