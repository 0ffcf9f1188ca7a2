"""Single ops at the paper's shapes: the kernels beside plain ATen, against the bytes that they move."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import roofline
from bench.gpu.report import Figure, Key
from bench.gpu.setting import median
from bench.measuring import DEVICE, device_name

BATCH = 64 if DEVICE == "cuda" else 2


def seconds_of(work: Callable[[], object]) -> float:
    """Median seconds of a call, by Triton's benchmark on a GPU, which empties the cache before each call."""
    if DEVICE != "cuda":
        return median(work)
    from triton.testing import do_bench

    return do_bench(work, warmup=5, rep=25, return_mode="median") / 1e3


def forward_ops(shapes: int | None = None, compile_seconds: float = 0.0) -> Iterator[tuple[Key, Figure]]:
    """Forward passes of the ops of the flow and of its conditioners.

    Args:
        shapes: how many shapes of each; all of them when None.
        compile_seconds: for Inductor's compilations of plain ATen; what they leave out has no such figure.
    """
    end = time.monotonic() + compile_seconds
    lists = (
        (roofline.op_works, roofline.OP_SHAPES),
        (roofline.feature_works, roofline.FEATURE_SHAPES),
        (roofline.head_works, roofline.OP_SHAPES),
    )
    for works, all_shapes in lists:
        for shape in all_shapes[:shapes]:
            with FakeTensorMode():
                counted = [roofline.count(work)[0] for work in works(shape, BATCH, torch.float32)]
            for work, row in zip(works(shape, BATCH, torch.float32, DEVICE), counted, strict=True):
                with torch.no_grad():
                    ours = seconds_of(lambda work=work: work.public(*work.inputs))
                    plain = seconds_of(lambda work=work: work.composite(*work.inputs))
                    words = _words(row, ours, plain)
                    if time.monotonic() < end:
                        compiled = torch.compile(work.composite, dynamic=False)
                        inductor = seconds_of(lambda work=work, run=compiled: run(*work.inputs))
                        words += f"; Inductor {inductor * 1e6:.1f} us"
                yield Key(f"op {row.name}", row.shape, "eager", batch=BATCH), Figure(ours * 1e6, "us", words)


def _words(row: roofline.Row, ours: float, plain: float) -> str:
    words = f"{row.needed / ours / 1e9:.0f} GB/s of needed bytes; ATen {plain * 1e6:.1f} us"
    for name, bandwidth in roofline.BANDWIDTH.items():
        if name in device_name():
            words += f"; {row.needed / ours / bandwidth:.0%} of the bandwidth"
    return words
