"""Builds every kernel ahead of time for six GPU targets: ``python -m bench.aot [--update]``. Needs Triton, no
GPU.

The signatures, alignments and constants are those of the launches that `bench/aot_cases.py` lists. Each is
compiled for sm_80, sm_86, sm_89, sm_90, sm_100 and gfx942. A row of ``bench/aot.csv`` holds one kernel,
variant and target: registers, shared memory, spilled bytes and 128-bit global accesses. The committed table
is the budget: a spill, lost 128-bit accesses, or registers and shared memory more than `SLACK` above it fail
`tests/kernels/test_aot.py` and this command.

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
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.aot_cases import Build, builds
from fastflow.kernels.triton import launch as launching

__all__ = [
    "TABLE",
    "TARGETS",
    "Build",
    "Result",
    "builds",
    "compile_all",
    "compile_one",
    "read_table",
    "regressions",
    "write_table",
]

TABLE = Path(__file__).with_name("aot.csv")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
SLACK = 1.1


class Result(NamedTuple):
    """Registers, memory and accesses of a build for one target; a row of the table."""

    kernel: str
    variant: str
    target: str
    registers: int
    shared_bytes: int
    spilled_bytes: int
    loads_128: int
    stores_128: int


# -- builds --------------------------------------------------------------------------------------------------


def compile_one(build: Build, target: str) -> Result:
    """Compile for a target and read its registers, memory and accesses."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(build.module), build.kernel)
    kernel = kernel.load() if isinstance(kernel, launching.Kernel) else kernel
    constants = dict(build.constants)
    if "ACC" in constants:
        constants["ACC"] = {"fp32": tl.float32, "fp64": tl.float64}[constants["ACC"]]
    if target.startswith("gfx") and "PRECISION" in constants:
        constants["PRECISION"] = "ieee"
    attributes = {(i,): [["tt.divisibility", 16]] for i in build.aligned}
    signature = dict(build.signature)
    signature = {name: signature[name] for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attributes)
    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    # As `launch` does: a warp of an AMD GPU is twice as wide, and has no limit of registers.
    dtypes = [torch.float64] if any(kind == "*fp64" for _, kind in build.signature) else []
    limit = launching.register_limit(dtypes, build.num_warps)
    options: dict[str, Any] = {} if gpu.backend == "hip" else {"maxnreg": limit}
    warps = max(1, build.num_warps // 2) if gpu.backend == "hip" else build.num_warps
    compiled = triton.compile(
        source, target=gpu, options={"num_warps": warps, "enable_fp_fusion": True, **options}
    )
    read = _read_amd if target.startswith("gfx") else _read_nvidia
    registers, spilled, loads, stores = read(compiled.asm)
    return Result(
        build.kernel, build.variant, target, registers, compiled.metadata.shared, spilled, loads, stores
    )


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(asm["cubin"])
        cubin.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[:200]!r}")
    # The kernels have no arrays of their own: whatever lies on the stack was spilled there.
    ptx = asm["ptx"]
    loads, stores = (
        len(re.findall(rf"{kind}\.global[.\w:]*\.(?:v4\.b32|v2\.b64|v4\.f32|v2\.f64)", ptx))
        for kind in ("ld", "st")
    )
    return int(found[1]), int(found[2]), loads, stores


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, int, int]:
    text = asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])  # type: ignore[index]
    # Scalars may be parked in lanes of vector registers, which costs no memory; what is in memory is the
    # private segment.
    spilled = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text)[1])  # type: ignore[index]
    loads = len(re.findall(r"(?:global|buffer)_load_dwordx4", text))
    return registers, spilled, loads, len(re.findall(r"(?:global|buffer)_store_dwordx4", text))


def _work(job: tuple[Build, str]) -> Result:
    return compile_one(*job)


def compile_all(jobs: Iterable[tuple[Build, str]], processes: int | None = None) -> list[Result]:
    """Compile (build, target) pairs in parallel, in processes without the interpreter."""
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(
        processes or len(os.sched_getaffinity(0)), mp_context=get_context("spawn")
    ) as pool:
        return list(pool.map(_work, jobs, chunksize=4))


# -- table ---------------------------------------------------------------------------------------------------


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
    """Sentences on each result that is worse than the budget."""
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


def _print_summary(results: list[Result]) -> None:
    """One line per kernel and target."""
    for kernel, target in itertools.product(sorted({result.kernel for result in results}), TARGETS):
        rows = [row for row in results if (row.kernel, row.target) == (kernel, target)]
        narrow = sum(row.loads_128 + row.stores_128 == 0 for row in rows)
        print(
            f"{kernel:24} {target:7} {len(rows):4} builds  "
            f"registers <= {max(row.registers for row in rows):3}  "
            f"shared <= {max(row.shared_bytes for row in rows):6} B  "
            f"spilled {sum(row.spilled_bytes for row in rows)} B  without 128-bit access {narrow}"
        )


def main() -> int:
    """Compile everything; compare with the table, or replace it."""
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="replace the committed table")
    arguments = parser.parse_args()
    jobs = [(build, target) for build in builds() for target in TARGETS]
    count = f"{len(jobs) // len(TARGETS)} specialisations for {len(TARGETS)} targets"
    print(f"{count}; built, not run: nothing here says how fast")
    results = compile_all(jobs)
    _print_summary(results)
    if arguments.update:
        write_table(results)
        # A spill is an error in a new table too.
        budget = {result[:3]: result for result in results}
    else:
        budget = read_table()
    found = regressions(results, budget)
    print(*found, sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
