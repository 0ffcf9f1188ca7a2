"""The shortest layout that holds what longer ones do."""

from __future__ import annotations

from typing import Any

from fastflow import FlowConfig


def short_config(task: str, **changes: Any) -> FlowConfig:
    """Three steps: one channel, four after a squeeze, two after a split."""
    masks = ("custom", "checkerboard", "channel")
    values = {"masks": masks, "squeeze_before": (1,), "split_after": (1,), "widths": ((8, 8, 8),) * 3}
    return FlowConfig.tiny(3, task=task, **{**values, **changes})
