"""What all ops share: registration, the choice of an implementation, the accumulation dtype, fixed-order sums, argument checks.

Every op is one entry of the library ``fastflow`` per direction (forward, backward), with an `autograd.Function` in front. On a
CUDA device the entry starts Triton kernels, on a CPU it runs the reference; with ``TRITON_INTERPRET=1`` a CPU runs the kernels in
Triton's interpreter. Graphs being exported take the reference itself.

Autocast is none of the ops' business: they take any mix of dtypes (a float32 stream beside bfloat16 scales and shifts), widen
after the load and narrow at the store. `custom_fwd` with `cast_inputs` and `register_autocast` cast every argument to one dtype,
a pass over memory that would also round the stream; so neither is used, and `full_precision` keeps autocast away from the
references.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastflow.kernels._launch import has_triton, interpreted

CHUNK = 4096
# Of ATen's loops on CPUs: a multiple of the elements that one vectorised turn takes, and a thread's least share.
VECTORS, GRAIN = 32, 32768
OPS_WITH_KERNELS = (
    "affine_coupling", "coupling_step", "channel_mix", "channel_mix_masked", "channel_unmix", "squeeze2x2", "unsqueeze2x2",
    "latent_prior", "coupling_head", "norm_film_act", "pool_pixels", "average_pixels", "pool_channels", "apply_gates",
)  # fmt: skip
OPS_WITHOUT_KERNELS = ("film_act",)
BACKENDS = ("auto", "triton", "reference")

_library = torch.library.Library("fastflow", "DEF")


# -- choice of an implementation ------------------------------------------------------------------------------------------


def _check_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _check_backend(os.environ.get("FASTFLOW_BACKEND", "auto"), "FASTFLOW_BACKEND")


def set_backend(name: str) -> None:
    """Choose what runs the ops.

    Args:
        name: ``"auto"``: Triton on a CUDA device, the reference elsewhere or where a kernel has no form for the input.
            ``"triton"``: as auto, but an op that cannot run its kernel raises ValueError. ``"reference"``: plain ATen under
            autograd on every device, differentiable any number of times.

    The environment variable ``FASTFLOW_BACKEND`` sets what a process starts with.

    Raises:
        ValueError: another name.
    """
    global _backend
    _backend = _check_backend(name, "backend")


def get_backend() -> str:
    """The name given to `set_backend`."""
    return _backend


def takes_reference() -> bool:
    """Whether public functions run the differentiable reference instead of a registered op."""
    return _backend == "reference" or torch.compiler.is_exporting()


def explain(device: str) -> tuple[str, str]:
    """(implementation, why) of an op with kernels on a ``"cuda"`` or ``"cpu"`` device."""
    if _backend == "reference":
        return "reference", "the backend is set to reference"
    if not has_triton():
        return "reference", "Triton is not installed"
    if device == "cuda":
        return "triton", "CUDA device"
    if interpreted():
        return "triton", "TRITON_INTERPRET=1: kernels run in the interpreter"
    return "reference", "no CUDA device"


def runs_triton(x: Tensor) -> bool:
    """Whether ops with kernels run them for `x`."""
    return not takes_reference() and explain("cuda" if x.is_cuda else "cpu")[0] == "triton"


def use_triton(x: Tensor, unsupported: str = "") -> bool:
    """Whether kernels run for `x`.

    Args:
        x: an input.
        unsupported: why the kernel has no form for this input; empty when it has.

    Raises:
        ValueError: the backend is ``"triton"`` and the kernel cannot run.
    """
    implementation, why = explain("cuda" if x.is_cuda else "cpu")
    why = unsupported or why
    chosen = implementation == "triton" and not unsupported
    if _backend == "triton" and not chosen:
        raise ValueError(f"backend 'triton' cannot run here: {why} (x is on {x.device}); use set_backend('auto')")
    return chosen


def register(schema: str, *, reference: Callable[..., Any], triton: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Add an op to the library: `reference` and `triton` compute it, `fake` gives shapes, dtypes and strides.

    The first argument is a tensor, whose device decides.
    """
    name = schema.partition("(")[0]

    def run(x: Tensor, *rest: Any) -> Any:
        if use_triton(x):
            return triton(x, *rest)
        return reference(x, *rest)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, run, "CPU")
    _library.impl(name, run, "CUDA")
    torch.library.register_fake(f"fastflow::{name}", fake, lib=_library)
    return getattr(torch.ops.fastflow, name).default


def refuse_second_derivative(op: str) -> None:
    """Raise RuntimeError in a backward pass that is recorded: torch's `once_differentiable` would leave terms out silently."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{op} has one derivative here (create_graph=True asks for more); set_backend('reference') differentiates any number "
            "of times"
        )


def full_precision(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of `x`."""
    return torch.autocast(x.device.type, enabled=False)


# -- numbers and layouts --------------------------------------------------------------------------------------------------


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def sum_per_sample(x: Tensor) -> Tensor:
    """Sum of each sample, (B, ...) -> (B,), in a two-stage order that depends on the sample's shape only.

    ATen splits the sum of a single long row over threads, but never that of several rows; without the chunks a sample
    alone in its batch would get other bits than among others.
    """
    flat = x.flatten(1)
    whole = flat.shape[1] // CHUNK * CHUNK
    rest = flat[:, whole:].sum(dim=1)
    if whole == 0:
        return rest
    return flat[:, :whole].unflatten(1, (-1, CHUNK)).sum(dim=2).sum(dim=1) + rest


