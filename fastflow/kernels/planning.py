"""Launch plans of public functions and ops: which call is the repetition of an earlier one.

Where a GPU is fast, Python is what a step waits for: checks, `torch.library` and Triton's own look-up take
many times as long as the C call that starts a kernel. All that they find out depends on the arguments'
shapes, strides, dtypes, devices and alignment, and on the numbers among the arguments. A function under
`planned` therefore keeps what it did, keyed by exactly these, and does it again (`triton.plans`):

* with no gradient asked for, the allocations and launches of the whole call, checks left out since the key
  implies them;
* with one asked for, the `autograd.Function` that the call ends in and its inputs (`watching`).

A key is planned when it comes the second time. Values that are checked are looked at in every call
(`watching.check_values`). Streams are asked for in every call, and a captured CUDA graph holds the same
launches.

The normal path is taken, and nothing kept, where no kernel was launched; under dispatch modes, functorch,
`torch.compile` and export (whose graphs hold the registered op); for tensor subclasses and for a tensor that
is given twice; under `recording`, in the interpreter and with autotuning; while Triton has launch hooks; on
AMD GPUs; and where a plan cannot repeat the call. `MAX_PLANS` bounds what is kept: beyond it all is dropped
and made anew.
"""

from __future__ import annotations

import functools
import inspect
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton.plans import getter, must_be_seen
from fastflow.kernels.watching import MISS, RepeatedFunction, RepeatedLaunches, is_inner, watch

P = ParamSpec("P")
R = TypeVar("R")

# Training, scoring and sampling of a paper-size model take a few hundred plans, of a few kilobytes each.
MAX_PLANS = 4096
# More kinds of tensors behind one shape of the first one are not worth a plan.
MAX_CANDIDATES = 8

# These compare type, dispatch keys, dtype, device, sizes and strides of tensors in one call of C++.
_TensorGuards: Any = getattr(torch._C._dynamo.guards, "TensorGuards", None)
_is_tracing = torch.compiler.is_dynamo_compiling
_is_grad_enabled = torch.is_grad_enabled

# -- setting -------------------------------------------------------------------------------------------------


def _read_setting(value: str) -> bool:
    if value not in ("0", "1"):
        raise ValueError(f"FASTFLOW_LAUNCH_PLANS must be 0 or 1, got {value!r}")
    return value == "1"


_enabled = _read_setting(os.environ.get("FASTFLOW_LAUNCH_PLANS", "1"))


def set_launch_plans(enabled: bool) -> None:
    """Choose whether ops on a GPU keep launch plans, see `fastflow.kernels.planning`.

    Results have the same bits either way. Those kept are dropped. The environment variable
    ``FASTFLOW_LAUNCH_PLANS`` (0 or 1) sets what a process starts with.
    """
    global _enabled
    _enabled = enabled
    clear_launch_plans()


def uses_launch_plans() -> bool:
    """Whether ops on a GPU keep launch plans."""
    return _enabled


def clear_launch_plans() -> None:
    """Drop all launch plans, as after a change of ``FASTFLOW_AUTOTUNE`` in a running process."""
    with _lock:
        _drop()


def count_launch_plans() -> int:
    """How many keys are kept, at most `MAX_PLANS`."""
    return _kept


def launch_plan_refusals() -> dict[str, str]:
    """Why calls have no plan: for each function or op with such calls, the reason of the last one."""
    return dict(_refusals)


_lock = threading.Lock()
_tables: list[dict[Any, _Layout]] = []
_refusals: dict[str, str] = {}
_kept = 0


def _drop() -> None:
    global _kept
    _kept = 0
    _refusals.clear()
    for table in _tables:
        table.clear()


def _count() -> None:
    """Make room for one more; called with the lock held."""
    global _kept
    if _kept >= MAX_PLANS:
        _drop()
    _kept += 1


def _after_fork() -> None:
    """A fork may come while another thread holds the lock."""
    global _lock
    _lock = threading.Lock()
    _drop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# -- what is kept --------------------------------------------------------------------------------------------


class _Candidate(NamedTuple):
    """The tensors that it fits, and how the call is repeated; None where it cannot be."""

    fits: Callable[..., bool]
    repeat: RepeatedLaunches | RepeatedFunction | None


