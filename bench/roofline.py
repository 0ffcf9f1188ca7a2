"""Bytes and launches of every op of the flow, counted without a GPU: ``python -m bench.roofline [--batch 16] [--csv FILE]``.

Three counts for each op and each half-step's coupling in the paper's model, forward and forward + backward:

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

Whole half-steps, conditioner and coupling, are counted outside of convolutions and matrix products, whose bytes stand in
columns of their own. *Fused* is what the models run on a GPU in a training step: `encode` and `couple`, each of the package's
ops as the launches of its launcher, every other ATen op as in a composite. Operands of the products within the head kernels
count with the products, as does the copy that CUDA makes of what `baddbmm` adds to. *Plain* is the same half-step in ATen ops,
in the least costly form at hand: the package's references with their tables per label, dropout as the one launch that CUDA has
for it, single launches for means and maxima, and the atrous pyramid as it is published: concatenated, averaged, gated, mapped
by one convolution. Both get the masked input, the tables and rows whose values are known to be in them, and both give the next
masked input. Contiguous layout; bfloat16 is autocast (that of the CPU, whose list has the same products), with its casts of
weights on both sides; what autograd adds up where a tensor is used twice counts on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflow import FlowConfig, kernels
from fastflow.kernels._launch import Launch, recording
from fastflow.kernels.affine_coupling import (
    _coupling_backward_launch,
    _coupling_launch,
    affine_coupling_reference,
    finish_step_reference,
)
from fastflow.kernels.attention_pool import (
    _channels_backward_launch,
    _channels_launch,
    _gates_backward_launch,
    _gates_launch,
    _pixels_backward_launch,
    _pixels_launch,
    apply_gates_reference,
    average_pixels_reference,
    pool_channels_reference,
    pool_pixels_reference,
)
from fastflow.kernels.channel_mix import _mix_backward_launch, _mix_launch, channel_mix_reference, channel_unmix_reference
from fastflow.kernels.coupling_head import PixelOrder, _head_backward_launch, _head_launch, coupling_head_reference
from fastflow.kernels.latent_prior import _prior_backward_launch, _prior_launch, latent_prior_reference
from fastflow.kernels.norm_film_act import _norm_backward_launch, _norm_launch, norm_film_act_reference
from fastflow.kernels.squeeze import _squeeze_launch, _unsqueeze_launch, squeeze2x2_reference, unsqueeze2x2_reference
from fastflow.models.conditioners import ClassificationConditioner, GenerationConditioner, blocks, generation
from fastflow.models.conditioners.blocks import Drop, Modulation, NormFiLM, Passive, Tables, Then

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
# A norm's group of the first fits a block and is read once; one of the second is split, and read twice.
FEATURE_SHAPES: tuple[Shape, ...] = ((16, 46, 46), (16, 92, 92))
PASSES = ("forward", "forward+backward")
MAX_OVER_NEEDED = 1.1
MAX_OVER_COMPOSITE = 1 / 3
MAX_LAUNCHES_OVER_PLAIN = 0.5
MAX_BYTES_OVER_PLAIN = 0.4
BOUND = 0.5
CLASSES = 7
GROUPS = 8
HEAD_FEATURES = 64
DROPOUT = 0.3


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
    without. The last `handed_on` outputs are inputs that the op hands on: nobody writes them, but they have gradients.
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
    handed_on: int = 0

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
    """A half-step outside of its conditioner: one inside a flow step, and one that ends it and so goes through the next mix."""
    data = make_data(shape, batch, dtype, device)
    return [_coupling_step(data, "half-step"), _step_end(data, "half-step +mix")]


def _norm(name: str, x: Tensor, tables: Any, residual: Tensor | None, keys: Tensor | None) -> Work:
    given = tuple(t for t in (residual, keys) if t is not None)
    dropout = 0.0 if keys is None else DROPOUT

    def composite(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, *rest: Tensor) -> Tensors:
        residual = rest[0] if "residual" in name else None
        y = norm_film_act_reference(x, GROUPS, gamma, beta, rows, residual, 1e-5)
        return (y if keys is None else torch.native_dropout(y, dropout, True)[0],)

    def public(x: Tensor, gamma: Tensor, beta: Tensor, rows: Tensor, *rest: Tensor) -> Tensors:
        residual = rest[0] if "residual" in name else None
        return (kernels.norm_film_act(x, GROUPS, gamma, beta, rows, residual, dropout=dropout, keys=keys),)

    def backward(grad: Tensor) -> None:
        stats = torch.empty(len(x), GROUPS, 2, device=x.device)
        _norm_backward_launch(grad, x, stats, *tables, residual, keys, GROUPS, dropout)

    inputs = (x, *tables, *given)
    return Work(
        name, _shape(x), _label(x), inputs, inputs, composite, public,
        lambda: _norm_launch(x, *tables, residual, keys, GROUPS, 1e-5, dropout, None), backward,
    )  # fmt: skip


def _shape(x: Tensor) -> Shape:
    _, c, h, w = x.shape
    return c, h, w


def _label(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _pools(x: Tensor, channel: Tensor, spatial: Tensor) -> list[Work]:
    (batch, c, h, w), device = x.shape, x.device
    pixel = torch.zeros(batch, c, dtype=torch.int32, device=device)
    place = torch.zeros(batch, h, w, dtype=torch.int32, device=device)
    about = (_shape(x), _label(x))
    return [
        Work(
            "pool_pixels", *about, (x,), (),
            lambda x: (pool_pixels_reference(x), x.view_as(x)), lambda x: kernels.pool_pixels(x),
            lambda: _pixels_launch(x, True, True), lambda g, passed: _pixels_backward_launch(g, pixel, passed, h, w, False), 1,
        ),
        Work(
            "average_pixels", *about, (x,), (),
            lambda x: (average_pixels_reference(x), x.view_as(x)), lambda x: kernels.average_pixels(x),
            lambda: _pixels_launch(x, False, False),
            lambda g, passed: _pixels_backward_launch(g[None], None, passed, h, w, False), 1,
        ),
        Work(
            "pool_channels", *about, (x, channel), (x, channel),
            lambda x, channel: (pool_channels_reference(x, channel), x.view_as(x)),
            lambda x, channel: kernels.pool_channels(x, channel),
            lambda: _channels_launch(x, channel, True),
            lambda g, passed: _channels_backward_launch(g, x, channel, place, passed), 1,
        ),
        Work(
            "apply_gates", *about, (x, channel, spatial), (x, channel, spatial),
            lambda *inputs: (apply_gates_reference(*inputs),), lambda *inputs: (kernels.apply_gates(*inputs),),
            lambda: _gates_launch(x, channel, spatial), lambda g: _gates_backward_launch(g, x, channel, spatial),
        ),
    ]  # fmt: skip


def feature_works(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Work]:
    """Norms, poolings and gates on features (C, H, W) of a conditioner, C a multiple of 8."""
    c, h, w = shape
    kind: dict[str, Any] = {"dtype": dtype, "device": device}
    x, residual = (torch.randn(batch, *shape, **kind).requires_grad_() for _ in range(2))
    gamma, beta = (torch.randn(CLASSES, c, device=device).requires_grad_() for _ in range(2))
    tables = (gamma, beta, torch.arange(batch, device=device) % CLASSES)
    keys = torch.arange(batch, dtype=torch.int32, device=device)
    channel = torch.randn(batch, c, **kind).requires_grad_()
    spatial = torch.randn(batch, 1, h, w, **kind).requires_grad_()
    return [
        _norm("norm_film_act", x, tables, None, None),
        _norm("norm_film_act +residual", x, tables, residual, None),
        _norm("norm_film_act +dropout", x, tables, None, keys),
        *_pools(x, channel, spatial),
    ]


def head_works(shape: Shape, batch: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Work]:
    """The heads of the classification conditioner with their coupling, a checkerboard of active pixels; products included."""
    n = shape[0] * shape[1] * shape[2]
    x = torch.randn(batch, *shape, device=device).requires_grad_()
    features = tuple(torch.randn(batch, HEAD_FEATURES, dtype=dtype, device=device).requires_grad_() for _ in range(2))
    weights = tuple((torch.randn(n, HEAD_FEATURES, device=device) / HEAD_FEATURES).requires_grad_() for _ in range(2))
    tables = tuple(torch.randn(CLASSES, n, device=device).requires_grad_() for _ in range(2))
    rows = torch.arange(batch, device=device) % CLASSES
    mask = (torch.arange(n, device=device) % 2 == 0).view(shape)
    pixels = torch.cat((torch.arange(1, n, 2, device=device), torch.arange(0, n, 2, device=device))).to(torch.int32)
    order = PixelOrder(pixels, n // 2)
    heads: Any = (*features, *weights, *tables)
    nothing = x.detach().new_empty(0)

    def definition(x: Tensor, *rest: Any) -> Tensors:
        return coupling_head_reference(x, rest[:2], rest[2:4], rest[4:6], rest[6], rest[7], BOUND, False)

    def composite(*inputs: Tensor) -> Tensors:
        y, logdet = definition(*inputs[:9])
        return y, logdet, finish_step_reference(y, inputs[9], None, False, dtype)[1]

    def public(x: Tensor, *rest: Any) -> Tensors:
        pairs: Any = (rest[:2], rest[2:4], rest[4:6])
        if len(rest) == 8:
            return kernels.coupling_head(x, *pairs, *rest[6:], bound=BOUND, order=order)
        return kernels.coupling_head_step(x, *pairs, *rest[6:], bound=BOUND, dtype=dtype, order=order)

    def work(name: str, following: Tensor | None, plain: Callable[..., Tensors]) -> Work:
        def backward(gy: Tensor, gl: Tensor, gm: Tensor = nothing) -> None:
            _head_backward_launch(gy, gl, gm, nothing, x, *heads, rows, mask, *order, following, None, BOUND, False)

        inputs = (x, *heads, rows, mask) if following is None else (x, *heads, rows, mask, following)
        # Neither the shift nor what makes it is needed again, but its features are, by the gradient of its weights.
        saved = (x, *heads[:5], *inputs[7:])
        return Work(
            name, shape, str(dtype).removeprefix("torch."), inputs, saved, plain, public,
            lambda: _head_launch(x, *heads, rows, mask, *order, following, None, BOUND, False, dtype, False), backward,
        )  # fmt: skip

    return [work("coupling_head", None, definition), work("coupling_head_step", ~mask, composite)]


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
    sizes = [output.numel() * output.element_size() for output in outputs]
    needed = touched_bytes(work.inputs) + sum(sizes[: len(sizes) - work.handed_on])
    return needed + touched_bytes(work.saved) + sum(sizes) + touched_bytes(work.leaves) if backward else needed


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
    """Every op at its shapes and every half-step's coupling at the paper's; ops have no `steps`."""
    found = []
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            cases = [("", work) for shape in OP_SHAPES for work in op_works(shape, batch, dtype)]
            cases += [("", work) for shape in FEATURE_SHAPES for work in feature_works(shape, batch, dtype)]
            cases += [("", work) for shape in OP_SHAPES for work in head_works(shape, batch, dtype)]
            cases += [(steps, work) for steps, shape in PAPER_SHAPES.items() for work in half_steps(shape, batch, dtype)]
            found += [count(work, backward, steps) for steps, work in cases for backward in (False, True)]
    return found


# -- whole half-steps -----------------------------------------------------------------------------------------------------

TASKS = ("classification", "generation")
# One step of each of the paper's shapes.
STEPS = (0, 5, 8, 11, 14, 17, 20)
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
LAUNCHERS: dict[str, Callable[..., Any]] = {
    "affine_coupling": _coupling_launch,
    "affine_coupling_backward": _coupling_backward_launch,
    "norm_film_act": _norm_launch,
    "norm_film_act_backward": _norm_backward_launch,
    "pool_pixels": _pixels_launch,
    "pool_pixels_backward": _pixels_backward_launch,
    "pool_channels": _channels_launch,
    "pool_channels_backward": _channels_backward_launch,
    "apply_gates": _gates_launch,
    "apply_gates_backward": _gates_backward_launch,
    "coupling_head": _head_launch,
    "coupling_head_backward": _head_backward_launch,
}
HEAD_OPERANDS = {"scale_features_ptr", "shift_features_ptr", "scale_weight_ptr", "shift_weight_ptr", "dweight_ptr"}


class HalfStepCounter(Counter):
    """Counts apart from convolutions and matrix products, whose bytes it adds up in `products`.

    An op of the package runs its launcher and counts as what that starts.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        library, _, name = func._schema.name.partition("::")
        if library == "fastflow":
            with recording() as launches, self:
                result = LAUNCHERS[name](*args, **(kwargs or {}))
            for launch in launches:
                self._add(launch)
            return result
        if library == "aten" and name in PRODUCTS:
            result = func(*args, **(kwargs or {}))
            self.products += _bytes_of(func, args, kwargs or {}, result)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, launch: Launch) -> None:
        tensors = {name: value for name, value in launch.arguments.items() if isinstance(value, Tensor)}
        head = launch.kernel in ("_head_fwd_kernel", "_head_bwd_kernel")
        operands = [value for name, value in tensors.items() if head and name in HEAD_OPERANDS]
        moved, products = touched_bytes(tensors.values()), touched_bytes(operands)
        self.products += products
        self.bytes += moved - products
        self.launches += 1


