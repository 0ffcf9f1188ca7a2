"""Activations on CPUs whose rounding of a sample depends on no other sample."""

from __future__ import annotations

import torch
from torch import Tensor

# Every turn of ATen's vectorised loops takes a divisor of VECTOR_ELEMENTS, and a thread MIN_THREAD_ELEMENTS
# at least.
VECTOR_ELEMENTS, MIN_THREAD_ELEMENTS = 32, 32768


def gelu_(x: Tensor) -> Tensor:
    """GELU of a contiguous x (B, ...) on a CPU, in place; the bits of a sample depend on that sample alone.

    ATen rounds the elements after the last whole vector of each thread's share in another way than the rest.
    Samples of whole vectors are therefore computed together, in shares of whole vectors, and all others one
    by one.
    """
    size = x[0].numel() if len(x) else 0
    if size % VECTOR_ELEMENTS:
        for sample in x:
            torch.ops.aten.gelu_(sample)
        return x
    flat, end = x.view(-1), x.numel()
    # ATen takes no more threads than there are shares of MIN_THREAD_ELEMENTS.
    while end:
        threads = min(torch.get_num_threads(), -(-end // MIN_THREAD_ELEMENTS))
        whole = end // (VECTOR_ELEMENTS * threads) * (VECTOR_ELEMENTS * threads)
        if whole == end:
            break
        end = whole
    for part in (flat[:end], flat[end:]) if end < x.numel() else (flat,):
        torch.ops.aten.gelu_(part)
    return x
