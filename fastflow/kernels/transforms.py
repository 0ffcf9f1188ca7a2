"""The transforms of `torch.func` and forward-mode differentiation: whether one is active, and what it wraps.

An `autograd.Function` of an op has neither a form for them nor a second derivative, which `torch.func.grad`
records. The definitions of the ops, which the backend ``"reference"`` runs, take them all.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

_TRANSFORMS = (TransformType.Vmap, TransformType.Grad, TransformType.Jvp)


def is_transformed() -> bool:
    """Whether a transform such as `torch.func.grad` or `torch.vmap`, or a forward-mode level, is active."""
    if torch.compiler.is_compiling():
        return False
    level = torch._C._functorch.peek_interpreter_stack()
    return forward_ad._current_level >= 0 or (level is not None and level.key() in _TRANSFORMS)


def plain_values(x: Tensor) -> Tensor:
    """The tensor under the wrappers of transforms: that of all samples of a `torch.vmap`, with its values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x
