"""Tables of addresses, by which one launch reads the parameters of many layers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastflow.kernels.triton.launch import is_recording

# Addresses of parameters change with a model or its device only, so that few tables serve a process.
MAX_TABLES = 256

_tables: OrderedDict[tuple[torch.device, tuple[int, ...]], Tensor] = OrderedDict()
# A CUDA graph goes on reading the tables that it was captured with.
_captured: dict[int, Tensor] = {}
_lock = threading.Lock()


def pointer_table(tensors: Sequence[Tensor]) -> Tensor:
    """The addresses of `tensors` as (N,) int64 on their device.

    A table is kept for the next call with the same addresses. A new one is copied to the device, for which
    the host waits: tables are for parameters and buffers, whose addresses stay, and a first pass makes them
    before a capture begins. The caller keeps the tensors alive until the launch.

    Args:
        tensors: at least one, contiguous, all on one device.

    Raises:
        ValueError: a tensor is not contiguous or on another device.
    """
    device = tensors[0].device
    for tensor in tensors:
        if tensor.device != device or not tensor.is_contiguous():
            raise ValueError(
                f"tensors must be contiguous and on {device}, got strides {tensor.stride()} on "
                f"{tensor.device}"
            )
    if is_recording() or isinstance(tensors[0], FakeTensor):
        return torch.empty(len(tensors), dtype=torch.int64, device=device)
    return _table(device, tuple(tensor.data_ptr() for tensor in tensors))


def integer_table(values: Sequence[int], like: Tensor) -> Tensor:
    """Integers (N,) int64 on the device of `like`, such as the sizes of many layers.

    A table is kept as that of `pointer_table` is, and a new one makes the host wait as well.
    """
    if is_recording() or isinstance(like, FakeTensor):
        return torch.empty(len(values), dtype=torch.int64, device=like.device)
    return _table(like.device, tuple(values))


def _table(device: torch.device, values: tuple[int, ...]) -> Tensor:
    key = device, values
    with _lock:
        table = _tables.get(key)
        if table is None:
            table = torch.tensor(values, dtype=torch.int64).to(device)
            _tables[key] = table
            if len(_tables) > MAX_TABLES:
                _tables.popitem(last=False)
        else:
            _tables.move_to_end(key)
        if table.is_cuda and torch.cuda.is_current_stream_capturing():
            _captured[id(table)] = table
        return table
