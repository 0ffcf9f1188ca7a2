"""Bytes and launches of every op of the flow, counted without a GPU: ``python -m bench.roofline [--batch 16] [--csv FILE]``.

Three counts for each op and each half-step of the paper's model, forward and forward + backward:

- *needed*: the fewest bytes, each tensor that the pass must read once and each that it gives once. Forward and backward are two
  passes, since the rest of the network runs between them.
- *moved*: by the fused kernels. The launchers run while `recording` notes their launches; a launch moves each of its tensor
  arguments once, since its programs partition them, and the ATen ops that a launcher adds are counted beside. What many programs
  read again (masks, which the batch shares, and weights per channel) comes from cache and so counts once.
- *composite*: by the definition in plain ATen under autograd, each op reading its inputs and writing its outputs once. An op
  counts as one launch even where CUDA takes two (`masked_fill` clones first), in favour of the composite.

A bound is moved bytes over the memory bandwidth in the data sheet: no time here is measured. Tensors are fake, sizes without
memory, and nothing is computed. Where the compiler drops a load that nothing uses (the shift in a backward pass that saves x),
moved is above what a GPU reads. `bench/test_ops.py` times the same works.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflow import kernels
from fastflow.kernels._launch import recording
from fastflow.kernels.affine_coupling import (
    _coupling_backward_launch,
    _coupling_launch,
    affine_coupling_reference,
    finish_step_reference,
)
from fastflow.kernels.channel_mix import _mix_backward_launch, _mix_launch, channel_mix_reference, channel_unmix_reference
from fastflow.kernels.latent_prior import _prior_backward_launch, _prior_launch, latent_prior_reference
from fastflow.kernels.squeeze import _squeeze_launch, _unsqueeze_launch, squeeze2x2_reference, unsqueeze2x2_reference

Shape = tuple[int, int, int]
Tensors = tuple[Tensor, ...]

BANDWIDTH = {"A100": 2039e9, "H100": 3350e9, "H200": 4800e9}  # bytes/s, SXM, A100 with 80 GB
PAPER_SHAPES: dict[str, Shape] = {
    "0-4": (1, 184, 184),
    "5-7": (4, 92, 92),
    "8-10": (2, 92, 92),
    "11-13": (8, 46, 46),
    "14-16": (4, 46, 46),
    "17-19": (16, 23, 23),
    "20-23": (8, 23, 23),
}
OP_SHAPES: tuple[Shape, ...] = ((4, 92, 92), (8, 46, 46))
PASSES = ("forward", "forward+backward")
MAX_OVER_NEEDED = 1.1
MAX_OVER_COMPOSITE = 1 / 3
BOUND = 0.5


# -- counting -------------------------------------------------------------------------------------------------------------


def touched_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct regions of memory under some tensors; an expanded dimension counts once."""
    regions: dict[int, dict[Any, int]] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors:
        # Shape and strides as memory sees them: dimensions that repeat or hold one element are not there.
        dims = tuple((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1 and s != 0)
        count = 0 if tensor.numel() == 0 else tensor.element_size()
        for n, _ in dims:
            count *= n
        storage = tensor.untyped_storage()
        regions.setdefault(storage._cdata, {})[tensor.storage_offset(), tensor.dtype, dims] = count
        sizes[storage._cdata] = storage.nbytes()
    # Different views of one storage may overlap, but all of them lie in it.
    return sum(min(sum(found.values()), sizes[key]) for key, found in regions.items())


ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}


