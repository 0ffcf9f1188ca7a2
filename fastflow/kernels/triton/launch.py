"""How kernels are declared and started: Triton is imported at the first launch, its options are fixed.

A kernel is a plain function under `kernel`; `tl` in its body is `triton.language`, which is put into the
module when the first of its kernels starts. Programs are numbered on grid axis 0 alone, since axes 1 and 2
end at 65,535, and every address is int64.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

# These arguments differ between shapes and say nothing about alignment, so that one build serves all their
# values.
UNSPECIALIZED = ("n_chunks", "channels", "pixels", "width", "batch", "active", "sample_stride", "n_parts")


class Kernel:
    """A Triton kernel before Triton is there."""

    def __init__(self, fn: Callable[..., None]) -> None:
        self.fn = fn
        self.compiled: Any = None

    def load(self) -> Any:
        """The kernel as Triton's object; imports Triton, and builds nothing before it is started."""
        with _loading:
            if self.compiled is None:
                _load_module(self.fn.__module__)
        return self.compiled


def kernel(fn: Callable[..., Any]) -> Any:
    """Declare a Triton kernel, or a function that kernels call."""
    return Kernel(fn)


# Backward passes run in threads of their own. The lock is re-entrant because loading a module loads what it
# imports.
_loading = threading.RLock()


def _load_module(name: str) -> None:
    import triton
    import triton.language

    namespace = vars(sys.modules[name])
    found = {key: value for key, value in namespace.items() if isinstance(value, Kernel)}
    namespace["tl"] = triton.language
    for item in found.values():
        if item.fn.__module__ == name:
            arguments = item.fn.__code__.co_varnames[: item.fn.__code__.co_argcount]
            item.compiled = triton.jit(
                item.fn, do_not_specialize=[n for n in UNSPECIALIZED if n in arguments]
            )
    for key, item in found.items():
        # A kernel calls another by its name in the module, where Triton must find its own object.
        namespace[key] = item.load()


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed; does not import it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def autotuned() -> bool:
    """Whether the number of warps is measured instead of looked up.

    Sums may then differ in their last bits between machines.
    """
    return os.environ.get("FASTFLOW_AUTOTUNE") == "1" and not interpreted()


class Launch(NamedTuple):
    """One start of a kernel, as `recording` notes it."""

    kernel: str
    module: str
    programs: int
    arguments: dict[str, Any]
    num_warps: int


_records: list[list[Launch]] = []


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note what would be launched instead of launching it, for builds and counts without a GPU.

    Results of the ops are undefined while this lasts.
    """
    launches: list[Launch] = []
    _records.append(launches)
    try:
        yield launches
    finally:
        _records.pop()


def is_recording() -> bool:
    """Whether launches are noted instead of made, see `recording`."""
    return bool(_records)


class _Observed(threading.local):
    watcher: Any = None


# The watcher of this thread sees its launches, see `fastflow.kernels.watching`.
observed = _Observed()
# Whether this process has launched a kernel on an NVIDIA GPU: before that, and elsewhere, nobody looks for a
# plan.
has_launched = False

_tuned: dict[tuple[str, str], Any] = {}


def _tune(compiled: Any, module: str, name: str) -> Any:
    import triton

    if (module, name) not in _tuned:
        # Outputs are only ever written, so running a candidate twice does no harm.
        key = [p for p in compiled.arg_names if p.endswith("_v") or p in UNSPECIALIZED]
        configs = [triton.Config({}, num_warps=warps) for warps in (1, 2, 4, 8)]
        _tuned[module, name] = triton.autotune(configs=configs, key=key, cache_results=True)(compiled)
    return _tuned[module, name]


def launch(
    item: Any, programs: int, device_of: Tensor, num_warps: int, *values: Any, **constants: Any
) -> None:
    """Start `programs` programs of a kernel on the device of a tensor; none when `programs` is 0.

    Args:
        item: the kernel.
        programs: length of grid axis 0.
        device_of: a tensor on the device that runs it.
        num_warps: warps per program.
        values: the kernel's arguments in order.
        constants: its constexpr arguments.

    Raises:
        ValueError: more programs than a grid axis holds.
    """
    global has_launched
    if programs == 0:
        return
    if programs >= 2**31:
        raise ValueError(f"the input needs {programs} programs, a grid holds {2**31 - 1}; split the batch")
    if _records:
        fn = item.fn
        names = fn.__code__.co_varnames if isinstance(item, Kernel) else item.arg_names
        arguments = dict(zip(names, values, strict=False)) | constants
        _records[-1].append(Launch(fn.__name__, fn.__module__, programs, arguments, num_warps))
        return
    compiled = item.load() if isinstance(item, Kernel) else item
    # Whether a product and a sum become one FMA decides bits of results, so no compiler's default decides it.
    options: dict[str, Any] = {"enable_fp_fusion": True}
    if autotuned():
        compiled = _tune(compiled, item.fn.__module__, item.fn.__name__)
    else:
        # A warp of an AMD GPU is twice as wide, and the table counts threads.
        options["num_warps"] = max(1, num_warps // 2) if torch.version.hip else num_warps
    if torch.version.hip is None:
        options["maxnreg"] = register_limit(
            (value.dtype for value in values if isinstance(value, Tensor)), num_warps
        )
    elsewhere = device_of.is_cuda and device_of.get_device() != torch.cuda.current_device()
    with torch.cuda.device_of(device_of) if elsewhere else contextlib.nullcontext():
        built = compiled[(programs,)](*values, **constants, **options)
    has_launched = has_launched or (torch.version.hip is None and not interpreted())
    if observed.watcher is not None:
        bound = dict(zip(compiled.arg_names, values, strict=False)) | constants
        observed.watcher.note_launch(compiled, built, programs, bound)


def register_limit(dtypes: Iterable[torch.dtype], num_warps: int) -> int:
    """Registers per thread on NVIDIA GPUs: left to itself, ptxas spills a few bytes for one more block.

    A block's threads share 65,536 registers.
    """
    return min(255 if torch.float64 in dtypes else 168, 65_536 // (32 * num_warps))


def triton_dtype(dtype: torch.dtype) -> Any:
    """Triton's name of an accumulation dtype."""
    import triton.language

    return triton.language.float64 if dtype == torch.float64 else triton.language.float32


def vector_width(*strides: int) -> int:
    """The largest power of two, at most 8, that divides every stride.

    Runs of so many elements never straddle the end of a row.
    """
    width = 8
    while width > 1 and any(stride % width for stride in strides):
        width //= 2
    return width


def needs_int64_offsets(n: int, block: int) -> bool:
    """Whether offsets within a sample of n elements, the last block rounded up, pass int32.

    Kernels use int64 only there, since divisions in it are slow.
    """
    return n + block >= 2**31


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(0, n - 1).bit_length()
