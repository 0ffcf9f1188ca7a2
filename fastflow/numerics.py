"""Numbers that every layer computes the same way: accumulation dtypes, sums per sample, the standard normal
density.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)
# Length of the rows that `sum_per_sample` sums first.
SUM_CHUNK = 4096


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, float32 for narrower ones."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_per_sample(x: Tensor) -> Tensor:
    """Sum of each sample, (B, ...) -> (B,), in a two-stage order that depends on the sample's shape only.

    ATen splits the sum of a single long row over threads, but never that of several rows; without the chunks
    a sample alone in its batch would get other bits than among others.
    """
    flat = x.flatten(1)
    whole = flat.shape[1] // SUM_CHUNK * SUM_CHUNK
    rest = flat[:, whole:].sum(dim=1)
    if whole == 0:
        return rest
    return flat[:, :whole].unflatten(1, (-1, SUM_CHUNK)).sum(dim=2).sum(dim=1) + rest


def normal_log_density(z: Tensor) -> Tensor:
    """Log-density of each element of `z` under the standard normal, in nats, float32 or wider."""
    z = z.to(acc_dtype(z.dtype))
    return -0.5 * (z * z + LOG_2PI)


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Say how CUDA devices multiply float32, in convolutions and in matrix products alike; restored after.

    PyTorch's own default is TF32 (10 bits of mantissa) for convolutions and float32 for matrix products.
    CPUs do not heed it.

    Args:
        tf32: allow TF32 in both; otherwise neither uses it.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def unrounded_products(x: Tensor) -> AbstractContextManager[object]:
    """A context in which products on the device of `x` are rounded neither by autocast nor to TF32."""
    if torch.compiler.is_compiling():
        return full_precision(x)
    stack = ExitStack()
    stack.enter_context(full_precision(x))
    stack.enter_context(float32_products(tf32=False))
    return stack