def _plain_norm(
    norm: NormFiLM, x: Tensor, tables: Modulation, rows: Tensor, residual: Tensor | None = None, drop: Drop | None = None
) -> Tensor:
    y = norm_film_act_reference(x, norm.groups, tables.gamma, tables.beta, rows, residual, 1e-5)
    return y if drop is None else torch.native_dropout(y, drop.dropout, True)[0]


def _plain_fusion(block: generation.GlobalFusion, x: Tensor) -> Tensor:
    added: Tensor = block.up(F.gelu(block.down(average_pixels_reference(x))))
    return x + added[:, :, None, None]


def _plain_context(block: generation.GlobalContext, x: Tensor) -> Tensor:
    gate = torch.sigmoid(block.up(F.relu(block.down(average_pixels_reference(x)))))
    return x * (1.0 + gate)[:, :, None, None]


def _plain_aspp(block: generation.ASPP, x: Tensor) -> Tensor:
    pyramid = torch.cat([branch(x) for branch in block.branches], dim=1)
    gate = torch.sigmoid(block.up(F.relu(block.down(average_pixels_reference(pyramid)))))
    out: Tensor = block.output(pyramid * gate[:, :, None, None])
    return out


# The models choose other forms for a CPU, on which these fake tensors are.
ON_GPU: tuple[tuple[Any, str, Callable[..., Any]], ...] = tuple(
    (module, "on_cpu", lambda x: False) for module in (blocks, generation)
)
PLAIN: tuple[tuple[Any, str, Callable[..., Any]], ...] = (
    *ON_GPU,
    (generation.ASPP, "forward", _plain_aspp),
    (generation.GlobalFusion, "forward", _plain_fusion),
    (generation.GlobalContext, "forward", _plain_context),
    (NormFiLM, "forward", _plain_norm),
)