class _Layout:
    """Which of a function's arguments are tensors and which numbers, for given types of them.

    Attributes:
        tuples: places of tuples, whose items then stand among the other arguments.
        flat: the layouts of these, by lengths of the tuples and all types.
        unusual: whether calls with such types have no plans, or have `tuples`.
        tensors: takes the tensors from the arguments, as a tuple.
        scalars: takes the rest from the arguments, as a tuple.
        entries: the candidates for a shape of the first tensor, the scalars, and whether gradients are on.
    """

    __slots__ = ("entries", "flat", "scalars", "tensors", "tuples", "unusual")

    def __init__(self, values: Sequence[Any], known: bool) -> None:
        places = [i for i, value in enumerate(values) if type(value) in (Tensor, torch.nn.Parameter)]
        rest = [i for i in range(len(values)) if i not in places]
        self.tensors, self.scalars = getter(places), getter(rest)
        self.tuples = [i for i in rest if isinstance(values[i], tuple)]
        plain = (int, float, bool, type(None), torch.dtype, str)
        self.unusual = not (known and places and all(type(values[i]) in plain for i in rest))
        self.entries: dict[Any, tuple[_Candidate, ...]] = {}
        self.flat: dict[Any, _Layout] = {}


def _add_layout(
    table: dict[Any, _Layout], kind: tuple[Any, ...], values: Sequence[Any], known: bool
) -> _Layout:
    with _lock:
        _count()
        table[kind] = layout = _Layout(values, known)
    return layout


def _guard(tensors: tuple[Tensor, ...]) -> Callable[..., bool]:
    """Whether tensors have the types, dispatch keys, dtypes, devices, sizes and strides of these.

    Dispatch keys include those of modes, functorch, tracing and inference. Whether a tensor requires
    gradients is compared, whether gradients are enabled is not.
    """
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    fits: Callable[..., bool] = guards.check
    return fits


def _can_watch(tensors: tuple[Tensor, ...]) -> bool:
    return (
        _enabled
        and _TensorGuards is not None
        and not launching.interpreted()
        and not launching.autotuned()
        and not must_be_seen()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch._C._is_tracing()
        and all(tensor.layout is torch.strided for tensor in tensors)
    )


# -- look-up -------------------------------------------------------------------------------------------------


def planned(function: Callable[P, R], direct: Callable[..., Any] | None = None) -> Callable[P, R]:
    """Let calls of a function of tensors, numbers and tuples of them be repeated from launch plans.

    Args:
        function: what is called.
        direct: does the same without `torch.library`, through which a recorder does not see; `function`
            itself when None.
    """
    table: dict[Any, _Layout] = {}
    _tables.append(table)
    names: frozenset[str] = frozenset() if direct else frozenset(inspect.signature(function).parameters)
    seen = direct or function

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _is_tracing() or not launching.has_launched or not _enabled:
            return function(*args, **kwargs)
        values: Sequence[Any] = (*args, *kwargs.values()) if kwargs else args
        kind: tuple[Any, ...] = (*kwargs, *map(type, values))
        layout = table.get(kind)
        if layout is None or layout.unusual:
            values, layout = prepare(values, kind, names.issuperset(kwargs))
            if layout.unusual:
                return seen(*args, **kwargs) if is_inner() else function(*args, **kwargs)
        tensors = layout.tensors(values)
        key = tensors[0].shape, layout.scalars(values), _is_grad_enabled()
        repeat: Any = MISS
        for fits, found in layout.entries.get(key, ()):
            if fits(*tensors):
                repeat = found
                break
        if repeat is not None and repeat is not MISS:
            out = repeat(tensors)
            if out is not MISS:
                return out
        return miss(args, kwargs, layout, key, tensors, repeat)

    def prepare(values: Sequence[Any], kind: tuple[Any, ...], known: bool) -> tuple[Any, _Layout]:
        """The arguments, flat where tuples are among them, and their layout."""
        layout = table.get(kind) or _add_layout(table, kind, values, known)
        if not layout.tuples:
            return values, layout
        flat: list[Any] = []
        lengths, start = [], 0
        for place in layout.tuples:
            items = values[place]
            lengths.append(len(items))
            flat += values[start:place]
            flat += items
            start = place + 1
        flat += values[start:]
        kind = (*lengths, *map(type, flat))
        return flat, layout.flat.get(kind) or _add_layout(layout.flat, kind, flat, known)

    def miss(
        args: Any, kwargs: Any, layout: _Layout, key: Any, tensors: tuple[Tensor, ...], repeat: Any
    ) -> Any:
        """The normal path, watched when the key comes the second time."""
        if is_inner():
            return seen(*args, **kwargs)
        candidates = layout.entries.get(key)
        if candidates is None:
            with _lock:
                _count()
                layout.entries[key] = ()
            return function(*args, **kwargs)
        full = repeat is MISS and len(candidates) >= MAX_CANDIDATES
        if repeat is None or full or not _can_watch(tensors):
            return function(*args, **kwargs)
        result, found, refusal = watch(lambda: seen(*args, **kwargs), tensors)
        with _lock:
            _count()
            if found is None:
                _refusals[function.__name__] = refusal
            if isinstance(repeat, RepeatedLaunches):
                if found is not None:
                    repeat.join(found)
            else:
                candidates = layout.entries.get(key, ())
                layout.entries[key] = (*candidates, _Candidate(_guard(tensors), found))
        return result

    return call
