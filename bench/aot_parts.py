"""The lists of launches for `bench.aot` share dtypes, launchers and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.registry import OPS

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# (stream, conditioner): streams alone, and a float32 stream beside conditioners under autocast.
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F32, F16))
# These two pairs of dtypes are enough where a branch changes addressing only.
FLOAT32_STREAM = ((F32, F32), (F32, BF16))

Case = Callable[[], Any]


def launcher(op: str) -> Callable[..., Any]:
    found = OPS[op].triton
    assert found is not None, f"{op} has no kernels"
    return found


def image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, memory_format=layout)