@contextlib.contextmanager
def fused_form() -> Iterator[None]:
    """The models run as on a GPU."""
    with contextlib.ExitStack() as stack:
        for place, name, form in ON_GPU:
            stack.enter_context(mock.patch.object(place, name, form))
        yield


@contextlib.contextmanager
def plain_form() -> Iterator[None]:
    """The models run in plain ATen ops."""
    before = kernels.get_backend()
    kernels.set_backend("reference")
    try:
        with contextlib.ExitStack() as stack:
            for place, name, form in PLAIN:
                stack.enter_context(mock.patch.object(place, name, form))
            yield
    finally:
        kernels.set_backend(before)


class HalfStep(NamedTuple):
    """A half of a step in training: `masked` (B, C, H, W) is the conditioner's input, made with x by what came before."""

    net: ClassificationConditioner | GenerationConditioner
    x: Tensor
    masked: Tensor
    tables: Tables
    rows: Tensor
    passive: Passive
    then: Then

    @property
    def leaves(self) -> Tensors:
        films = [table for film in self.tables.films for table in film]
        return (self.x, self.masked, *films, *self.tables.heads, *self.net.parameters())

    def run(self) -> Tensors:
        """(y, logdet, the next masked input)."""
        keys = self.net.draw_keys(len(self.x), self.x.device)
        driven = self.net.encode(self.masked, self.tables, self.rows, keys)
        y, logdet, masked = self.net.couple(self.x, driven, self.tables, self.rows, self.passive, BOUND, False, self.then)
        assert masked is not None
        return y, logdet, masked

    def run_plain(self) -> Tensors:
        """`run` in plain ATen ops: dropout draws for itself."""

        def placeholders(batch: int, device: torch.device) -> Tensor | None:
            return torch.empty(3, batch) if self.net.training else None

        with plain_form(), mock.patch.object(self.net, "draw_keys", placeholders):
            return self.run()


