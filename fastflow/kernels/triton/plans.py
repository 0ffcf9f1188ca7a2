"""Launch plans: what a call allocates and launches, kept so that the next call of its kind repeats it.

A plan holds no address: a call of it allocates, adds known offsets to the addresses of its inputs and
allocations, and gives the numbers to Triton's C launcher. `recorder` makes plans, and
`fastflow.kernels.planning` decides which one fits.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastflow.kernels.triton import launch as launching

data_ptr = Tensor.data_ptr


class Place(NamedTuple):
    """Where a tensor lies: in the memory of a slot (an input, an allocation or a result), bytes behind it."""

    slot: int
    offset: int


class View(NamedTuple):
    """A tensor of a slot; another view of its memory where `size` is given. `offset` counts elements."""

    slot: int
    size: tuple[int, ...] | None
    stride: tuple[int, ...]
    offset: int

    def of(self, values: Sequence[Any]) -> Tensor:
        base: Tensor = values[self.slot]
        if self.size is None:
            return base
        return base.as_strided(self.size, self.stride, base.storage_offset() + self.offset)


class KernelLaunch(NamedTuple):
    """A launch: (C launcher, programs, kernel, what follows in each call), and the kernel's arguments.

    An argument that is an address is a `Place`.
    """

    head: tuple[Any, int, int, tuple[Any, ...]]
    arguments: tuple[Any, ...]


class Call(NamedTuple):
    """A call of an ATen op, whose results fill `slots`."""

    op: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    slots: tuple[int, ...]


class Allocation(NamedTuple):
    slot: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Plan:
    """A call to be repeated, see the head of this file. Called with the inputs and their addresses.

    Values are numbered: inputs, allocations, results of ATen ops. The numbers of its launches are one list:
    the addresses of all values in that order, the constants, and the addresses with an offset.
    """

    __slots__ = (
        "_constants",
        "_device_index",
        "_is_tuple",
        "_late",
        "_launches",
        "_made",
        "_offsets",
        "_only",
        "_outputs",
        "_steps",
        "_stream_index",
        "_stream_of",
        "_views",
    )

    def __init__(
        self,
        device: torch.device,
        inputs: int,
        allocations: Sequence[Allocation],
        steps: Sequence[KernelLaunch | Call],
        outputs: Sequence[View],
        is_tuple: bool,
    ) -> None:
        import triton

        driver = triton.runtime.driver.active
        self._stream_of = driver.get_current_stream
        self._stream_index = driver.get_current_device() if device.index is None else device.index
        several = device.type == "cuda" and torch.cuda.device_count() > 1
        self._device_index = device.index if several else None
        order = [*range(inputs), *(made.slot for made in allocations)]
        results = [slot for step in steps if isinstance(step, Call) for slot in step.slots]
        value_of = {slot: index for index, slot in enumerate([*order, *results])}
        launches = [step for step in steps if isinstance(step, KernelLaunch)]
        arguments = [value for step in launches for value in step.arguments]
        constants = [value for value in arguments if not isinstance(value, Place)]
        shifted = list(dict.fromkeys(v for v in arguments if isinstance(v, Place) and v.offset))
        self._late, self._constants = len(results), (*[0] * len(results), *constants)
        self._offsets = tuple((value_of[place.slot], place.offset) for place in shifted)
        self._made = tuple((_allocator(m.device), m.size, m.stride, m.dtype) for m in allocations)
        first, next_constant = len(value_of), iter(range(len(value_of), len(value_of) + len(constants)))
        behind = first + len(constants)

        def index(value: Any) -> int:
            if not isinstance(value, Place):
                return next(next_constant)
            return behind + shifted.index(value) if value.offset else value_of[value.slot]

        def moved(value: Any) -> Any:
            return value._replace(slot=value_of[value.slot]) if isinstance(value, View) else value

        prepared: list[tuple[Any, ...]] = []
        for step in steps:
            if isinstance(step, KernelLaunch):
                prepared.append((*step.head, getter([index(value) for value in step.arguments])))
            else:
                keywords = tuple((name, moved(value)) for name, value in step.keywords.items())
                places = tuple(value_of[slot] for slot in step.slots)
                prepared.append((None, step.op, tuple(map(moved, step.arguments)), keywords, places))
        self._steps = tuple(prepared) if len(launches) < len(steps) else ()
        self._launches = () if self._steps else tuple(prepared)
        self._views, self._is_tuple = tuple(map(moved, outputs)), is_tuple
        plain = all(view.size is None for view in self._views)
        self._only = self._views[0].slot if plain and not is_tuple else None
        self._outputs = getter([view.slot for view in self._views]) if plain and is_tuple else None

    def __call__(self, tensors: tuple[Tensor, ...], addresses: list[int]) -> Any:
        index = self._device_index
        if index is not None and torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                return self(tensors, addresses)
        made = [allocate(size, stride, dtype) for allocate, size, stride, dtype in self._made]
        numbers = [*addresses, *map(data_ptr, made), *self._constants]
        stream = self._stream_of(self._stream_index)
        values = (*tensors, *made)
        if self._steps:
            values = self._run_steps(values, numbers, stream)
        elif self._offsets:
            numbers += [numbers[place] + offset for place, offset in self._offsets]
        for launch, programs, function, tail, arguments in self._launches:
            launch(programs, 1, 1, stream, function, *tail, arguments(numbers))
        if self._only is not None:
            return values[self._only]
        if self._outputs is not None:
            return self._outputs(values)
        results = tuple([view.of(values) for view in self._views])
        return results if self._is_tuple else results[0]

    def _run_steps(self, early: tuple[Tensor, ...], numbers: list[int], stream: int) -> tuple[Any, ...]:
        values: list[Any] = [*early, *[None] * self._late]
        for step in self._steps:
            if step[0] is None:
                _, op, arguments, keywords, places = step
                out = op(
                    *[value.of(values) if type(value) is View else value for value in arguments],
                    **{name: value.of(values) if type(value) is View else value for name, value in keywords},
                )
                for place, result in zip(places, out if len(places) > 1 else (out,), strict=False):
                    values[place], numbers[place] = result, data_ptr(result)
                continue
            launch, programs, function, tail, take = step
            shifted = [numbers[place] + offset for place, offset in self._offsets]
            launch(programs, 1, 1, stream, function, *tail, take(numbers + shifted))
        return tuple(values)


# -- small parts ---------------------------------------------------------------------------------------------


def getter(indices: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the items with these indices from a sequence, as a tuple."""
    if len(indices) > 1:
        return operator.itemgetter(*indices)
    chosen = tuple(indices)
    return lambda values: tuple([values[i] for i in chosen])


def must_be_seen() -> bool:
    """Whether somebody watches launches: `recording`, hooks that Triton calls, or forward-mode
    differentiation, which no type of a tensor shows.
    """
    if forward_ad._current_level >= 0:
        return True
    runtime = _triton_settings()
    try:
        return bool(launching._records or runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:
        # Somebody put a function in the place of Triton's chain of hooks.
        return True


@functools.cache
def _triton_settings() -> Any:
    import triton

    return triton.knobs.runtime


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """The function of (size, stride, dtype) that makes a tensor on the current device of this type.

    Graphs that Inductor compiles allocate by it, in half the time of `torch.empty_strided`.
    """
    fast = getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", None)
    if fast is not None:
        return fast

    def allocate(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device=device)

    return allocate