class Counter(TorchDispatchMode):
    """Launches and bytes of the ATen ops that run inside it: one launch per op that computes or copies.

    Views and allocations cost nothing. An op reads each distinct region of its inputs once and writes its outputs once; what it
    changes in place is read and written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        moved = _bytes_of(func, args, kwargs, result)
        self.bytes += moved
        self.launches += moved > 0
        return result


def _bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """What one ATen op reads and writes."""
    name = func._schema.name.removeprefix("aten::")
    if name in ALLOCATIONS:
        return 0
    read, written = [], []
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        found = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += found
        if not changed or not (argument.is_out or name in OVERWRITES):
            read += found
    known = {tensor.untyped_storage()._cdata for tensor in read + written}
    outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
    fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
    # A view gives what it was given. Some are not declared so in the schema, as `_unsafe_view`.
    if not written and not fresh:
        return 0
    return touched_bytes(read) + touched_bytes(written) + touched_bytes(fresh)


@contextlib.contextmanager
def _kernels_chosen() -> Iterator[None]:
    """Launchers choose kernels for tensors that no GPU holds only under the interpreter; while recording nothing is run."""
    # Before: what Triton is at its first import, compiler or interpreter, it stays, and `bench/test_ops.py` launches later.
    import triton.language  # noqa: F401

    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


class Cost(NamedTuple):
    bytes: int
    launches: int


def fused_cost(work: Callable[[], object]) -> Cost:
    """What launchers move and start, their own ATen ops included."""
    with _kernels_chosen(), torch.no_grad(), recording() as launches, Counter() as counter:
        work()
    moved = sum(touched_bytes(v for v in launch.arguments.values() if isinstance(v, Tensor)) for launch in launches)
    return Cost(moved + counter.bytes, len(launches) + counter.launches)


# -- works: ops and half-steps --------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """An op or a half-step on given tensors.

    `inputs` go to `composite` (plain ATen) and to `public` (the package's ops); both give a tuple of outputs. `forward` and
    `backward` call the launchers, the latter with the outputs' gradients. `saved` are the inputs that no backward pass can do
    without.
    """

    name: str
    shape: Shape
    dtype: str
    inputs: Tensors
    saved: Tensors
    composite: Callable[..., Tensors]
    public: Callable[..., Tensors]
    forward: Callable[[], object]
    backward: Callable[..., object]

    @property
    def leaves(self) -> Tensors:
        return tuple(tensor for tensor in self.inputs if tensor.requires_grad)


class Data(NamedTuple):
    """What works are made of; `stream` float32, conditioner tensors in `dtype`."""

    shape: Shape
    x: Tensor
    raw: Tensor
    shift: Tensor
    mask: Tensor
    following: Tensor
    weight: Tensor
    bias: Tensor
    dtype: torch.dtype

    @property
    def label(self) -> str:
        return str(self.dtype).removeprefix("torch.")


def make_data(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Data:
    """Random tensors; under `FakeTensorMode`, their sizes alone."""
    c = shape[0]
    x, raw, shift = (torch.randn(batch, *shape, device=device) for _ in range(3))
    mask = torch.rand(shape, device=device) < 0.5
    weight = torch.eye(c, device=device) + 0.1 * torch.randn(c, c, device=device)
    x, weight, bias = (t.requires_grad_() for t in (x, weight, torch.randn(c, device=device)))
    return Data(shape, x, raw.to(dtype).requires_grad_(), shift.to(dtype).requires_grad_(), mask, ~mask, weight, bias, dtype)


def _coupling(data: Data) -> Work:
    shape, x, raw, shift, mask, *_ = data
    nothing = x.new_empty(0)
    return Work(
        "affine_coupling", shape, data.label, (x, raw, shift, mask), (x, raw, mask),
        lambda x, raw, shift, mask: affine_coupling_reference(x, raw, shift, mask, BOUND, False),
        lambda x, raw, shift, mask: kernels.affine_coupling(x, raw, shift, mask, BOUND),
        lambda: _coupling_launch(x, raw, shift, mask, None, None, BOUND, False, None),
        lambda gy, gl: _coupling_backward_launch(gy, gl, nothing, x, raw, shift, mask, None, None, BOUND, False, False),
    )  # fmt: skip


def _coupling_step(data: Data, name: str = "coupling_step") -> Work:
    shape, x, raw, shift, mask, following, _, _, dtype = data

    def composite(x: Tensor, raw: Tensor, shift: Tensor, mask: Tensor, following: Tensor) -> Tensors:
        y, logdet = affine_coupling_reference(x, raw, shift, mask, BOUND, False)
        y, masked = finish_step_reference(y, following, None, False, dtype)
        return y, logdet, masked

    return Work(
        name, shape, data.label, (x, raw, shift, mask, following), (x, raw, mask, following), composite,
        lambda *inputs: kernels.coupling_step(*inputs, BOUND, dtype=dtype),
        lambda: _coupling_launch(x, raw, shift, mask, following, None, BOUND, False, dtype),
        lambda gy, gl, gm: _coupling_backward_launch(gy, gl, gm, x, raw, shift, mask, following, None, BOUND, False, False),
    )  # fmt: skip


def _step_end(data: Data, name: str) -> Work:
    """The half-step before a mix: of one channel, folded into the coupling; of more, a launch of its own."""
    shape, x, raw, shift, mask, following, weight, bias, dtype = data
    folded = torch.cat((weight.detach().flatten()[:1], bias.detach()[:1]))
    nothing = x.new_empty(0)

    def composite(x: Tensor, raw: Tensor, shift: Tensor, mask: Tensor, following: Tensor, *map_: Tensor) -> Tensors:
        y, logdet = affine_coupling_reference(x, raw, shift, mask, BOUND, False)
        y = channel_mix_reference(y, *map_, False)
        return y, logdet, y.masked_fill(~following, 0.0).to(dtype)

    def public(x: Tensor, raw: Tensor, shift: Tensor, mask: Tensor, following: Tensor, *map_: Tensor) -> Tensors:
        if shape[0] == 1:
            affine = torch.cat((map_[0].flatten(), map_[1]))
            return kernels.coupling_step(x, raw, shift, mask, following, BOUND, affine=affine, dtype=dtype)
        y, logdet = kernels.affine_coupling(x, raw, shift, mask, BOUND)
        y, masked = kernels.channel_mix_masked(y, *map_, following, dtype=dtype)
        return y, logdet, masked

    def forward() -> None:
        if shape[0] == 1:
            _coupling_launch(x, raw, shift, mask, following, folded, BOUND, False, dtype)
            return
        y, _, _ = _coupling_launch(x, raw, shift, mask, None, None, BOUND, False, None)
        _mix_launch(y, weight, bias, following, False, False, dtype)

    def backward(gy: Tensor, gl: Tensor, gm: Tensor) -> None:
        rest = (BOUND, False, False)
        if shape[0] == 1:
            _coupling_backward_launch(gy, gl, gm, x, raw, shift, mask, following, folded, *rest)
            return
        y = torch.empty_like(x)
        gy, _, _ = _mix_backward_launch(gy, gm, y, weight, weight, bias, following, False, False, False)
        _coupling_backward_launch(gy, gl, nothing, x, raw, shift, mask, None, None, *rest)

    # The weight's gradient takes the coupling's result, which takes the shift.
    inputs = (x, raw, shift, mask, following, weight, bias)
    return Work(name, shape, data.label, inputs, inputs[:-1], composite, public, forward, backward)


def _mix(data: Data, squeeze: bool) -> Work:
    (c, h, w), x, weight, bias = data.shape, data.x, data.weight, data.bias
    if squeeze:
        x = x.detach().new_empty(x.shape[0], c // 4, 2 * h, 2 * w).normal_().requires_grad_()
    return Work(
        "channel_mix" + squeeze * " +squeeze", data.shape, data.label, (x, weight, bias), (x, weight),
        lambda *inputs: (channel_mix_reference(*inputs, squeeze),),
        lambda *inputs: (kernels.channel_mix(*inputs, squeeze),),
        lambda: _mix_launch(x, weight, bias, None, squeeze, False, None),
        lambda gy: _mix_backward_launch(gy, gy, x, weight, weight, bias, None, squeeze, False, False),
    )  # fmt: skip


def _mix_masked(data: Data) -> Work:
    shape, x, _, _, _, following, weight, bias, dtype = data

    def composite(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensors:
        y = channel_mix_reference(x, weight, bias, False)
        return y, y.masked_fill(~mask, 0.0).to(dtype)

    return Work(
        "channel_mix_masked", shape, data.label, (x, weight, bias, following), (x, weight, following), composite,
        lambda *inputs: kernels.channel_mix_masked(*inputs, dtype=dtype),
        lambda: _mix_launch(x, weight, bias, following, False, False, dtype),
        lambda gy, gm: _mix_backward_launch(gy, gm, x, weight, weight, bias, following, False, False, False),
    )  # fmt: skip


def _unmix(data: Data) -> Work:
    # The inverse is the caller's, who has it from the weight's factors.
    x, weight, bias = data.x, data.weight, data.bias
    return Work(
        "channel_unmix", data.shape, data.label, (x, weight, bias), (x, weight, bias),
        lambda *inputs: (channel_unmix_reference(*inputs, False),),
        lambda y, inverse, bias: (kernels.channel_unmix(y, inverse, bias, inverse_weight=inverse),),
        lambda: _mix_launch(x, weight, bias, None, False, True, None),
        lambda gx: _mix_backward_launch(gx, gx, x, weight, weight, bias, None, False, True, False),
    )  # fmt: skip


def _others(data: Data) -> list[Work]:
    x = data.x
    z = x.detach().flatten(1).requires_grad_()
    return [
        Work(
            "squeeze2x2", data.shape, data.label, (x,), (),
            lambda x: (squeeze2x2_reference(x),), lambda x: (kernels.squeeze2x2(x),),
            lambda: _squeeze_launch(x), _unsqueeze_launch,
        ),
        Work(
            "unsqueeze2x2", data.shape, data.label, (x,), (),
            lambda y: (unsqueeze2x2_reference(y),), lambda y: (kernels.unsqueeze2x2(y),),
            lambda: _unsqueeze_launch(x), _squeeze_launch,
        ),
        Work(
            "latent_prior", data.shape, data.label, (z,), (z,),
            lambda z: (latent_prior_reference(z),), lambda z: (kernels.latent_prior(z),),
            lambda: _prior_launch(z), lambda grad: _prior_backward_launch(grad, z),
        ),
    ]  # fmt: skip


def op_works(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Work]:
    """The ops at one shape, (C, H, W) with C a multiple of 4 and even sides. In bfloat16, those with conditioner tensors."""
    data = make_data(shape, batch, dtype, device)
    works = [_coupling(data), _coupling_step(data), _mix_masked(data)]
    if dtype == torch.float32:
        works += [_mix(data, False), _mix(data, True), _unmix(data), *_others(data)]
    return works


def half_steps(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Work]:
    """A half-step outside its conditioner: one inside a flow step, and one that ends it and so goes through the next mix."""
    data = make_data(shape, batch, dtype, device)
    return [_coupling_step(data, "half-step"), _step_end(data, "half-step +mix")]


# -- counts of a work -----------------------------------------------------------------------------------------------------


def _composite_cost(work: Work, backward: bool) -> Cost:
    with Counter() as counter:
        outputs = work.composite(*work.inputs)
    if backward:
        grads = [torch.empty_like(output) for output in outputs]
        with counter:
            torch.autograd.grad(outputs, work.leaves, grads)
    return Cost(counter.bytes, counter.launches)


def needed_bytes(work: Work, backward: bool) -> int:
    """The fewest bytes: inputs and outputs, and backward what must be kept, the outputs' gradients and the inputs'."""
    outputs = [output.detach() for output in work.composite(*work.inputs)]
    # The definition may return views (a squeeze of one row); a result is as large as its shape says.
    given = sum(output.numel() * output.element_size() for output in outputs)
    needed = touched_bytes(work.inputs) + given
    return needed + touched_bytes(work.saved) + given + touched_bytes(work.leaves) if backward else needed


def moved_cost(work: Work, backward: bool) -> Cost:
    """What the fused kernels move and start."""
    cost = fused_cost(work.forward)
    if not backward:
        return cost
    with torch.no_grad():
        grads = [torch.empty_like(output) for output in work.composite(*work.inputs)]
    more = fused_cost(lambda: work.backward(*grads))
    return Cost(cost.bytes + more.bytes, cost.launches + more.launches)


class Row(NamedTuple):
    """One line of the table; times are bounds in microseconds."""

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
        return self.moved / self.needed

    @property
    def over_composite(self) -> float:
        return self.moved / self.composite

    @property
    def half_step(self) -> bool:
        return bool(self.steps)

    def bound_us(self, device: str) -> float:
        return self.moved / BANDWIDTH[device] * 1e6

    def misses(self) -> list[str]:
        """The targets that this row does not meet."""
        over = []
        if self.over_needed > MAX_OVER_NEEDED:
            over.append(f"{self.over_needed:.2f} x needed")
        if self.over_composite > MAX_OVER_COMPOSITE:
            over.append(f"{self.over_composite:.2f} of the composite")
        return over


def count(work: Work, backward: bool, steps: str = "") -> Row:
    """The row of a work."""
    moved, composite = moved_cost(work, backward), _composite_cost(work, backward)
    shape, needed = "x".join(map(str, work.shape)), needed_bytes(work, backward)
    sizes = (needed, moved.bytes, composite.bytes)
    return Row(work.name, steps, shape, work.dtype, PASSES[backward], *sizes, moved.launches, composite.launches)


def rows(batch: int) -> list[Row]:
    """Every op at `OP_SHAPES` and every half-step at the paper's shapes; ops have no `steps`."""
    found = []
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            cases = [("", work) for shape in OP_SHAPES for work in op_works(shape, batch, dtype)]
            cases += [(steps, work) for steps, shape in PAPER_SHAPES.items() for work in half_steps(shape, batch, dtype)]
            found += [count(work, backward, steps) for steps, work in cases for backward in (False, True)]
    return found


# -- output ---------------------------------------------------------------------------------------------------------------

HEADINGS = (
    "name", "steps", "shape", "conditioner", "pass", "needed MB", "moved MB", "composite MB", "moved / needed",
    "moved / composite", "launches", "composite launches", *(f"{device} bound us" for device in BANDWIDTH),
)  # fmt: skip


def _cells(row: Row) -> list[str]:
    sizes = [f"{value / 1e6:.3f}" for value in (row.needed, row.moved, row.composite)]
    ratios = [f"{row.over_needed:.3f}", f"{row.over_composite:.3f}", str(row.launches), str(row.composite_launches)]
    return [*row[:5], *sizes, *ratios, *(f"{row.bound_us(device):.2f}" for device in BANDWIDTH)]


def _print_table(console: Console, title: str, found: list[Row]) -> None:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if i < 5 else "right", no_wrap=i < 5)
    for row in found:
        table.add_row(*_cells(row))
    console.print(table)


