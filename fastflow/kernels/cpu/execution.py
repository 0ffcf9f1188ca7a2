"""Where a tensor is computed: the questions that choose a form for CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastflow.kernels.transforms import is_transformed


def on_cpu(x: Tensor) -> bool:
    """Whether `x` takes the forms that are chosen for CPUs."""
    return x.device.type == "cpu"


def eager_on_cpu(x: Tensor) -> bool:
    """Whether ATen's code for CPUs runs on `x` at once, and not in a graph that is compiled or exported.

    Transforms of `torch.func` take plain operations too.
    """
    traced = torch.compiler.is_compiling() or torch.compiler.is_exporting()
    return on_cpu(x) and not traced and not is_transformed()


def contiguous_planes(x: Tensor) -> Tensor:
    """`x` with contiguous planes on a CPU, whose norms and poolings are several times faster over them."""
    return x.contiguous() if on_cpu(x) else x
