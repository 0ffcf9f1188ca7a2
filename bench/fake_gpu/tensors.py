"""Models of fake tensors on ``"cuda"``, and a torch that believes in the device; import it after `load`."""

from __future__ import annotations

import contextlib
import linecache
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.cuda.amp.common
import torch.nn.utils.clip_grad
import torch.utils._foreach_utils
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastflow import FlowConfig, MagicFlow
from fastflow.models.layers import ActNorm

ROOT = Path(__file__).parents[2]
# Code that watches ops; what it watches lies further out.
MACHINERY = tuple(str(ROOT / "bench" / name) for name in ("capture_lint", "fake_gpu", "launches", "roofline"))
# Files of torch between code that asks for a value and the mode that sees it.
DISPATCH = ("torch/_compile.py", "torch/_dynamo", "torch/_ops.py", "torch/_tensor.py", "torch/utils/_")
CLASSES = 7
DEVICE = "cuda"


class _FakeMode(FakeTensorMode):
    # As where there is no device, `torch.tensor(..., device="cuda")` is a tensor of the host and a copy.
    avoid_device_init = True  # type: ignore[assignment]


@contextlib.contextmanager
def fake_gpu(capturing: bool = False) -> Iterator[None]:
    """A block whose new tensors are fake, and in which torch says that it has a GPU.

    Args:
        capturing: whether the current stream says that a graph is captured.
    """
    replaced: tuple[tuple[Any, str, Any], ...] = (
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "mem_get_info", lambda *_: (80 << 30, 80 << 30)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "is_current_stream_capturing", lambda: capturing),
        # Real tensors take the form of an op for lists.
        (torch.utils._foreach_utils, "_has_foreach_support", lambda tensors, device: True),
        (torch.nn.utils.clip_grad, "_has_foreach_support", lambda tensors, device: True),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
    )
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(_FakeMode(allow_non_fake_inputs=True))
        yield


def build_model(config: FlowConfig) -> MagicFlow:
    """A model that has seen data, on a CPU; weights of its convolutions are not drawn."""
    torch.manual_seed(0)
    # Memory that nobody writes is never taken from the system.
    with mock.patch.object(nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor):
        model = MagicFlow(config)
    for module in model.modules():
        if isinstance(module, ActNorm):
            module.mark_initialized()
    return model


def to_fake_gpu(module: nn.Module) -> None:
    """Replace parameters and buffers by fake ones on the GPU; must be called within `fake_gpu`."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                fake = torch.empty_strided(
                    parameter.shape, parameter.stride(), dtype=parameter.dtype, device=DEVICE
                )
                part._parameters[name] = nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty_strided(
                    buffer.shape, buffer.stride(), dtype=buffer.dtype, device=DEVICE
                )


def has_no_fake_form(name: str) -> bool:
    """Whether an op has no form for fake tensors; it changes its arguments only, and may be passed over."""
    return name.startswith("aten::_fused_adam")


def frames() -> Iterator[types.FrameType]:
    """The frames of the caller's thread, the innermost first."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def own_frames() -> Iterator[types.FrameType]:
    """The frames of the caller's thread that run this repository's code, apart from modes that look on."""
    for frame in frames():
        path = frame.f_code.co_filename
        if is_ours(frame) and not path.startswith(MACHINERY):
            yield frame


def is_ours(frame: types.FrameType) -> bool:
    """Whether a frame belongs to this repository, not to a library."""
    path = frame.f_code.co_filename
    return path.startswith(str(ROOT)) and "site-packages" not in path


def source_line(frame: types.FrameType) -> str:
    """The line of source that a frame runs."""
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def host_answer(value: torch.Tensor) -> bool | int | float:
    """An answer for code that asks a fake tensor for its value: that all is well, or a zero or a one.

    A line with ``if not`` wants to hear yes, any other line no.
    """
    if value.dtype == torch.bool:
        return "if not " in next(source_line(frame) for frame in frames() if _asks(frame))
    return 1.0 if value.is_floating_point() else 0


def _asks(frame: types.FrameType) -> bool:
    path = frame.f_code.co_filename
    return not path.startswith(MACHINERY) and not any(part in path for part in DISPATCH)
