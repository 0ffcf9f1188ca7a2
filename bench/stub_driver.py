"""Triton's own CUDA driver on a libcuda whose launches do nothing, for the host's part of a launch without a
GPU.

Everything that a launch costs the host is there: Triton's look-up of the build, its C launcher, allocations.
Tensors are those of a CPU, kernels are not compiled, and results are undefined. It takes a process of its
own, whose environment `environment` gives.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("stub_cuda.c")


def missing() -> str:
    """Why the stub cannot be built here; empty where it can."""
    if shutil.which("gcc") is None:
        return "gcc is not installed"
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


def environment(folder: Path) -> dict[str, str]:
    """Build the stub into a folder. The environment of a process that may call `install`."""
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-w", "-o", library, SOURCE], check=True)
    paths = os.pathsep.join(p for p in (str(folder), os.environ.get("LD_LIBRARY_PATH", "")) if p)
    found = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    # Triton builds its driver against the stub, and must not find one that it built for a GPU.
    cache = {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    return found | cache | {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": paths}


class _Metadata(NamedTuple):
    """The part of Triton's metadata of a build that its launcher and `launch` read."""

    num_ctas: int = 1
    global_scratch_size: int = 0
    global_scratch_align: int = 1
    profile_scratch_size: int = 0
    profile_scratch_align: int = 1
    launch_cooperative_grid: bool = False
    launch_pdl: bool = False


class StubKernel:
    """Stands for a compiled kernel, with Triton's own launcher."""

    def __init__(self, source: Any, options: dict[str, Any], function: int) -> None:
        from triton.runtime import driver

        self.src, self.name, self.function = source, source.fn.__name__, function
        self.packed_metadata = options["num_warps"], options["num_ctas"], 0
        self.run = driver.active.launcher_cls(source, _Metadata())

    def launch_metadata(self, *launch: Any) -> None:
        """Nobody asks for it."""


def install() -> list[StubKernel]:
    """Let ops run their kernels on CPU tensors, as on an sm_90.

    Returns a list that gets every build from here on; the first has the function 1.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver

    from fastflow.kernels import registry

    class Driver(CudaDriver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: (9, 0)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    built: list[StubKernel] = []

    def compile_nothing(source: Any, target: Any = None, options: Any = None, **rest: Any) -> StubKernel:
        built.append(StubKernel(source, options, len(built) + 1))
        return built[-1]

    triton.runtime.driver.set_active(Driver())
    triton.compiler.compile = compile_nothing
    registry.explain = lambda device: ("triton", "stub")
    return built


def launches() -> int:
    """How many launches the driver was asked for so far."""
    library = ctypes.CDLL("libcuda.so.1")
    library.stub_launches.restype = ctypes.c_long
    return int(library.stub_launches())
