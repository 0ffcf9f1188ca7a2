"""Checks of arguments: each raises ValueError that names the argument, what came and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastflow.kernels.transforms import plain_values
from fastflow.kernels.watching import check_values


def check_image(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is a floating-point (B, C, H, W) tensor."""
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point (B, C, H, W) tensor, got {tuple(x.shape)} {x.dtype}"
        )
    check_dtype(name, x)


def check_pooled_image(x: Tensor) -> None:
    """Raise ValueError unless `x` is a floating-point (B, C, H, W) tensor with a channel and a pixel."""
    check_image("x", x)
    channels, h, w = x.shape[1:]
    if channels == 0 or not 0 < h * w < 2**31:
        raise ValueError(f"x must have a channel and from 1 to 2**31 - 1 pixels, got {tuple(x.shape)}")


def check_dtype(name: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is float16, bfloat16, float32 or float64."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_device(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `value` is on the device of `x`."""
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of x, {x.device}, got {value.device}")


def check_mask(mask: Tensor, x: Tensor, name: str = "mask", shape: tuple[int, ...] | None = None) -> None:
    """Raise ValueError unless `mask` is bool, on the device of `x`, and (C, H, W) or (1, H, W).

    C, H and W are those of `shape` (B, C, H, W), or of `x` where it is None.
    """
    _, c, h, w = shape or x.shape
    if mask.dtype != torch.bool or tuple(mask.shape) not in ((c, h, w), (1, h, w)):
        hint = "; convert a binary mask with mask.bool()" if mask.dtype != torch.bool else ""
        raise ValueError(
            f"{name} must be bool ({c}, {h}, {w}) or (1, {h}, {w}), "
            f"got {tuple(mask.shape)} {mask.dtype}{hint}"
        )
    check_device(name, mask, x)


def check_same_shape(name: str, value: Tensor, x: Tensor) -> None:
    """Raise ValueError unless `value` is a floating-point tensor with the shape and device of `x`."""
    if value.shape != x.shape:
        raise ValueError(f"{name} must have the shape of x, {tuple(x.shape)}, got {tuple(value.shape)}")
    check_dtype(name, value)
    check_device(name, value, x)


def check_logits(name: str, logits: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise ValueError unless `logits` are floating-point with this shape, on the device of `x`."""
    if tuple(logits.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(logits.shape)}")
    check_dtype(name, logits)
    check_device(name, logits, x)


def check_tables(first: tuple[str, Tensor], second: tuple[str, Tensor], columns: int, x: Tensor) -> None:
    """Raise ValueError unless two tables are floating-point (K, columns) with one K, on the device of `x`."""
    (name, table), (other, partner) = first, second
    if table.ndim != 2 or table.shape[1] != columns or table.shape != partner.shape:
        raise ValueError(
            f"{name} and {other} must be (K, {columns}), got {tuple(table.shape)} and {tuple(partner.shape)}"
        )
    for label, value in (first, second):
        check_dtype(label, value)
        check_device(label, value, x)


def check_label_index(label_index: Tensor, batch: int, classes: int, x: Tensor) -> None:
    """Raise ValueError unless `label_index` is (batch,) int64 from 0 to classes - 1, on the device of `x`.

    The values of a tensor are looked at once, however many ops take it, since on a CUDA device the look waits
    for the device; those of a tensor made under `torch.inference_mode`, whose changes nobody counts, each
    time. Values are not looked at in graphs that are compiled, exported or captured.
    """
    if tuple(label_index.shape) != (batch,) or label_index.dtype != torch.int64:
        raise ValueError(
            f"label_index must be ({batch},) int64, got {tuple(label_index.shape)} {label_index.dtype}"
        )
    check_device("label_index", label_index, x)
    if batch == 0 or _is_traced(label_index):
        return
    check_values(_check_label_values, plain_values(label_index), classes)


def _check_label_values(label_index: Tensor, classes: int) -> None:
    state = None if label_index.is_inference() else _label_state(label_index, classes)
    if state is not None and getattr(label_index, "_fastflow_checked", None) == state:
        return
    if label_index.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    low, high = (int(value) for value in torch.aminmax(label_index))
    if low < 0 or high >= classes:
        raise ValueError(
            f"label_index must lie from 0 to {classes - 1}, the rows of the tables, "
            f"got {low if low < 0 else high}"
        )
    if state is not None:
        label_index._fastflow_checked = state  # type: ignore[attr-defined]


def mark_label_index(label_index: Tensor, classes: int) -> Tensor:
    """`label_index` (B,), declared to lie from 0 to classes - 1: no op waits for a device to look, then.

    A tensor made under `torch.inference_mode` may change without a trace, so that a copy of it is returned.
    """
    if _is_traced(label_index):
        return label_index
    label_index = counted(label_index)
    values = plain_values(label_index)
    values._fastflow_checked = _label_state(values, classes)  # type: ignore[attr-defined]
    return label_index


def counted(x: Tensor) -> Tensor:
    """`x`, or a copy where it was made under `torch.inference_mode`: writes to the result are counted."""
    if _is_traced(x) or not x.is_inference():
        return x
    with torch.inference_mode(False):
        return x.clone()


def _is_traced(x: Tensor) -> bool:
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.is_meta


def _label_state(label_index: Tensor, classes: int) -> tuple[int, int, int]:
    return classes, label_index.data_ptr(), label_index._version
