"""timm beside a CPU build of torch.

torchvision's wheel of the package index is built for CUDA. Beside a CPU build of torch it registers no
operators, and importing it fails on the first one that it has a fake of. Declaring these two is enough,
since no classifier calls them.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

import torch

OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def declare_operators() -> tuple[str, ...]:
    """Declare the operators that torchvision needs while it is imported, where nothing has them.

    Returns:
        The names that were missing.
    """
    missing = tuple(name for name in OPERATORS if not hasattr(torch.ops.torchvision, name))
    for name in missing:
        torch.library.define(f"torchvision::{name}", SCHEMA)
    return missing


def import_timm() -> ModuleType:
    """timm, which never asks a hub for anything.

    Raises:
        ImportError: timm or torchvision is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError:
        raise
    except (ImportError, RuntimeError):
        # A build of torchvision that fits the torch has the operators, so that they are declared only here.
        declare_operators()
        return importlib.import_module("timm")