def _autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def half_step(config: FlowConfig, step: int, batch: int, dtype: torch.dtype = torch.float32) -> HalfStep:
    """The first half of a step of a model, with random inputs; in training mode."""
    shape = config.step_shapes[step]
    kind = ClassificationConditioner if config.task == "classification" else GenerationConditioner
    net = kind(config, step, shape).train()
    x, masked = torch.randn(batch, *shape), torch.randn(batch, *shape, dtype=dtype)
    with torch.no_grad(), _autocast(dtype):
        films, heads = net.tables(torch.arange(config.num_classes))
    films = tuple(Modulation(*(table.requires_grad_() for table in film)) for film in films)
    tables = Tables(films, tuple(table.requires_grad_() for table in heads))
    n = masked[0].numel()
    pixels = torch.arange(n, dtype=torch.int32)
    passive = pixels.view(shape) % 2 == 0
    order = PixelOrder(torch.cat((pixels[1::2], pixels[::2])), n // 2)
    rows = torch.arange(batch) % config.num_classes
    inputs = (x.requires_grad_(), masked.requires_grad_())
    return HalfStep(net, *inputs, tables, rows, Passive(passive, order), Then(~passive))


class StepRow(NamedTuple):
    """One whole half-step: bytes and launches outside of convolutions and products, and the bytes of those."""

    task: str
    step: int
    shape: str
    dtype: str
    passes: str
    fused: Cost
    plain: Cost
    fused_products: int
    plain_products: int

    @property
    def over_launches(self) -> float:
        return self.fused.launches / self.plain.launches

    @property
    def over_bytes(self) -> float:
        return self.fused.bytes / self.plain.bytes

    @property
    def over_all(self) -> float:
        """Bytes with those of convolutions and products."""
        return (self.fused.bytes + self.fused_products) / (self.plain.bytes + self.plain_products)

    def misses(self) -> list[str]:
        """The targets that this row does not meet."""
        over = []
        if self.over_launches > MAX_LAUNCHES_OVER_PLAIN:
            over.append(f"{self.over_launches:.2f} of the launches")
        if self.over_bytes > MAX_BYTES_OVER_PLAIN:
            over.append(f"{self.over_bytes:.2f} of the bytes")
        return over


def _both_passes(case: HalfStep, run: Callable[[], Tensors], dtype: torch.dtype) -> list[tuple[Cost, int]]:
    """(cost, bytes of products) of a forward pass, and of a forward and a backward pass."""
    with HalfStepCounter() as counter, _autocast(dtype):
        outputs = run()
    found = [(Cost(counter.bytes, counter.launches), counter.products)]
    grads = [torch.empty_like(output) for output in outputs]
    with counter:
        torch.autograd.grad(outputs, case.leaves, grads, allow_unused=True)
    return [*found, (Cost(counter.bytes, counter.launches), counter.products)]


def count_half_step(task: Any, step: int, batch: int, dtype: torch.dtype) -> list[StepRow]:
    """The rows of one half-step of the paper's model, forward and with its backward pass; under `FakeTensorMode`."""
    config = FlowConfig.paper(CLASSES, task)
    case = half_step(config, step, batch, dtype)
    with _kernels_chosen(), fused_form():
        fused = _both_passes(case, case.run, dtype)
    plain = _both_passes(case, case.run_plain, dtype)
    about = (task, step, "x".join(map(str, config.step_shapes[step])), str(dtype).removeprefix("torch."))
    return [
        StepRow(*about, passes, ours, theirs, our_products, their_products)
        for passes, (ours, our_products), (theirs, their_products) in zip(PASSES, fused, plain, strict=True)
    ]


def step_rows(batch: int, steps: Iterable[int] = STEPS) -> list[StepRow]:
    """Whole half-steps of both conditioners at some steps of the paper's layout, those of all its shapes by default."""
    with FakeTensorMode():
        return [
            row
            for dtype in (torch.float32, torch.bfloat16)
            for task in TASKS
            for step in steps
            for row in count_half_step(task, step, batch, dtype)
        ]


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
        f"Targets for half-steps outside of their conditioner, counted: moved <= {MAX_OVER_NEEDED} x needed, and <= 1/3 of the "
        f"composite. {total - len(missed)} of {total} rows meet both" + ("; these miss:" if missed else ".")
    )
    for row, over in missed:
        console.print(f"  {row.name} {row.shape} {row.dtype} {row.passes}: {', '.join(over)}")
    if missed:
        console.print("A mix of several channels is a launch of its own: it reads again what the coupling has written.")


