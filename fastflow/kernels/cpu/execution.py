"""Where a tensor is computed: the questions that choose a form for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor


def on_cpu(x: Tensor) -> bool:
    """Whether `x` takes the forms that are chosen for CPUs."""
    return x.device.type == "cpu"


def eager_on_cpu(x: Tensor) -> bool:
    """Whether ATen's code for CPUs runs on `x` at once, and not in a graph that is compiled or exported."""
    return on_cpu(x) and not torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def contiguous_planes(x: Tensor) -> Tensor:
    """`x` with contiguous planes on a CPU, whose norms and poolings are several times faster over them."""
    return x.contiguous() if on_cpu(x) else x
