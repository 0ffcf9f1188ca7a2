"""fastflow: fused normalizing-flow kernels and MAGIC-Flow, a class-conditional flow for brain-scan slices.

Public names are imported on first use, so that `import fastflow` loads neither torch nor Triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastflow import kernels as kernels
    from fastflow.models.config import FlowConfig as FlowConfig
    from fastflow.models.magic_flow import MagicFlow as MagicFlow

__version__ = "0.1.0"
__all__ = ["FlowConfig", "MagicFlow", "__version__", "kernels"]

_HOMES = {"FlowConfig": "fastflow.models.config", "MagicFlow": "fastflow.models.magic_flow"}
_MODULES = ("archive", "data", "evaluation", "export", "kernels", "models", "runtime", "training")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastflow.{name}")
    raise AttributeError(f"module 'fastflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
