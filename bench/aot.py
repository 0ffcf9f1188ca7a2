"""Builds every kernel ahead of time for six GPU targets: ``python -m bench.aot [--update]``. Needs Triton, no GPU.

The ops' own launchers are run over `CASES` while `recording` notes the launches that they would make: the signatures,
alignments and constants built here are the ones that launch, every dtype and specialisation among them. Each is compiled for
sm_80, sm_86, sm_89, sm_90, sm_100 and gfx942. A row of ``bench/aot.csv`` holds one kernel, variant and target: registers, shared
memory, spilled bytes and 128-bit global accesses. The committed table is the budget: a spill, lost 128-bit accesses, or registers
and shared memory more than `SLACK` above it fail `tests/kernels/test_aot.py` and this command.

A build shows that a kernel compiles and what it occupies, not how fast it is.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.kernels import _launch
from fastflow.kernels.affine_coupling import _coupling_backward_launch, _coupling_launch
from fastflow.kernels.attention_pool import (
    _channels_backward_launch,
    _channels_launch,
    _gates_backward_launch,
    _gates_launch,
    _pixels_backward_launch,
    _pixels_launch,
)
from fastflow.kernels.channel_mix import _mix_backward_launch, _mix_launch
from fastflow.kernels.coupling_head import _head_backward_launch, _head_launch
from fastflow.kernels.latent_prior import _prior_backward_launch, _prior_launch
from fastflow.kernels.norm_film_act import _norm_backward_launch, _norm_launch
from fastflow.kernels.squeeze import _squeeze_launch, _unsqueeze_launch

TABLE = Path(__file__).with_name("aot.csv")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
SLACK = 1.1
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
# (stream, conditioner): the streams alone, and a float32 stream beside conditioners under autocast.
DTYPES = ((F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F32, F16))


class Build(NamedTuple):
    """One specialisation of a kernel."""

    kernel: str
    module: str
    variant: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int


class Result(NamedTuple):
    """What a build came to; a row of the table."""

    kernel: str
    variant: str
    target: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    loads_128: int
    stores_128: int


# -- what can be launched -------------------------------------------------------------------------------------------------


def _image(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _coupling_cases() -> Iterator[Callable[[], Any]]:
    for (stream, net), inverse, following in itertools.product(DTYPES, (False, True), ("nothing", "next", "affine")):
        layouts = [(False, False)] if following == "affine" else [(False, False), (True, True), (False, True)]
        # Other layouts and sizes that are no multiple of a vector change addressing only: two dtypes tell.
        for x_last, net_last in layouts if (stream, net) in ((F32, F32), (F32, BF16)) else layouts[:1]:
            shapes = [(2, 1 if following == "affine" else 16, 32, 32)]
            if (stream, net) == (F32, F32) and not x_last and not net_last:
                shapes.append((2, shapes[0][1], 23, 23))
            for shape in shapes:
                yield from _couple(shape, stream, net, inverse, following, x_last, net_last)


def _couple(
    shape: tuple[int, ...], stream: torch.dtype, net: torch.dtype, inverse: bool, following: str, x_last: bool, net_last: bool
) -> Iterator[Callable[[], Any]]:
    x = _image(shape, stream, x_last)
    raw, shift = _image(shape, net, net_last), _image(shape, net, net_last)
    mask = torch.zeros(shape[1:], dtype=torch.bool)
    following_mask = None if following == "nothing" else mask
    affine = torch.ones(2, dtype=F64 if stream == F64 else F32) if following == "affine" else None
    rest = (raw, shift, mask, following_mask, affine, 0.5, inverse)
    yield lambda: _coupling_launch(x, *rest, net)
    logdet = torch.zeros(shape[0], dtype=F64 if stream == F64 else F32)
    masked = _image(shape, net, x_last)
    for recompute in (False, True):
        yield lambda recompute=recompute: _coupling_backward_launch(x, logdet, masked, x, *rest, recompute)


def _mix_cases() -> Iterator[Callable[[], Any]]:
    for stream, net in DTYPES:
        channels = (1, 2, 4, 8, 16, 32, 64) if (stream, net) == (F32, F32) else (1, 4, 8, 16, 64)
        for c, (squeeze, undo, last) in itertools.product(channels, itertools.product((False, True), repeat=3)):
            if (squeeze and c not in (4, 8, 16)) or (last and (c not in (4, 16) or (stream, net) != (F32, F32))):
                continue
            yield from _mix(c, stream, net, squeeze, undo, last)
    yield from _mix(3, F32, F32, False, False, False, size=23)
    yield from _mix(12, F32, F32, False, False, False, size=23)


def _mix(
    c: int, stream: torch.dtype, net: torch.dtype, squeeze: bool, undo: bool, last: bool, size: int = 32
) -> Iterator[Callable[[], Any]]:
    mixed, plain = (2, c, size, size), (2, c // 4, 2 * size, 2 * size) if squeeze else (2, c, size, size)
    source, result = (mixed, plain) if undo else (plain, mixed)
    x, y, masked = _image(source, stream, last), _image(result, stream, last), _image(result, net, last)
    weight, bias = torch.eye(c, dtype=stream), torch.zeros(c, dtype=stream)
    for mask in (None,) if undo else (None, torch.zeros(result[1:], dtype=torch.bool)):
        yield lambda mask=mask: _mix_launch(x, weight, bias, mask, squeeze, undo, net)
        for recompute in (False, True):
            saved = y if recompute else x
            yield lambda mask=mask, saved=saved, recompute=recompute: _mix_backward_launch(
                y, masked, saved, weight, weight, bias, mask, squeeze, undo, recompute
            )


def _head_cases() -> Iterator[Callable[[], Any]]:
    for (stream, net), inverse, following in itertools.product(DTYPES, (False, True), ("nothing", "next", "affine")):
        # The other dtypes on the smallest and on the largest program.
        if (stream, net) in ((F32, F32), (F32, BF16)) or (inverse, following) in ((False, "next"), (True, "affine")):
            yield from _head((32, 1 if following == "affine" else 16, 32, 32), stream, net, inverse, following)
    for stream, net in ((F32, F32), (F32, BF16)):
        # Batches, images and features that are no multiple of a block.
        yield from _head((3, 1, 23, 23), stream, net, False, "affine")
        yield from _head((3, 16, 23, 23), stream, net, False, "next", features=48)


def _head(
    shape: tuple[int, ...], stream: torch.dtype, net: torch.dtype, inverse: bool, following: str, features: int = 64
) -> Iterator[Callable[[], Any]]:
    batch, size, wide = shape[0], shape[1] * shape[2] * shape[3], F64 if stream == F64 else F32
    x, masked, logdet = _image(shape, stream), _image(shape, net), torch.empty(batch, dtype=wide)
    # Weights stay in the stream's dtype under autocast.
    f, weight, table = (
        torch.empty(s, dtype=d) for s, d in (((batch, features), net), ((size, features), stream), ((7, size), net))
    )
    rows, mask, order = torch.zeros(batch, dtype=torch.int64), torch.zeros(shape[1:], dtype=torch.bool), torch.arange(size)
    rest = (x, f, f, weight, weight, table, table, rows, mask, order.to(torch.int32), size // 2)
    end = (None if following == "nothing" else mask, torch.ones(2, dtype=wide) if following == "affine" else None, 0.5, inverse)
    yield lambda: _head_launch(*rest, *end, net, False)
    yield lambda: _head_backward_launch(x, logdet, masked, logdet, *rest, *end)


def _norm_cases() -> Iterator[Callable[[], Any]]:
    # One shape for each size of tile, three larger than any backward; whatever else changes the program on some of them alone.
    shapes = [(16, 46, 46), (32, 23, 23), (64, 12, 12), (128, 6, 6), (256, 3, 3), (16, 184, 184), (64, 92, 92), (128, 23, 23)]
    for dtype, (i, shape) in itertools.product((F32, BF16, F16, F64), enumerate(shapes)):
        if dtype in (F16, F64) and i not in (0, 1, 5):
            continue
        yield from _norm(shape, dtype, False, 0.0, False)
        if i in (0, 5, 7):
            yield from _norm(shape, dtype, True, 0.3, False)
        if i in (0, 1, 5) and dtype in (F32, BF16):
            yield from _norm(shape, dtype, False, 0.3, False)
            yield from _norm(shape, dtype, True, 0.0, False)
            yield from _norm(shape, dtype, True, 0.3, True)


def _norm(
    shape: tuple[int, int, int], dtype: torch.dtype, residual: bool, dropout: float, last: bool
) -> Iterator[Callable[[], Any]]:
    x = _image((2, *shape), dtype, last)
    wide = F64 if dtype == F64 else F32
    tables, rows = [torch.empty(7, shape[0], dtype=wide) for _ in range(2)], torch.zeros(2, dtype=torch.int64)
    keys = torch.zeros(2, dtype=torch.int32) if dropout else None
    rest = (*tables, rows, x if residual else None, keys, 8)
    stats = torch.empty(2, 8, 2, dtype=wide)
    yield lambda: _norm_launch(x, *rest, 1e-5, dropout, dtype)
    yield lambda: _norm_backward_launch(x, x, stats, *rest, dropout)


def _pool_cases() -> Iterator[Callable[[], Any]]:
    # A plane within one chunk, and a larger one; what inference leaves out, and other layouts, on two dtypes alone.
    for dtype, logits in ((F32, F32), (BF16, F32), (BF16, BF16), (F16, F16), (F64, F64)):
        yield from _pool((2, 16, 92, 92), dtype, logits, False)
        if (dtype, logits) in ((F32, F32), (BF16, BF16)):
            yield from _pool((2, 16, 92, 92), dtype, logits, True)
            yield from _pool((2, 32, 32, 32), dtype, logits, False)
            yield from _pool_without((2, 32, 32, 32), dtype, logits)
    # Planes that are no multiple of a vector, the largest plane, and more channels than a tile holds.
    for shape in ((2, 32, 23, 23), (2, 32, 184, 184), (2, 256, 6, 6)):
        yield from _pool(shape, F32, F32, False)
    yield from _pool((2, 256, 6, 6), F32, F32, True)


def _pool(shape: tuple[int, ...], dtype: torch.dtype, net: torch.dtype, last: bool) -> Iterator[Callable[[], Any]]:
    batch, channels, h, w = shape
    x, logits, spatial = _image(shape, dtype, last), torch.empty(batch, channels, dtype=net), _image((batch, 1, h, w), net)
    first, places = (torch.empty(size, dtype=torch.int32) for size in ((batch, channels), (batch, h, w)))
    yield lambda: _pixels_launch(x, True, True)
    yield lambda: _pixels_backward_launch(torch.empty(2, batch, channels, dtype=dtype), first, x, h, w, last)
    yield lambda: _channels_launch(x, logits, True)
    yield lambda: _channels_backward_launch(_image((batch, 2, h, w), dtype), x, logits, places, x)
    yield lambda: _gates_launch(x, logits, spatial)
    yield lambda: _gates_backward_launch(x, x, logits, spatial)


def _pool_without(shape: tuple[int, ...], dtype: torch.dtype, net: torch.dtype) -> Iterator[Callable[[], Any]]:
    """Poolings without a maximum, without its place, and of an x that nothing else reads."""
    batch, channels, h, w = shape
    x, logits = _image(shape, dtype), torch.empty(batch, channels, dtype=net)
    grad, first = torch.empty(2, batch, channels, dtype=dtype), torch.empty(batch, channels, dtype=torch.int32)
    yield lambda: _pixels_launch(x, True, False)
    yield lambda: _pixels_launch(x, False, False)
    yield lambda: _pixels_backward_launch(grad[:1], None, x, h, w, False)
    yield lambda: _pixels_backward_launch(grad, first, None, h, w, False)
    yield lambda: _channels_launch(x, logits, False)
    yield lambda: _channels_backward_launch(_image((batch, 2, h, w), dtype), x, logits, first.new_empty(batch, h, w), None)


def _other_cases() -> Iterator[Callable[[], Any]]:
    for dtype in (F32, BF16, F16, F64):
        z, grad = torch.empty(2, 4096, dtype=dtype), torch.empty(2, dtype=F64 if dtype == F64 else F32)
        yield lambda z=z: _prior_launch(z)
        yield lambda z=z, grad=grad: _prior_backward_launch(grad, z)
        for size in (32, 46):
            x, y = _image((2, 4, size, size), dtype), _image((2, 16, size // 2, size // 2), dtype)
            yield lambda x=x: _squeeze_launch(x)
            yield lambda y=y: _unsqueeze_launch(y)


CASES = (_coupling_cases, _mix_cases, _head_cases, _norm_cases, _pool_cases, _other_cases)


def builds() -> list[Build]:
    """Every specialisation that `CASES` would launch, each once."""
    before = os.environ.get("TRITON_INTERPRET")
    # Launchers on CPU tensors choose kernels only under the interpreter. Nothing is run while recording.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with _launch.recording() as launches:
            for case in itertools.chain.from_iterable(cases() for cases in CASES):
                case()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return sorted({_specialise(launch) for launch in launches}, key=lambda build: (build.kernel, build.variant))


def _specialise(launch: _launch.Launch) -> Build:
    """The types, constants and alignments that Triton would derive from a launch's arguments."""
    import triton.language as tl

    signature, constants, aligned = [], [], []
    for index, (name, value) in enumerate(launch.arguments.items()):
        if isinstance(value, Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(index)
        elif name.isupper() or value is None or (value == 1 and name not in _launch.UNSPECIALIZED):
            signature.append((name, "constexpr"))
            constants.append((name, {tl.float32: "fp32", tl.float64: "fp64"}.get(value, value) if name == "ACC" else value))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in _launch.UNSPECIALIZED:
                aligned.append(index)
    variant = _variant(signature, dict(constants), {list(launch.arguments)[i] for i in aligned})
    return Build(launch.kernel, launch.module, variant, tuple(signature), tuple(constants), tuple(aligned), launch.num_warps)


TYPES = {F32: "fp32", BF16: "bf16", F16: "fp16", F64: "fp64", torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64"}


def _variant(signature: list[tuple[str, str]], constants: dict[str, Any], aligned: set[str]) -> str:
    """A name for people: pointer types, constants that are set, and what is not aligned."""
    pointers = dict.fromkeys(kind[1:] for _, kind in signature if kind.startswith("*") and kind != "*u8")
    flags = [k.lower() if v is True else f"{k.lower()}={v}" for k, v in constants.items() if k.isupper() and v is not False]
    loose = [name for name, kind in signature if kind.startswith("i") and name.endswith("_v") and name not in aligned]
    return " ".join(["/".join(pointers), *flags, *(["loose:" + ",".join(loose)] if loose else [])])


# -- builds ---------------------------------------------------------------------------------------------------------------


def compile_one(build: Build, target: str) -> Result:
    """Compile for a target and read what it occupies."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    kernel = kernel.load() if isinstance(kernel, _launch.Kernel) else kernel
    constants = dict(build.constants)
    if "ACC" in constants:
        constants["ACC"] = {"fp32": tl.float32, "fp64": tl.float64}[constants["ACC"]]
    attributes = {(i,): [["tt.divisibility", 16]] for i in build.aligned}
    signature = dict(build.signature)
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    # As `launch` does: a warp of an AMD GPU is twice as wide, and has no limit of registers.
    limit = _launch.register_limit([F64] if any(kind == "*fp64" for _, kind in build.signature) else [], build.num_warps)
    options: dict[str, Any] = {} if gpu.backend == "hip" else {"maxnreg": limit}
    warps = max(1, build.num_warps // 2) if gpu.backend == "hip" else build.num_warps
    compiled = triton.compile(source, target=gpu, options={"num_warps": warps, "enable_fp_fusion": True, **options})
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, loads, stores = read(compiled.asm)
    return Result(build.kernel, build.variant, target, registers, compiled.metadata.shared, spilled, loads, stores)


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    # The kernels have no arrays of their own: whatever lies on the stack was spilled there.
    ptx = asm["ptx"]
    loads, stores = (
        len(re.findall(rf"{kind}\.global[.\w:]*\.(?:v4\.b32|v2\.b64|v4\.f32|v2\.f64)", ptx)) for kind in ("ld", "st")
    )
    return int(found[1]), int(found[2]), loads, stores


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    text = asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    # Scalars may be parked in lanes of vector registers, which costs no memory; what is in memory is the private segment.
    spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
    loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    return registers, spilled, loads, len(re.findall(r"(?:global|buffer)_store_dwordx4", text))


def _work(job: tuple[Build, str]) -> Result:
    return compile_one(*job)


def compile_all(jobs: Iterable[tuple[Build, str]], processes: int | None = None) -> list[Result]:
    """Compile (build, target) pairs in parallel, in processes without the interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(processes or len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(_work, jobs, chunksize=4))


# -- table ----------------------------------------------------------------------------------------------------------------


def read_table(path: Path = TABLE) -> dict[tuple[str, str, str], Result]:
    """The committed table by (kernel, variant, target)."""
    with path.open(newline="") as file:
        rows = [Result(*row[:3], *map(int, row[3:])) for row in list(csv.reader(file))[1:]]
    return {row[:3]: row for row in rows}


def write_table(results: Iterable[Result], path: Path = TABLE) -> None:
    """Replace the table."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Result._fields)
        writer.writerows(sorted(results))


def regressions(results: Iterable[Result], budget: dict[tuple[str, str, str], Result]) -> list[str]:
    """What is worse than the budget, in words."""
    found = []
    for new in results:
        name = f"{new.kernel} [{new.variant}] {new.target}"
        if new.spilled_bytes:
            found.append(f"{name}: {new.spilled_bytes} bytes spilled")
        old = budget.get(new[:3])
        if old is None:
            found.append(f"{name}: not in the table; run python -m bench.aot --update")
            continue
        for field in ("registers", "shared_bytes"):
            if getattr(new, field) > SLACK * getattr(old, field):
                found.append(f"{name}: {field} {getattr(new, field)}, was {getattr(old, field)}")
        found += [
            f"{name}: {field} {getattr(new, field)}, was {getattr(old, field)}"
            for field in ("loads_128", "stores_128")
            if getattr(new, field) < getattr(old, field)
        ]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="replace the committed table")
    arguments = parser.parse_args()
    jobs = [(build, target) for build in builds() for target in TARGETS]
    print(f"{len(jobs) // len(TARGETS)} specialisations for {len(TARGETS)} targets; built, not run: nothing here says how fast")
    results = compile_all(jobs)
    kernels = sorted({result.kernel for result in results})
    for kernel, target in itertools.product(kernels, TARGETS):
        rows = [r for r in results if (r.kernel, r.target) == (kernel, target)]
        print(
            f"{kernel:24} {target:7} {len(rows):4} builds  registers <= {max(r.registers for r in rows):3}  shared <= "
            f"{max(r.shared_bytes for r in rows):6} B  spilled {sum(r.spilled_bytes for r in rows)} B  without 128-bit access "
            f"{sum(r.loads_128 + r.stores_128 == 0 for r in rows)}"
        )
    found = [f"{r.kernel} [{r.variant}] {r.target}: {r.spilled_bytes} bytes spilled" for r in results if r.spilled_bytes]
    if arguments.update:
        write_table(results)
    else:
        found = regressions(results, read_table())
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
