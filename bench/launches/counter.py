"""Counts launches by class, direction and kind, and finds the class of an op of a backward pass."""

from __future__ import annotations

import bisect
import collections
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from bench.fake_gpu.tensors import frames, has_no_fake_form, host_answer
from bench.launches.classes import ADDS, REST, kernel_class, model_class
from bench.roofline.counting import Counter, Launch

GEMMS = ("mm", "addmm", "bmm", "baddbmm")
# Tensors that a kernel over one, two, ... lists takes (ATen/native/cuda/MultiTensorApply.cuh).
TENSORS_OF_A_KERNEL = (110, 64, 48, 36, 30)


class Key(NamedTuple):
    """A group of launches that are counted together."""

    name: str
    direction: str
    kind: str


class LaunchCounter(Counter):
    """Counts the launches of the ops that run inside it.

    A backward op has the class of the forward op that made its node: nodes are numbered by each thread, and
    the counter notes at every op which numbers were given since the op before. Nodes that a backward pass
    makes itself, where it computes a step again, are numbered by the thread of that pass.

    Attributes:
        direction: of the launches to come, ``"forward"`` or ``"backward"``.
        found: the launches.
        kernels: those on the device, where they are more.
        names: of kernels and ops, by class.
    """

    def __init__(self) -> None:
        super().__init__()
        self.direction = "forward"
        self.found: collections.Counter[Key] = collections.Counter()
        self.kernels: collections.Counter[Key] = collections.Counter()
        self.names: collections.Counter[tuple[str, str, str]] = collections.Counter()
        self._main = threading.get_ident()
        # By thread: the first number that no op has seen, and the class of each number before it.
        self._ends: dict[int, list[int]] = {}
        self._classes: dict[int, list[str]] = {}
        self._class = REST
        self._kernels = 1
        self._on_gpu = False

    def clear(self) -> None:
        """Forget the launches so far."""
        self.found.clear()
        self.kernels.clear()
        self.names.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        if name == "aten::_local_scalar_dense":
            return host_answer(args[0])
        if has_no_fake_form(name):
            self._class = self._class_of_op()
            self._note("other", name.removeprefix("aten::"), device_kernels(name, args))
            return None
        if torch._C._current_autograd_node() is not None:
            self.direction = "backward"
        self._class, self._kernels = self._class_of_op(), device_kernels(name, args)
        if name in ("aten::add", "aten::add_") and self._by_engine():
            self._class = ADDS
        self._on_gpu = is_on_gpu(args, kwargs or {})
        return super().__torch_dispatch__(func, types, args, kwargs)

    def add_op(self, name: str, moved: int) -> None:
        """Count one ATen op."""
        super().add_op(name, moved)
        if moved > 0 and self._on_gpu:
            kind = "conv" if name.startswith("convolution") else "gemm" if name in GEMMS else "other"
            self._note(kind, name, self._kernels)

    def add_launch(self, op: str, args: tuple[Any, ...], launch: Launch) -> None:
        """Count one launch of the kernels of an op, which got `args`."""
        super().add_launch(op, args, launch)
        self._class = self._class_of_op()
        self._note("triton", launch.kernel, 1)

    def _note(self, kind: str, name: str, kernels: int) -> None:
        key = Key(self._class, self.direction, kind)
        self.found[key] += 1
        self.kernels[key] += kernels
        self.names[self._class, self.direction, name] += 1

    # -- classes -----------------------------------------------------------------------------------------

    def _class_of_op(self) -> str:
        node = torch._C._current_autograd_node()
        by_model, by_kernel, nested = _by_frames()
        name = by_model or by_kernel or REST
        if node is not None and not by_model:
            name = self._class_of_node(node, bool(by_kernel), nested)
        elif node is None and self.direction == "backward" and not by_model:
            name = ADDS
        self._number_nodes(name)
        return name

    def _class_of_node(self, node: Any, in_kernel: bool, nested: bool) -> str:
        # A node of Python that runs no code of ours any more has ended, and the engine adds what it gave.
        ended = isinstance(node, torch.autograd.function.BackwardCFunction) and not _in_function()
        if "AccumulateGrad" in node.name() or (nested and ended):
            return ADDS
        thread = threading.get_ident() if nested else self._main
        ends = self._ends.get(thread, [])
        at = bisect.bisect_right(ends, node._sequence_nr())
        return self._classes[thread][at] if at < len(ends) else REST

    def _by_engine(self) -> bool:
        # Formulas of torch's own nodes add nothing, so that an add is the engine's: of the gradients of a
        # tensor that several ops read.
        return self.direction == "backward" and not any(_by_frames()[:2]) and not _in_function()

    def _number_nodes(self, name: str) -> None:
        thread, end = threading.get_ident(), torch.autograd._get_sequence_nr()
        ends = self._ends.setdefault(thread, [])
        if not ends or end > ends[-1]:
            ends.append(end)
            self._classes.setdefault(thread, []).append(name)


def is_on_gpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op takes a tensor on the GPU or makes one there."""
    device = kwargs.get("device")
    given = any(
        leaf.device.type == "cuda" for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
    )
    return given or (device is not None and torch.device(device).type == "cuda")


def _by_frames() -> tuple[str, str, bool]:
    """The class by a model's frames, by an op's own, and whether a call of the engine lies around."""
    by_kernel = ""
    for frame in frames():
        code = frame.f_code
        if code.co_name == "_engine_run_backward":
            return "", by_kernel, True
        if name := model_class(code):
            return name, by_kernel, False
        by_kernel = by_kernel or kernel_class(code)
    return "", by_kernel, False


def _in_function() -> bool:
    """Whether the innermost call of the engine runs a function of Python."""
    for frame in frames():
        if frame.f_code.co_name == "_engine_run_backward":
            return False
        if frame.f_code.co_qualname == "BackwardCFunction.apply":
            return True
    return False


def device_kernels(name: str, args: tuple[Any, ...]) -> int:
    """Kernels of one op on a device: a bias and each gradient of a convolution take one.

    An op on lists takes as many tensors at a time as fit into the arguments of a kernel; large tensors take
    more kernels than are counted.
    """
    if name.startswith(("aten::_foreach_", "aten::_fused_")):
        lists = [argument for argument in args if isinstance(argument, (list, tuple)) and argument]
        return -(-len(lists[0]) // TENSORS_OF_A_KERNEL[min(len(lists), len(TENSORS_OF_A_KERNEL)) - 1])
    if name == "aten::convolution":
        return 1 + (args[2] is not None)
    if name == "aten::convolution_backward":
        return sum(args[-1])
    return 1
