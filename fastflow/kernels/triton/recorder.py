"""Records a call of launchers and makes a launch plan of it.

A `Recorder` watches one call through a dispatch mode and `launch`: allocations, ATen ops, and each launch
with its compiled kernel and the place of every tensor among inputs and allocations.

A call that a plan cannot repeat has none: one that reads a value on the host, takes a tensor that is neither
an input nor made by the call, or starts a kernel that needs scratch memory from Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastflow.kernels.triton.plans import Allocation, Call, KernelLaunch, Place, Plan, View

# The C launcher has no stated interface: it is called in versions of Triton where it was looked at.
KNOWN_TRITON = ("3.7.",)

aten = torch.ops.aten
_ALLOCATIONS = frozenset(
    (
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    )
)
_UNREPEATABLE = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class Recorder(TorchDispatchMode):
    """Notes what a call does with its tensors, while it runs as ever.

    Attributes:
        refusal: why the call has no plan; empty while it may have one.
        checks: (function, index of an input, further arguments) of each check of values, see
            `fastflow.kernels.planning.check_values`.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.refusal = ""
        self.checks: list[tuple[Callable[..., None], int, tuple[Any, ...]]] = []
        self._inputs = tuple(inputs)
        # Every tensor stays alive while the call is recorded, so that no address serves twice.
        self._values: list[Tensor] = list(inputs)
        self._owners: dict[int, list[int]] = {}
        for slot, value in enumerate(inputs):
            self._owners.setdefault(_storage(value), []).append(slot)
        self._allocations: list[Allocation] = []
        self._steps: list[KernelLaunch | Call] = []
        self._paused = False

    # -- what the call does ----------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self._paused and not self.refusal:
            self._note(func, args, kwargs, out)
        return out

    def note_check(self, function: Callable[..., None], value: Tensor, rest: tuple[Any, ...]) -> None:
        """Run a check of the values of an input, which each call of the plan repeats."""
        self._paused = True
        try:
            function(value, *rest)
        finally:
            self._paused = False
        place = self._place(value)
        if place is None or place.slot >= len(self._inputs) or self._inputs[place.slot] is not value:
            self._refuse("a tensor whose values are checked is no input")
            return
        self.checks.append((function, place.slot, rest))

    def note_launch(self, compiled: Any, kernel: Any, programs: int, bound: dict[str, Any]) -> None:
        """Note a launch of `kernel`, the build of Triton's `compiled` for the arguments `bound` by name."""
        run: Any = getattr(kernel, "run", None)
        if not _is_plain(run) or getattr(compiled, "pre_run_hooks", None):
            self._refuse("plans do not know the launcher of this Triton, or the kernel needs scratch memory")
            return
        arguments, annotations = [], []
        signature = kernel.src.signature
        for name, annotation in zip(compiled.arg_names, run.arg_annotations, strict=True):
            if signature[name] == "constexpr":
                continue
            value = bound[name]
            if isinstance(value, Tensor):
                value = self._place(value)
                if value is None:
                    self._refuse(f"the tensor {name} of {kernel.name} is neither an input nor made here")
                    return
            arguments.append(value)
            annotations.append(annotation)
        # The launcher takes metadata and two hooks, and the addresses of two scratch memories.
        unused = (None,) * 5
        tail = (
            run.launch_cooperative_grid, run.launch_pdl, kernel.packed_metadata, *unused,
            tuple(annotations), run.kernel_signature,
        )  # fmt: skip
        self._steps.append(KernelLaunch((run.launch, programs, kernel.function, tail), tuple(arguments)))

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if func in _ALLOCATIONS:
            self._allocations.append(
                Allocation(self._own(out), tuple(out.shape), out.stride(), out.dtype, out.device)
            )
            return
        results = out if isinstance(out, (tuple, list)) else (out,)
        if any(tag in func.tags for tag in _UNREPEATABLE) or not all(isinstance(r, Tensor) for r in results):
            self._refuse(f"{func} reads values on the host")
            return
        new = [result for result in results if _storage(result) not in self._owners]
        if not new and not func._schema.is_mutable:
            # A view needs no step, since places are addresses.
            return
        if any(value.device != self._inputs[0].device for value in results):
            self._refuse(f"{func} copies to another device")
            return
        arguments = tuple(self._argument(value, func) for value in args)
        keywords = {name: self._argument(value, func) for name, value in kwargs.items()}
        if new and len(new) != len(results):
            self._refuse(f"{func} returns views among its results")
        self._steps.append(Call(func, arguments, keywords, tuple(self._own(result) for result in new)))

    def _argument(self, value: Any, func: Any) -> Any:
        if isinstance(value, Tensor):
            view = self._view(value)
            if view is None:
                self._refuse(f"{func} takes a tensor that is neither an input nor made here")
            return view
        if isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            self._refuse(f"{func} takes a list of tensors")
        return value

    def _own(self, value: Tensor) -> int:
        self._values.append(value)
        slot = len(self._values) - 1
        self._owners[_storage(value)] = [slot]
        return slot

    def _place(self, value: Tensor) -> Place | None:
        """Where a tensor lies; None where that is unknown, or may differ between calls."""
        for slot, given in enumerate(self._inputs):
            if given is value:
                return Place(slot, 0)
        owners = self._owners.get(_storage(value), [])
        # Two inputs of one memory may lie otherwise to each other the next time.
        if len(owners) != 1:
            return None
        return Place(owners[0], value.data_ptr() - self._values[owners[0]].data_ptr() if value.numel() else 0)

    def _view(self, value: Tensor) -> View | None:
        place = self._place(value)
        if place is None:
            return None
        base = self._values[place.slot]
        same = (base.shape, base.stride(), base.dtype) == (value.shape, value.stride(), value.dtype)
        if base is value or (same and place.offset == 0):
            return View(place.slot, None, (), 0)
        if base.dtype != value.dtype or place.offset % base.element_size():
            return None
        return View(place.slot, tuple(value.shape), value.stride(), place.offset // base.element_size())

    def _refuse(self, why: str) -> None:
        self.refusal = self.refusal or why

    # -- the plan --------------------------------------------------------------------------------------------

    def plan(self, result: Any) -> Plan | None:
        """The plan of the call that returned `result`; None, with `refusal` set, where there is none."""
        # A list of tensors, as `torch.library` has it, comes back as a tuple.
        several = isinstance(result, (tuple, list))
        results = tuple(result) if several else (result,)
        outputs = [self._view(value) if type(value) is Tensor else None for value in results]
        if None in outputs:
            self._refuse("the result holds something that is no tensor of the call")
        if not any(isinstance(step, KernelLaunch) for step in self._steps):
            self._refuse("nothing was launched")
        used = {slot for step in self._steps for slot in _slots(step)}
        used.update(view.slot for view in outputs if view is not None)
        allocations = [made for made in self._allocations if made.slot in used]
        device = self._inputs[0].device
        if any(made.device != device for made in allocations):
            self._refuse("memory on another device is used")
        if self.refusal:
            return None
        views = [view for view in outputs if view is not None]
        for i, made in enumerate(allocations):
            allocations[i], views = self._returned_as_made(made, views)
        return Plan(device, len(self._inputs), allocations, self._steps, views, several)

    def _returned_as_made(self, made: Allocation, views: list[View]) -> tuple[Allocation, list[View]]:
        """An allocation in the shape of its one view that is returned, which then costs nothing."""
        mine = [view for view in views if view.slot == made.slot]
        read = {value.slot for step in self._steps if isinstance(step, Call) for value in _views(step)}
        if len(mine) != 1 or made.slot in read:
            return made, views
        (view,) = mine
        if view.size is None or view.offset or not _is_dense(view.size, view.stride):
            return made, views
        if torch.Size(view.size).numel() != torch.Size(made.size).numel():
            return made, views
        whole = View(view.slot, None, (), 0)
        return made._replace(size=view.size, stride=view.stride), [whole if v is view else v for v in views]


def _arguments(step: KernelLaunch | Call) -> list[Any]:
    return [*step.arguments, *(step.keywords.values() if isinstance(step, Call) else ())]


def _slots(step: KernelLaunch | Call) -> list[int]:
    return [value.slot for value in _arguments(step) if isinstance(value, (Place, View))]


def _views(step: Call) -> list[View]:
    return [value for value in _arguments(step) if isinstance(value, View)]


def _is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether elements lie side by side in the order of the dimensions."""
    expected = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _is_plain(run: Any) -> bool:
    """Whether this launcher is called as plans do it, and its kernel has no scratch memory."""
    import triton

    return (
        triton.__version__.startswith(KNOWN_TRITON)
        and hasattr(run, "kernel_signature")
        and run.global_scratch_size == 0
        and run.profile_scratch_size == 0
    )


def _storage(value: Tensor) -> int:
    return value.untyped_storage()._cdata
