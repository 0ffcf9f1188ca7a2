"""Passes captured as CUDA graphs, one for each number of samples, a power of two."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[..., Tensor]


class Captured(NamedTuple):
    """A pass that can be repeated on whatever lies in its inputs.

    Attributes:
        result: which a replay overwrites.
        replay: repeats the pass.
        pool: the memory of its intermediate results, which the next capture may share.
    """

    result: Tensor
    replay: Callable[[], None]
    pool: Any


def capture(run: Run, inputs: tuple[Tensor, ...], pool: Any) -> Captured:
    """Capture `run` on `inputs` as a CUDA graph, in the memory `pool` where there is one."""
    device = inputs[0].device
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Kernels compile and allocations settle before the capture, which may do neither.
        for _ in range(2):
            run(*inputs)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = run(*inputs)
    return Captured(result, graph.replay, graph.pool() if pool is None else pool)


class GraphPerSize:
    """Captured passes of functions whose results for a sample depend on no other sample.

    Args:
        capture: makes the passes.
    """

    def __init__(self, capture: Callable[[Run, tuple[Tensor, ...], Any], Captured] = capture) -> None:
        self._capture = capture
        self._passes: dict[Hashable, tuple[tuple[Tensor, ...], Captured]] = {}
        self._pool: Any = None

    def __call__(self, run: Run, rows: tuple[Tensor, ...], name: Hashable = None) -> Tensor:
        """The result (B, ...) of `run` on `rows`.

        Args:
            run: the function; it is captured when a size comes first, and what it closes over must stay.
            rows: tensors (B, ...) of B samples, at least one.
            name: tells functions apart.
        """
        count = len(rows[0])
        bucket = 1 << (count - 1).bit_length()
        key = bucket, name
        if key not in self._passes:
            inputs = tuple(value[-1:].expand(bucket, *value.shape[1:]).clone() for value in rows)
            captured = self._capture(run, inputs, self._pool)
            self._pool = captured.pool
            self._passes[key] = inputs, captured
        inputs, captured = self._passes[key]
        for static, value in zip(inputs, rows, strict=True):
            static[:count].copy_(value)
            if count < bucket:
                # The last sample fills a bucket up: its numbers are as harmless as it is.
                static[count:].copy_(value[-1:])
        captured.replay()
        return captured.result[:count].clone()
