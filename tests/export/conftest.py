"""Exports to test with: one made by hand, and one of the smallest model with every kind of part."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")

from tests.export.handmade import CLASSES, PREPROCESS, write_export


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export made by hand that fits `scans`. Do not write into it."""
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained but initialised model of two steps that fits `scans`. Do not write into it.

    Its halves are of all kinds: those of a custom mask move different numbers of pixels, the first of them is
    computed once per image, and a split follows a squeeze.
    """
    import torch

    from fastflow import MagicFlow
    from tests.export.layouts import short

    torch.manual_seed(0)
    layout = {"masks": ("custom", "channel"), "squeeze_before": (1,), "widths": ((8, 8, 8),) * 2}
    model = MagicFlow(short(2, class_names=CLASSES, **layout))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.initialize(torch.rand(8, 1, 16, 16) * 2 - 1)
    model.metadata["preprocess"] = PREPROCESS
    # Any image is within these statistics.
    layout_of_training = {"mean": [0.0] * 64, "patterns": []}
    model.metadata["images"] = {
        "format": 1,
        "volumes": 8,
        "slices": PREPROCESS["slices"],
        "ranges": {},
        "layout": layout_of_training,
    }
    model.temperature = 5.0
    folder = tmp_path_factory.mktemp("model")
    model.eval().save(folder)
    return folder


@pytest.fixture(scope="session")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_folder` exported, all four graphs. Do not write into it."""
    from fastflow.export.onnx import export_onnx
    from filelock import FileLock

    # All processes that tests run in share one export, because tracing takes long.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "small_export.lock"):
        if not (base / "small_export").exists():
            # Looking for garbage among all objects of PyTorch takes a sixth of the time of an export.
            gc.freeze()
            export_onnx(model_folder, base / "small_export")
    return base / "small_export"
