"""Counts bytes and launches: ATen ops as they are dispatched, the package's ops as launches of kernels."""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastflow.kernels.registry import OPS
from fastflow.kernels.triton.launch import Launch, recording

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
OVERWRITES = {"copy_", "fill_", "zero_"}
PRODUCTS = {"convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm"}
# The ops whose kernels hold matrix products.
HEAD_OPS = ("coupling_head", "coupling_head_backward")
# Kernels that are a product from end to end, as `baddbmm` is.
PRODUCT_KERNELS = ("_map_branches_kernel", "_map_sums_kernel", "_branches_bwd_kernel")


class Cost(NamedTuple):
    """Bytes that are read and written, and launches."""

    bytes: int
    launches: int


# -- bytes ---------------------------------------------------------------------------------------------------


def touched_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct regions of memory under some tensors; an expanded dimension counts once."""
    regions: dict[int, dict[Any, int]] = {}
    sizes: dict[int, int] = {}
    for tensor in tensors:
        # Memory does not see dimensions that repeat or hold one element.
        dims = tuple((n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1 and s != 0)
        count = 0 if tensor.numel() == 0 else tensor.element_size()
        for n, _ in dims:
            count *= n
        storage = tensor.untyped_storage()
        key = storage_of(tensor)
        regions.setdefault(key, {})[tensor.storage_offset(), tensor.dtype, dims] = count
        sizes[key] = storage.nbytes()
    # Different views of one storage may overlap, but all of them lie in it.
    return sum(min(sum(found.values()), sizes[key]) for key, found in regions.items())


def storage_of(tensor: Tensor) -> int:
    """A number that tensors have in common if they share memory, and only then; fake tensors have one too."""
    return tensor.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def bytes_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """The bytes that one ATen op reads and writes."""
    name = func._schema.name.removeprefix("aten::")
    if name in ALLOCATIONS:
        return 0
    read, written = [], []
    for i, argument in enumerate(func._schema.arguments):
        found = _tensors(args[i] if i < len(args) else kwargs.get(argument.name))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += found
        if not changed or not (argument.is_out or name in OVERWRITES):
            read += found
    known = {storage_of(tensor) for tensor in read + written}
    fresh = [tensor for tensor in _tensors(result) if storage_of(tensor) not in known]
    # A view gives what it was given. Some views are not declared as such in their schema, `_unsafe_view` for
    # one.
    if not written and not fresh:
        return 0
    return touched_bytes(read) + touched_bytes(written) + touched_bytes(fresh)


def run_launcher(
    mode: TorchDispatchMode, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, list[Launch]]:
    """The result of an op of the package, and its launches; `mode` sees ATen ops that the launcher adds."""
    launcher = OPS[op].triton
    assert launcher is not None
    with recording() as launches, mode:
        return launcher(*args, **kwargs), launches


# -- counters ------------------------------------------------------------------------------------------------


class Counter(TorchDispatchMode):
    """Launches and bytes of the ops that run inside it.

    An ATen op that computes or copies is one launch. It reads each distinct region of its inputs once and
    writes its outputs once; memory that it changes in place is read and written. Views and allocations cost
    nothing. An op of the package runs its launcher, and counts as the launches of its kernels, with the ATen
    ops that the launcher adds. A launch moves each of its tensor arguments once, since its programs partition
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.launches = 0

    @property
    def cost(self) -> Cost:
        """The counts so far."""
        return Cost(self.bytes, self.launches)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        library, _, name = func._schema.name.partition("::")
        if library == "fastflow":
            return self._launch(name, args, kwargs)
        result = func(*args, **kwargs)
        self.add_op(name, bytes_of(func, args, kwargs, result))
        return result

    def _launch(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result, launches = run_launcher(self, op, args, kwargs)
        for launch in launches:
            self.add_launch(op, args, launch)
        return result

    def add_op(self, name: str, moved: int) -> None:
        """Count one ATen op."""
        self.bytes += moved
        self.launches += moved > 0

    def add_launch(self, op: str, args: tuple[Any, ...], launch: Launch) -> None:
        """Count one launch of the kernels of an op, which got `args`."""
        self.bytes += touched_bytes(_tensors(list(launch.arguments.values())))
        self.launches += 1


class HalfStepCounter(Counter):
    """Counts apart from convolutions and matrix products, whose bytes it adds up in `products`.

    Operands of the products within the kernels of the heads, and all that the pyramids' products move, count
    with the products. These kernels count as launches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def add_op(self, name: str, moved: int) -> None:
        """Count one ATen op."""
        if name in PRODUCTS:
            self.products += moved
        else:
            super().add_op(name, moved)

    def add_launch(self, op: str, args: tuple[Any, ...], launch: Launch) -> None:
        """Count one launch, the operands of its products apart."""
        tensors = _tensors(list(launch.arguments.values()))
        operands = tensors if launch.kernel in PRODUCT_KERNELS else _product_operands(op, args, tensors)
        moved, products = touched_bytes(tensors), touched_bytes(operands)
        self.products += products
        self.bytes += moved - products
        self.launches += 1


def _product_operands(op: str, args: tuple[Any, ...], tensors: list[Tensor]) -> list[Tensor]:
    """Tensors of a launch that a head's products read or write: features, weights, the weights' gradients."""
    if op not in HEAD_OPS:
        return []
    named = dict(zip(inspect.signature(OPS[op].fake).parameters, args, strict=False))
    features, weights = ([named[f"scale_{kind}"], named[f"shift_{kind}"]] for kind in ("features", "weight"))
    if not any(storage_of(weight) in map(storage_of, tensors) for weight in weights):
        # The launch joins sums of an earlier one and multiplies nothing.
        return []
    given = {storage_of(tensor) for tensor in (*features, *weights)}
    return [t for t in tensors if storage_of(t) in given or t.shape == weights[0].shape]


@contextlib.contextmanager
def kernels_chosen() -> Iterator[None]:
    """Lets ops choose kernels for tensors on a CPU, as under the interpreter; recorded kernels do not run."""
    # Triton stays what it is at its first import, compiler or interpreter, and `bench/test_ops.py` launches
    # kernels later.
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


def two_passes(
    counter: Counter, run: Callable[[], tuple[Tensor, ...]], leaves: Iterable[Tensor]
) -> Iterator[tuple[Cost, tuple[Tensor, ...]]]:
    """Run forward, then backward to `leaves`; gives the counter's cost after each, and the outputs."""
    with counter:
        outputs = run()
    yield counter.cost, outputs
    with torch.no_grad():
        grads = [torch.empty_like(output) for output in outputs]
    with counter:
        torch.autograd.grad(outputs, list(leaves), grads, allow_unused=True)
    yield counter.cost, outputs
