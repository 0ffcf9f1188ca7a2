"""Where kernels run in these tests: on the GPU if there is one, else in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "models")]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which ops run their Triton kernels."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        # What kernels are compared with must not be rounded to 10 bits.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        return "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return "cpu"


@pytest.fixture(params=["kernel", "cpu"])
def place(request: pytest.FixtureRequest) -> str:
    """The devices of two forms of an op: that of its kernels, and a CPU."""
    return request.getfixturevalue("device") if request.param == "kernel" else "cpu"
