"""Small layouts of models: tracing takes seconds for each kind of half and for each graph."""

from __future__ import annotations

from typing import Any

from fastflow import FlowConfig


def short(num_classes: int, **changes: Any) -> FlowConfig:
    """The features of the tiny layout in three steps: two squeezes, and a split between them."""
    values: dict[str, Any] = {
        "masks": ("custom", "channel", "checkerboard"),
        "squeeze_before": (1, 2),
        "split_after": (1,),
        "widths": ((8, 8, 8),) * 3,
    }
    return FlowConfig.tiny(num_classes, **{**values, **changes})