STEP_HEADINGS = (
    "conditioner", "step", "shape", "dtype", "pass", "launches", "plain launches", "ratio", "MB", "plain MB", "bytes ratio",
    "products MB", "plain products MB", "ratio with products",
)  # fmt: skip


def _step_cells(row: StepRow) -> list[str]:
    sizes = [f"{value / 1e6:.2f}" for value in (row.fused.bytes, row.plain.bytes, row.fused_products, row.plain_products)]
    launches = [str(row.fused.launches), str(row.plain.launches), f"{row.over_launches:.3f}"]
    return [*map(str, row[:5]), *launches, *sizes[:2], f"{row.over_bytes:.3f}", *sizes[2:], f"{row.over_all:.3f}"]


def _print_steps(console: Console, batch: int, found: list[StepRow]) -> None:
    table = Table(title=f"\nWhole half-steps, counted at batch {batch}", title_justify="left", box=None, padding=(0, 1))
    for i, heading in enumerate(STEP_HEADINGS):
        table.add_column(heading, justify="left" if i < 5 else "right", no_wrap=i < 5)
    for row in found:
        table.add_row(*_step_cells(row))
    console.print(table)
    missed = [(row, over) for row in found if (over := row.misses())]
    console.print(
        "Targets for whole half-steps, counted outside of convolutions and matrix products: at most "
        f"{MAX_LAUNCHES_OVER_PLAIN} of the plain launches and {MAX_BYTES_OVER_PLAIN} of the plain bytes. "
        f"{len(found) - len(missed)} of {len(found)} rows meet both" + ("; these miss:" if missed else ".")
    )
    for row, over in missed:
        console.print(f"  {row.task} {row.shape} {row.dtype} {row.passes}: {', '.join(over)}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Counted bytes and launches, and bounds from them. Measures no time.")
    parser.add_argument("--batch", type=int, default=16, help="samples (default: %(default)s)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write the table to a file")
    args = parser.parse_args()
    found, steps = rows(args.batch), step_rows(args.batch)
    console = Console(width=200, highlight=False)
    note = f"counted at batch {args.batch}; bound = moved bytes / bandwidth (A100 2039, H100 3350, H200 4800 GB/s)"
    _print_table(console, f"Ops, {note}", [row for row in found if not row.half_step])
    _print_table(console, f"\nHalf-steps outside of their conditioner, {note}", [row for row in found if row.half_step])
    _print_targets(console, found)
    _print_steps(console, args.batch, steps)
    if args.csv:
        with args.csv.open("w", newline="") as file:
            csv.writer(file).writerows([HEADINGS, *map(_cells, found), STEP_HEADINGS, *map(_step_cells, steps)])


if __name__ == "__main__":
    main()