def _print_targets(console: Console, found: list[Row]) -> None:
    """The targets, and every half-step that misses one."""
    missed = [(row, over) for row in found if row.half_step and (over := row.misses())]
    total = sum(row.half_step for row in found)
    console.print(
        f"Targets for half-steps, counted: moved <= {MAX_OVER_NEEDED} x needed, and <= 1/3 of the composite. "
        f"{total - len(missed)} of {total} rows meet both" + ("; these miss:" if missed else ".")
    )
    for row, over in missed:
        console.print(f"  {row.name} {row.shape} {row.dtype} {row.passes}: {', '.join(over)}")
    if missed:
        console.print("A mix of several channels is a launch of its own: it reads again what the coupling has written.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Counted bytes and launches, and bounds from them. Measures no time.")
    parser.add_argument("--batch", type=int, default=16, help="samples (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    found = rows(args.batch)
    console = Console(width=200, highlight=False)
    note = f"counted at batch {args.batch}; bound = moved bytes / bandwidth (A100 2039, H100 3350, H200 4800 GB/s)"
    _print_table(console, f"Ops, {note}", [row for row in found if not row.half_step])
    _print_table(console, f"\nHalf-steps outside their conditioner, {note}", [row for row in found if row.half_step])
    _print_targets(console, found)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([HEADINGS, *map(_cells, found)])


if __name__ == "__main__":
    main()