def gelu_(x: Tensor) -> Tensor:
    """GELU of a contiguous x (B, ...) on a CPU, in place, each sample's bits its own.

    ATen rounds what is left over after whole vectors, at the end of each thread's share, otherwise than the rest.
    """
    size = x[0].numel() if len(x) else 0
    if size % VECTORS:
        for sample in x:
            torch.ops.aten.gelu_(sample)
        return x
    flat, end = x.view(-1), x.numel()
    # Shares of whole vectors. ATen takes no more threads than there are shares of GRAIN elements.
    while end:
        threads = min(torch.get_num_threads(), -(-end // GRAIN))
        whole = end // (VECTORS * threads) * (VECTORS * threads)
        if whole == end:
            break
        end = whole
    for part in (flat[:end], flat[end:]) if end < x.numel() else (flat,):
        torch.ops.aten.gelu_(part)
    return x


def _strides_fit(x: Tensor, order: tuple[int, ...]) -> bool:
    expected = 1
    for dim in order:
        if x.shape[dim] != 1 and x.stride(dim) != expected:
            return False
        expected *= x.shape[dim]
    return True


def is_channels_last(x: Tensor) -> bool:
    """Whether each sample of x (B, C, H, W) lies in memory with its channels together, and not also as a plain array."""
    return not _strides_fit(x, (3, 2, 1)) and _strides_fit(x, (1, 3, 2))


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch's name of a layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_image(shape: tuple[int, ...], like: Tensor, channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised (B, C, H, W) tensor on the device of `like`."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format(channels_last))


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """`x` with its samples dense in the given layout, copied only when they are not. The batch may have any stride."""
    if _strides_fit(x, (1, 3, 2) if channels_last else (3, 2, 1)):
        return x
    return x.contiguous(memory_format=memory_format(channels_last))


def mask_bytes(mask: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """A mask for samples of `shape` (B, C, H, W) as contiguous (C, H, W) bytes; None for None."""
    return None if mask is None else mask.expand(shape[1:]).contiguous().view(torch.uint8)


# -- checks ---------------------------------------------------------------------------------------------------------------


def check_image(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is a floating-point (B, C, H, W) tensor."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating-point (B, C, H, W) tensor, got {tuple(x.shape)} {x.dtype}")
    check_dtype(name, x)


def check_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is float16, bfloat16, float32 or float64."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_mask(mask: Tensor, x: Tensor, name: str = "mask", shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless `mask` is bool, on the device of `x`, and (C, H, W) or (1, H, W) for `shape` (None: that of x)."""
    _, c, h, w = shape or x.shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((c, h, w), (1, h, w)):
        hint = "; convert a binary mask with mask.bool()" if mask.dtype != torch.bool else ""
        raise ValueError(f"{name} must be bool ({c}, {h}, {w}) or (1, {h}, {w}), got {tuple(mask.shape)} {mask.dtype}{hint}")
    check_device(name, mask, x)


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `value` is on the device of `x`."""
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def check_tables(first: tuple[str, Tensor], second: tuple[str, Tensor], columns: int, x: Tensor) -> None:
    """Raise ValueError unless two named tables are floating-point (K, columns) with one K, on the device of `x`."""
    (name, table), (other, partner) = first, second
    if table.ndim != 2 or table.shape[1] != columns or table.shape != partner.shape:
        raise ValueError(f"{name} and {other} must be (K, {columns}), got {tuple(table.shape)} and {tuple(partner.shape)}")
    for label, value in (first, second):
        check_dtype(label, value)
        check_device(label, value, x)


def check_rows(rows: Tensor, batch: int, classes: int, x: Tensor) -> None:
    """Raise ValueError unless `rows` is (batch,) int64 on the device of `x` and names rows of tables with `classes` rows.

    The values of a tensor are looked at once, however many ops take it: on a CUDA device the look waits for the device. Graphs
    that are compiled, exported or captured are not looked at.
    """
    if tuple(rows.shape) != (batch,) or rows.dtype != torch.int64:
        raise ValueError(f"rows must be ({batch},) int64, got {tuple(rows.shape)} {rows.dtype}")
    check_device("rows", rows, x)
    if torch.compiler.is_compiling() or isinstance(rows, FakeTensor) or rows.is_meta or batch == 0:
        return
    state = (classes, rows.data_ptr(), 0 if rows.is_inference() else rows._version)
    if getattr(rows, "_fastflow_rows", None) == state or (rows.is_cuda and torch.cuda.is_current_stream_capturing()):
        return
    low, high = (int(value) for value in torch.aminmax(rows))
    if low < 0 or high >= classes:
        raise ValueError(f"rows must lie from 0 to {classes - 1}, the rows of the tables, got {low if low < 0 else high}")
    rows._fastflow_rows = state  # type: ignore[attr-defined]


def check_same_shape(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `value` is a floating-point tensor with the shape and device of `x`."""
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
    check_dtype(name, value)
    check_device(name, value, x)
