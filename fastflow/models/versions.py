"""Whether the tensors of a module are still those that somebody read: not written to, moved or replaced.

PyTorch counts how often a tensor was written to in place (`Tensor._version`), and raises where autograd saved
a tensor that was changed since. Whoever keeps results of weights beside autograd holds them against the same
counters here, by comparisons of integers that wait for no device. Fused optimizers write without counting, so
that their steps are counted here; a write through ``parameter.data`` is seen by nobody.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_counter_of: Callable[[Tensor], int] = operator.attrgetter("_version")


class Change(NamedTuple):
    """A tensor of a module that has other values now, or is another one.

    Attributes:
        name: of the tensor in the module, such as "parameter steps.0.actnorm.bias".
        reason: such as "is at version 5, expected 4".
    """

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class TensorVersions:
    """The parameters and buffers of a module as they are now, held against those of a later time.

    Tensors that were made under `torch.inference_mode` have no counters: their values are kept and compared.
    A copy or a pickle stands for the module that is copied with it.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        _count_fused_steps()
        self._module = module
        self._earlier: Change | None = None
        # The modules' own dictionaries show what was replaced, which a list of tensors hides, and reading
        # them takes a tenth of the time of a walk through the modules.
        parts = list(module.modules())
        places: list[dict[str, Any]] = [part._modules for part in parts]
        places += [place for part in parts for place in (part._parameters, part._buffers)]
        self._places = [place for place in places if place]
        self._slots = [(place, name) for place in self._places for name in place]
        self._held = [place[name] for place, name in self._slots]
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._versions = [*map(_counter_of, self._counted)]
        self._copies = [(tensor, tensor.clone()) for tensor in self._tensors if tensor.is_inference()]

    def __getstate__(self) -> tuple[nn.Module, Change | None]:
        return self._module, self.change()

    def __setstate__(self, state: tuple[nn.Module, Change | None]) -> None:
        module, earlier = state
        self.__init__(module)  # type: ignore[misc]
        self._earlier = earlier

    def change(self) -> Change | None:
        """The first tensor that is not as it was; None where all are."""
        return self._earlier or self.moved() or self._written()

    def moved(self) -> Change | None:
        """The first tensor or module that was moved or replaced; None where all are where they were."""
        now = [*itertools.chain.from_iterable(map(dict.values, self._places))]
        same = len(now) == len(self._held) and all(map(operator.is_, now, self._held))
        if same and [*map(Tensor.data_ptr, self._tensors)] == self._addresses:
            return None
        addresses = dict(zip(map(id, self._tensors), self._addresses, strict=True))
        for (place, name), before in zip(self._slots, self._held, strict=True):
            value = place.get(name)
            if value is not before or (
                isinstance(value, Tensor) and value.data_ptr() != addresses[id(value)]
            ):
                return Change(self._full_name(place, name), "was moved or replaced")
        return None

    def count_writes(self) -> None:
        """Count a write to every tensor, as after the replay of a CUDA graph, which counts none."""
        torch.autograd.graph.increment_version(self._counted)

    def _written(self) -> Change | None:
        counts = [*map(_counter_of, self._counted)]
        if counts != self._versions:
            for tensor, count, version in zip(self._counted, counts, self._versions, strict=True):
                if count != version:
                    return Change(self._name_of(tensor), f"is at version {count}, expected {version}")
        for tensor, value in self._copies:
            if not torch.equal(tensor, value):
                return Change(self._name_of(tensor), "has other values")
        return None

    def _name_of(self, tensor: Tensor) -> str:
        index = next(i for i, value in enumerate(self._held) if value is tensor)
        return self._full_name(*self._slots[index])

    def _full_name(self, place: dict[str, Any], name: str) -> str:
        for prefix, part in self._module.named_modules():
            kinds = {"module": part._modules, "parameter": part._parameters, "buffer": part._buffers}
            for kind, found in kinds.items():
                if found is place:
                    return f"{kind} {prefix}.{name}" if prefix else f"{kind} {name}"
        return name


@functools.cache
def _count_fused_steps() -> None:
    """Count the writes of fused optimizers from now on, as PyTorch counts those of others."""
    register_optimizer_step_post_hook(_count_step)


def _count_step(optimizer: torch.optim.Optimizer, _: Any, __: Any) -> None:
    written = [
        parameter
        for group in optimizer.param_groups
        if group.get("fused")
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if written:
        torch.autograd.graph.increment_version(written)
