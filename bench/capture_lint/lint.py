"""The lint: a mode of dispatch that notes what cannot be captured, and goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.fake_gpu.tensors import (
    ROOT,
    frames,
    has_no_fake_form,
    host_answer,
    is_ours,
    own_frames,
    source_line,
)
from bench.roofline.counting import run_launcher, storage_of

WAIT, COPY, SHAPE, RANDOM, VALUE = "host wait", "blocking copy", "shape by values", "host draw", "host value"
INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class Finding(NamedTuple):
    """Something that a graph cannot hold.

    Attributes:
        kind: `WAIT`, `COPY`, `SHAPE`, `RANDOM` or `VALUE`.
        place: file and line of the innermost code of this repository.
        line: the line of source, or the node of autograd whose own code it is.
        detail: the op and what it does.
    """

    kind: str
    place: str
    line: str
    detail: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind}: {self.detail}: {self.line}"


class CannotGoOnError(Exception):
    """An op, which is a finding, has a result that fake tensors cannot stand in for."""


class CaptureLint(TorchDispatchMode):
    """Notes what a CUDA graph cannot hold of the ops that run inside it.

    Attributes:
        findings: each with the number of times that it occurred.
    """

    def __init__(self) -> None:
        super().__init__()
        self.findings: dict[Finding, int] = {}
        self._pinned: set[int] = set()

    def note(self, kind: str, detail: str) -> None:
        """Note a finding at the place of the caller."""
        finding = Finding(kind, *_place(), detail)
        self.findings[finding] = self.findings.get(finding, 0) + 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("fastflow::"):
            return run_launcher(self, name.removeprefix("fastflow::"), args, kwargs)[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = any(tensor.device.type == "cuda" for tensor in tensors)
        if name == "aten::_local_scalar_dense":
            if on_gpu:
                self.note(WAIT, "a value of the device is asked for")
            return host_answer(args[0])
        if has_no_fake_form(name):
            if func._overloadname != "tensor_lr":
                self.note(VALUE, f"{_short(name)} gets its learning rate as a number")
            return None
        if name in ("aten::_to_copy", "aten::copy_"):
            self._check_copy(name, args, kwargs)
        decides = on_gpu and _values_decide_shape(func, args)
        if decides:
            self.note(SHAPE, f"{_short(name)} gives as many elements as values say")
        elif on_gpu and torch.Tag.data_dependent_output in func.tags:
            self.note(WAIT, f"{_short(name)} answers the host")
        try:
            result = func(*args, **kwargs)
        except (DynamicOutputShapeException, DataDependentOutputException):
            result = self._stand_in(name, args)
        self._check_draw(func, result)
        self._remember_pinned(kwargs, result)
        return result

    def _stand_in(self, name: str, args: tuple[Any, ...]) -> Tensor | bool:
        """A result in place of one whose size values decide: that of all elements."""
        x = args[0]
        if name == "aten::equal":
            return True
        if name == "aten::nonzero":
            return torch.empty(x.numel(), x.ndim, dtype=torch.int64, device=x.device)
        if name in ("aten::masked_select", "aten::index"):
            return x.new_empty(x.numel())
        self.note(SHAPE, f"the lint cannot go on after {_short(name)}")
        raise CannotGoOnError

    def _check_copy(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        source = args[1] if name == "aten::copy_" else args[0]
        if name == "aten::copy_":
            target = args[0].device.type
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        else:
            device = kwargs.get("device")
            target = source.device.type if device is None else torch.device(device).type
            waits = not kwargs.get("non_blocking", False)
        if source.device.type == target:
            return
        count = source.numel() * source.element_size()
        if source.device.type == "cpu" and storage_of(source) not in self._pinned:
            self.note(COPY, f"{count} bytes from memory that is not page-locked to {target}")
        elif waits:
            self.note(COPY, f"{count} bytes from {source.device.type} to {target} without non_blocking")

    def _check_draw(self, func: Any, result: Any) -> None:
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return
        if any(isinstance(leaf, Tensor) and leaf.device.type == "cpu" for leaf in tree_leaves(result)):
            self.note(RANDOM, f"{_short(func._schema.name)} on the host, which a replay repeats")

    def _remember_pinned(self, kwargs: dict[str, Any], result: Any) -> None:
        if kwargs.get("pin_memory"):
            self._pinned |= {storage_of(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}


def lint(
    function: Callable[[], object], warm_ups: int = 1, watch: CaptureLint | None = None
) -> dict[Finding, int]:
    """The findings of a function that a CUDA graph would capture; call it within `fake_gpu`.

    Args:
        function: takes nothing, and runs on fake tensors.
        warm_ups: calls before the one that is looked at, as a capture has.
        watch: has seen the page-locked memory that the function uses; None where it uses none of before.
    """
    # Memory that is page-locked in the warm-up is known to be so in the call that is looked at.
    watch = watch or CaptureLint()

    def synchronize(device: object = None) -> None:
        watch.note(WAIT, "synchronize")

    with watch, mock.patch.object(torch.cuda, "synchronize", synchronize):
        for _ in range(warm_ups):
            with contextlib.suppress(CannotGoOnError):
                function()
        watch.findings.clear()
        capturing = mock.patch.object(torch.cuda, "is_current_stream_capturing", return_value=True)
        with capturing, contextlib.suppress(CannotGoOnError):
            function()
    return watch.findings


def _short(name: str) -> str:
    return name.removeprefix("aten::")


def _values_decide_shape(func: Any, args: tuple[Any, ...]) -> bool:
    name = func._schema.name
    if name in INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One number for all places of one mask is a fill.
        fills = name != "aten::index" and len(args[1]) == 1 and args[2].numel() == 1
        return bool(masks) and not fills
    return torch.Tag.dynamic_output_shape in func.tags


def _place() -> tuple[str, str]:
    for frame in own_frames():
        path = Path(frame.f_code.co_filename).relative_to(ROOT)
        return f"{path}:{frame.f_lineno}", source_line(frame)
    node = torch._C._current_autograd_node()
    if node is not None:
        return "autograd", f"node {node.name()}"
    outside = (f for f in frames() if "site-packages" not in f.f_code.co_filename and not is_ours(f))
    frame = next(outside)
    return f"{frame.f_code.co_filename}:{frame.f_lineno}", source_line(frame)
