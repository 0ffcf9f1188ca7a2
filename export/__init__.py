"""Export to ONNX, and running an export. Names are imported on first use: running must not load PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .onnx import export_onnx as export_onnx
    from .runtime import OnnxScorer as OnnxScorer
    from .triton_server import write_model_repository as write_model_repository

__all__ = ["OnnxScorer", "export_onnx", "write_model_repository"]

_HOMES = {"OnnxScorer": "runtime", "export_onnx": "onnx", "write_model_repository": "triton_server"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
