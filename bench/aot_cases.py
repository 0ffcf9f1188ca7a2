"""The launches that `bench.aot` builds kernels for, and what Triton would specialise each of them on.

`CASES` call the ops' launchers over dtypes, layouts, sizes and options, while `recording` notes the launches
that they would make. A case list holds every branch that changes a program, not every combination of them:
comments say which do not matter.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.aot_features import cbam_cases, norm_cases, pool_cases, sampled_norm_cases
from bench.aot_mixing import lu_mixing_cases
from bench.aot_parts import BF16, DTYPES, F16, F32, F64, FLOAT32_STREAM, Case
from bench.aot_parts import image as _image
from bench.aot_parts import launcher as _launcher
from bench.aot_pyramids import CASES as PYRAMID_CASES
from bench.aot_tables import table_cases
from fastflow.kernels.triton import launch as launching
from fastflow.numerics import acc_dtype

TYPES = {
    F32: "fp32",
    BF16: "bf16",
    F16: "fp16",
    F64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}


class Build(NamedTuple):
    """One specialisation of a kernel.

    Attributes:
        kernel: name of the function.
        module: that it is in.
        variant: a name for people, unique for the kernel.
        signature: type of each argument, ``"constexpr"`` for constants.
        constants: arguments that are compiled in.
        aligned: indices of arguments that 16 divides.
        num_warps: warps per program.
    """

    kernel: str
    module: str
    variant: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    num_warps: int


# -- couplings -----------------------------------------------------------------------------------------------


def _coupling_cases() -> Iterator[Case]:
    for (stream, net), inverse, ending in itertools.product(
        DTYPES, (False, True), ("nothing", "next", "affine")
    ):
        layouts = [(False, False)] if ending == "affine" else [(False, False), (True, True), (False, True)]
        # Other layouts, and sizes that are no multiple of a vector, change addressing only.
        for x_last, net_last in layouts if (stream, net) in FLOAT32_STREAM else layouts[:1]:
            channels = 1 if ending == "affine" else 16
            shapes = [(2, channels, 32, 32)]
            if (stream, net) == (F32, F32) and not x_last and not net_last:
                shapes.append((2, channels, 23, 23))
            for shape in shapes:
                yield from _couple(shape, stream, net, inverse, ending, x_last, net_last)


def _couple(
    shape: tuple[int, ...],
    stream: torch.dtype,
    net: torch.dtype,
    inverse: bool,
    ending: str,
    x_last: bool,
    net_last: bool,
) -> Iterator[Case]:
    x, masked = _image(shape, stream, x_last), _image(shape, net, x_last)
    raw, shift = _image(shape, net, net_last), _image(shape, net, net_last)
    mask = torch.zeros(shape[1:], dtype=torch.bool)
    next_mask = None if ending == "nothing" else mask
    affine = torch.ones(2, dtype=acc_dtype(stream)) if ending == "affine" else None
    logdet = torch.zeros(shape[0], dtype=acc_dtype(stream))
    arguments = (x, raw, shift, mask, next_mask, affine, 0.5, inverse)
    yield lambda: _launcher("affine_coupling")(*arguments, net)
    yield lambda: _launcher("affine_coupling_backward")(x, logdet, masked, *arguments)


# -- mixes ---------------------------------------------------------------------------------------------------


def _mix_cases() -> Iterator[Case]:
    for stream, net in DTYPES:
        channels = (1, 2, 4, 8, 16, 32, 64) if (stream, net) == (F32, F32) else (1, 4, 8, 16, 64)
        for c, squeeze, inverse, last in itertools.product(channels, *[(False, True)] * 3):
            if squeeze and c not in (4, 8, 16):
                continue
            if last and (c not in (4, 16) or (stream, net) != (F32, F32)):
                continue
            yield from _mix(c, stream, net, squeeze, inverse, last)
    yield from _mix(3, F32, F32, False, False, False, size=23)
    yield from _mix(12, F32, F32, False, False, False, size=23)


def _mix(
    c: int, stream: torch.dtype, net: torch.dtype, squeeze: bool, inverse: bool, last: bool, size: int = 32
) -> Iterator[Case]:
    mixed = (2, c, size, size)
    plain = (2, c // 4, 2 * size, 2 * size) if squeeze else mixed
    source, result = (mixed, plain) if inverse else (plain, mixed)
    x, y, masked = _image(source, stream, last), _image(result, stream, last), _image(result, net, last)
    weight, bias = torch.eye(c, dtype=stream), torch.zeros(c, dtype=stream)
    for mask in (None,) if inverse else (None, torch.zeros(result[1:], dtype=torch.bool)):
        arguments = (x, weight, bias, mask, squeeze, inverse)
        yield lambda arguments=arguments: _launcher("channel_mix")(*arguments, net)
        yield lambda arguments=arguments: _launcher("channel_mix_backward")(y, masked, *arguments)


# -- heads ---------------------------------------------------------------------------------------------------


def _head_cases() -> Iterator[Case]:
    for (stream, net), inverse, ending in itertools.product(
        DTYPES, (False, True), ("nothing", "next", "affine")
    ):
        # The other dtypes take the smallest and the largest program.
        if (stream, net) in FLOAT32_STREAM or (inverse, ending) in ((False, "next"), (True, "affine")):
            channels = 1 if ending == "affine" else 16
            yield from _head((32, channels, 32, 32), stream, net, inverse, ending)
    for stream, net in FLOAT32_STREAM:
        # Batches, images and features that are no multiple of a block are programs of their own.
        yield from _head((3, 1, 23, 23), stream, net, False, "affine")
        yield from _head((3, 16, 23, 23), stream, net, False, "next", features=48)


def _head(
    shape: tuple[int, ...],
    stream: torch.dtype,
    net: torch.dtype,
    inverse: bool,
    ending: str,
    features: int = 64,
) -> Iterator[Case]:
    batch, size, acc = shape[0], shape[1] * shape[2] * shape[3], acc_dtype(stream)
    x, masked, logdet = _image(shape, stream), _image(shape, net), torch.empty(batch, dtype=acc)
    f, table = torch.empty(batch, features, dtype=net), torch.empty(7, size, dtype=net)
    # Weights stay in the stream's dtype under autocast.
    weight = torch.empty(size, features, dtype=stream)
    label_index, mask = torch.zeros(batch, dtype=torch.int64), torch.zeros(shape[1:], dtype=torch.bool)
    order = torch.arange(size, dtype=torch.int32)
    next_mask = None if ending == "nothing" else mask
    affine = torch.ones(2, dtype=acc) if ending == "affine" else None
    heads = (f, f, weight, weight, table, table, label_index)
    arguments = (x, *heads, mask, order, size // 2, next_mask, affine, 0.5, inverse)
    kept = logdet
    yield lambda: _launcher("coupling_head")(*arguments, net, False)
    yield lambda: _launcher("coupling_head_backward")(x, logdet, masked, kept, *arguments)


# -- ops without parameters ----------------------------------------------------------------------------------


def _other_cases() -> Iterator[Case]:
    for dtype in (F32, BF16, F16, F64):
        z, grad = torch.empty(2, 4096, dtype=dtype), torch.empty(2, dtype=acc_dtype(dtype))
        yield lambda z=z: _launcher("latent_prior")(z)
        yield lambda z=z, grad=grad: _launcher("latent_prior_backward")(grad, z)
        for size in (32, 46):
            x, y = _image((2, 4, size, size), dtype), _image((2, 16, size // 2, size // 2), dtype)
            yield lambda x=x: _launcher("squeeze2x2")(x)
            yield lambda y=y: _launcher("unsqueeze2x2")(y)


CASES = (
    _coupling_cases, _mix_cases, _head_cases, norm_cases, sampled_norm_cases, pool_cases, _other_cases,
    table_cases, cbam_cases, lu_mixing_cases, *PYRAMID_CASES,
)  # fmt: skip


# -- specialisations -----------------------------------------------------------------------------------------


def builds() -> list[Build]:
    """Every specialisation that `CASES` would launch, each once."""
    before = os.environ.get("TRITON_INTERPRET")
    # Launchers take kernels for tensors on a CPU only under the interpreter. No kernel runs while launches
    # are recorded.
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with launching.recording() as launches:
            for case in itertools.chain.from_iterable(cases() for cases in CASES):
                case()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    found = {_specialise(launch) for launch in launches}
    return sorted(found, key=lambda build: (build.kernel, build.variant))


def _specialise(launch: launching.Launch) -> Build:
    """The types, constants and alignments that Triton would derive from a launch's arguments."""
    import triton.language as tl

    signature, constants, aligned = [], [], []
    for index, (name, value) in enumerate(launch.arguments.items()):
        if isinstance(value, Tensor):
            signature.append((name, "*" + TYPES[value.dtype]))
            if value.data_ptr() % 16 == 0:
                aligned.append(index)
        elif name.isupper() or value is None or (value == 1 and name not in launching.UNSPECIALIZED):
            signature.append((name, "constexpr"))
            named = {tl.float32: "fp32", tl.float64: "fp64"}.get(value, value) if name == "ACC" else value
            constants.append((name, named))
        else:
            signature.append((name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and name not in launching.UNSPECIALIZED:
                aligned.append(index)
    variant = _variant(signature, dict(constants), {list(launch.arguments)[i] for i in aligned})
    parts = tuple(signature), tuple(constants), tuple(aligned)
    return Build(launch.kernel, launch.module, variant, *parts, launch.num_warps)


def _variant(signature: list[tuple[str, str]], constants: dict[str, Any], aligned: set[str]) -> str:
    """A name for people: pointer types, constants that are set, and integers that are not aligned."""
    pointers = dict.fromkeys(kind[1:] for _, kind in signature if kind.startswith("*") and kind != "*u8")
    flags = [
        name.lower() if value is True else f"{name.lower()}={value}"
        for name, value in constants.items()
        if name.isupper() and value is not False
    ]
    loose = [
        name
        for name, kind in signature
        if kind.startswith("i") and name.endswith("_v") and name not in aligned
    ]
    return " ".join(["/".join(pointers), *flags, *(["loose:" + ",".join(loose)] if loose else [])])
