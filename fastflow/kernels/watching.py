"""Watching a call to learn how it is repeated: by launches where autograd does not record it, else by its
`autograd.Function`.

`fastflow.kernels.planning` decides which calls are watched and finds the repetition of one.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.triton import launch as launching
from fastflow.kernels.triton.plans import Plan, data_ptr, getter, must_be_seen
from fastflow.kernels.triton.recorder import Recorder

Check = tuple[Callable[..., None], int, tuple[Any, ...]]

# A repetition returns this where it does not know the tensors' alignment, or somebody watches launches.
MISS: Any = object()

# -- repetitions ---------------------------------------------------------------------------------------------


class RepeatedLaunches:
    """Plans without gradients, one for each alignment of the tensors."""

    __slots__ = ("_aligned", "_checks", "_others")

    def __init__(self, recorder: Recorder, tensors: tuple[Tensor, ...], plan: Plan) -> None:
        self._checks = tuple(recorder.checks)
        alignment = tuple([tensor.data_ptr() & 15 for tensor in tensors])
        self._aligned = None if any(alignment) else plan
        self._others = {alignment: plan} if any(alignment) else {}

    def join(self, other: RepeatedLaunches) -> None:
        """Take the plan of the same call with another alignment."""
        self._aligned = other._aligned or self._aligned
        self._others |= other._others

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        if must_be_seen():
            return MISS
        for check, place, rest in self._checks:
            check(tensors[place], *rest)
        addresses = [*map(data_ptr, tensors)]
        # Triton builds a kernel of its own for addresses that are multiples of 16.
        if functools.reduce(operator.or_, addresses) & 15:
            plan = self._others.get(tuple([address & 15 for address in addresses]))
        else:
            plan = self._aligned
        return MISS if plan is None else plan(tensors, addresses)


class RepeatedFunction:
    """The call of an `autograd.Function`."""

    __slots__ = ("_apply", "_checks", "_constants", "_inputs", "_is_tuple", "_outputs")

    def __init__(self, observer: _Observer, result: Any) -> None:
        """Raises LookupError where the call is more than the Function."""
        ((function, arguments, out),) = observer.calls
        tensors = observer.inputs
        results = result if type(result) is tuple else (result,)
        self._constants = tuple(value for value in arguments if not isinstance(value, Tensor))
        constants = iter(range(len(tensors), len(tensors) + len(self._constants)))
        self._inputs = getter(
            [_index(tensors, v) if isinstance(v, Tensor) else next(constants) for v in arguments]
        )
        outs = out if isinstance(out, tuple) else (out,)
        self._outputs = getter([_index((*outs, *tensors), value) for value in results])
        self._apply = function.apply
        self._checks, self._is_tuple = tuple(observer.checks), type(result) is tuple

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        for check, place, rest in self._checks:
            check(tensors[place], *rest)
        out = self._apply(*self._inputs((*tensors, *self._constants)))
        results = self._outputs((*out, *tensors) if isinstance(out, tuple) else (out, *tensors))
        return results if self._is_tuple else results[0]


def _index(values: tuple[Any, ...], wanted: Any) -> int:
    for index, value in enumerate(values):
        if value is wanted:
            return index
    raise LookupError("the call does more than its autograd.Function")


# -- watching a call -----------------------------------------------------------------------------------------


class _Observer:
    """Notes the `autograd.Function` of a call that autograd records, and the checks of values."""

    def __init__(self, inputs: tuple[Tensor, ...]) -> None:
        self.inputs = inputs
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []
        self._checks: list[tuple[Callable[..., None], Tensor, tuple[Any, ...]]] = []

    @property
    def checks(self) -> list[Check]:
        """(function, index of an input, further arguments) of each check of values."""
        return [(function, _index(self.inputs, value), rest) for function, value, rest in self._checks]

    def note_check(self, function: Callable[..., None], value: Tensor, rest: tuple[Any, ...]) -> None:
        function(value, *rest)
        self._checks.append((function, value, rest))

    def note_launch(self, *launch: Any) -> None:
        """Launches belong to the op inside, which has a plan of its own."""


def check_values(function: Callable[..., None], value: Tensor, *rest: Any) -> None:
    """Call ``function(value, *rest)``, a check of a tensor's values, now and whenever a plan is used."""
    if torch.compiler.is_dynamo_compiling() or launching.observed.watcher is None:
        function(value, *rest)
    else:
        launching.observed.watcher.note_check(function, value, rest)


def differentiate(function: Any, *inputs: Any) -> Any:
    """``function.apply(*inputs)`` of an `autograd.Function`.

    The numbers among the inputs must depend on shapes and numbers of the public call alone.
    """
    out = function.apply(*inputs)
    if not torch.compiler.is_dynamo_compiling() and isinstance(launching.observed.watcher, _Observer):
        launching.observed.watcher.calls.append((function, inputs, out))
    return out


def is_inner() -> bool:
    """Whether the call is part of one that a recorder watches."""
    return isinstance(launching.observed.watcher, Recorder)


def watch(run: Callable[[], Any], tensors: tuple[Tensor, ...]) -> tuple[Any, Any, str]:
    """(result, how to repeat the call or None, why it cannot be repeated)."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    watcher: Any = _Observer(tensors) if recorded else Recorder(tensors)
    outer, launching.observed.watcher = launching.observed.watcher, watcher
    try:
        if recorded:
            result = run()
        else:
            with watcher:
                result = run()
    finally:
        launching.observed.watcher = outer
    if not recorded:
        plan = watcher.plan(result)
        return result, None if plan is None else RepeatedLaunches(watcher, tensors, plan), watcher.refusal
    try:
        return result, RepeatedFunction(watcher, result), ""
    except (LookupError, ValueError):
        return result, None, "the call does more than its autograd.Function"
