"""Tensors that are used twice, and many views of one tensor, with gradients that take few launches.

Autograd adds the gradients of a tensor that is used twice by a launch of its own, and gives each slice of a
tensor a gradient as large as the whole. A training step on a GPU waits for launches, so that the halves of a
coupling, which share a conditioner, take their parameters through the functions of this file.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastflow.numerics import unrounded_products

# A slot is the place of a parameter: a module and the parameter's name in it.
Slot = tuple[nn.Module, str]


class _TwoUses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.detach() for tensor in (*tensors, *tensors))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count = len(grads) // 2
        pairs = list(zip(grads[:count], grads[count:], strict=True))
        both = [(a, b) for a, b in pairs if a is not None and b is not None]
        sums = iter(torch._foreach_add([a for a, _ in both], [b for _, b in both]) if both else ())
        return tuple(
            next(sums) if a is not None and b is not None else b if a is None else a for a, b in pairs
        )


def two_uses(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Each of the tensors twice, without a copy; the gradients of both uses are added in one call.

    Args:
        tensors: of any shapes; those that need no gradient are handed through.
    """
    recorded = [tensor for tensor in tensors if tensor.requires_grad]
    if not recorded or not torch.is_grad_enabled():
        return list(tensors), list(tensors)
    aliases = _TwoUses.apply(*recorded)
    uses = []
    for part in (aliases[: len(recorded)], aliases[len(recorded) :]):
        rest = iter(part)
        uses.append([next(rest) if tensor.requires_grad else tensor for tensor in tensors])
    return uses[0], uses[1]


class _SplitTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sizes, ctx.dim, ctx.shape = sizes, dim, x.shape
        ctx.options = {"dtype": x.dtype, "device": x.device}
        return (*x.split(list(sizes), dim), *x.split(list(sizes), dim))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        count = len(grads) // 2
        uses = [grads[:count], grads[count:]]
        joined = [_join(use, ctx) for use in uses if any(grad is not None for grad in use)]
        if not joined:
            return None, None, None
        return (joined[0] if len(joined) == 1 else joined[0] + joined[1]), None, None


def _join(grads: Sequence[Tensor | None], ctx: Any) -> Tensor:
    missing = [size for grad, size in zip(grads, ctx.sizes, strict=True) if grad is None]
    shape = list(ctx.shape)
    shape[ctx.dim] = max(missing, default=0)
    zeros = torch.zeros(shape, **ctx.options)
    pairs = zip(grads, ctx.sizes, strict=True)
    parts = [zeros.narrow(ctx.dim, 0, size) if grad is None else grad for grad, size in pairs]
    return torch.cat(parts, dim=ctx.dim)


def split_twice(x: Tensor, sizes: Sequence[int], dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """The parts of `x` along `dim`, as views, for two uses; their gradients are joined and then added.

    Args:
        x: any shape.
        sizes: of the parts, which add up to the length of `dim`.
        dim: the axis.
    """
    if not x.requires_grad or not torch.is_grad_enabled():
        parts = list(x.split(list(sizes), dim))
        return parts, parts
    views = _SplitTwice.apply(x, tuple(sizes), dim)
    return list(views[: len(sizes)]), list(views[len(sizes) :])


class _TakeEntries(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tables: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape = tables.shape
        return tables.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        # A product with zeros and ones adds samples in a fixed order; an indexed addition would take atomics.
        chosen = index == torch.arange(ctx.shape[0], device=index.device)[:, None]
        with unrounded_products(grad):
            return (chosen.to(grad.dtype) @ grad.flatten(1)).view(ctx.shape), None


def take_entries(tables: Tensor, index: Tensor) -> Tensor:
    """The entries (B, ...) of `tables` (R, ...) that `index` (B,) names; gradients have a fixed order."""
    out: Tensor = _TakeEntries.apply(tables, index)
    return out


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.dtype = tensors[0].dtype
        return tuple(_copies(tensors, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *_copies(grads, ctx.dtype)


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    out = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(out, list(tensors))
    return out


def narrowed(slots: Sequence[Slot], values: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that autocast would round at each of their uses, rounded once; the others as they are.

    Autocast rounds the parameters of convolutions and of linear layers with a bias; the package's ops round
    their own.

    Args:
        slots: where the parameters lie.
        values: the parameters.
    """
    device = values[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(values)
    dtype = torch.get_autocast_dtype(device)

    def is_rounded(module: nn.Module, value: Tensor) -> bool:
        linear = isinstance(module, nn.Linear) and module.bias is not None
        return value.dtype == torch.float32 and (linear or isinstance(module, nn.Conv2d))

    chosen = [is_rounded(module, value) for (module, _), value in zip(slots, values, strict=True)]
    if not any(chosen):
        return list(values)
    rounded = iter(_Rounded.apply(dtype, *itertools.compress(values, chosen)))
    return [next(rounded) if narrow else value for value, narrow in zip(values, chosen, strict=True)]


@contextlib.contextmanager
def replaced_parameters(slots: Sequence[Slot], values: Sequence[Tensor]) -> Iterator[None]:
    """A block in which modules compute with `values` in place of their parameters at `slots`.

    A module whose weight is made of several parameters (weight norm) takes its value as `given_weight`.
    """
    computed = [name == "weight" and hasattr(module, "parametrizations") for module, name in slots]
    before = [
        None if made else module._parameters[name]
        for (module, name), made in zip(slots, computed, strict=True)
    ]

    def place(tensors: Sequence[Tensor | None]) -> None:
        for (module, name), made, tensor in zip(slots, computed, tensors, strict=True):
            if made:
                module.given_weight = tensor  # type: ignore[assignment]
            else:
                module._parameters[name] = tensor  # type: ignore[assignment]

    place(values)
    try:
        yield
    finally:
        place(before)
