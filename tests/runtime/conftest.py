"""An export made by hand, and an ONNX Runtime that says it has CUDA."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

import numpy as np
import onnxruntime

from fastflow.runtime.scorer import OnnxScorer
from fastflow.runtime.sessions import CPU_PROVIDER, CUDA_PROVIDER
from tests.export.handmade import write_export


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export made by hand that fits `scans`. Do not write into it."""
    return write_export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="session")
def scorer(export_folder: Path) -> OnnxScorer:
    return OnnxScorer(export_folder, "cpu", threads=1)


class FakeOrt(types.SimpleNamespace):
    """An ``onnxruntime`` with CUDA, which works or does not. Its sessions compute on the CPU all the same."""

    def __init__(self, works: bool | Exception = True, cuda: bool = True) -> None:
        super().__init__(
            **{
                name: getattr(onnxruntime, name)
                for name in ("SessionOptions", "ExecutionMode", "__version__")
            }
        )
        self.works, self.cuda = works, cuda
        self.asked: list[Any] = []
        self.preloads = 0
        self.bound: list[dict[str, Any]] = []
        self.runs: list[str | None] = []
        fake = self

        class OrtValue:
            @staticmethod
            def ortvalue_from_numpy(array: np.ndarray, device: str, index: int) -> Any:
                fake.bound.append({"shape": array.shape, "device": device, "index": index})
                return onnxruntime.OrtValue.ortvalue_from_numpy(array, "cpu", 0)

            @staticmethod
            def ortvalue_from_shape_and_type(shape: list[int], kind: type, device: str, index: int) -> Any:
                return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, kind, "cpu", 0)

        class RunOptions:
            graph: str | None = None

            def add_run_config_entry(self, key: str, value: str) -> None:
                assert key == "gpu_graph_id"
                self.graph = value

        self.OrtValue, self.RunOptions = OrtValue, RunOptions

    def get_available_providers(self) -> list[str]:
        return [CUDA_PROVIDER, CPU_PROVIDER] if self.cuda else [CPU_PROVIDER]

    def preload_dlls(self) -> None:
        self.preloads += 1
        print("Failed to load libcudnn.so.9")

    def InferenceSession(self, path: str, options: Any, providers: list[Any], enable_fallback: int) -> Any:
        assert enable_fallback == 0
        self.asked.append(providers)
        names = [one if isinstance(one, str) else one[0] for one in providers]
        if CUDA_PROVIDER in names and isinstance(self.works, Exception):
            raise self.works
        session = onnxruntime.InferenceSession(path, options, providers=[CPU_PROVIDER])
        used = names if self.works is True else [CPU_PROVIDER]
        fake = self

        class Session:
            def __getattr__(self, name: str) -> Any:
                return getattr(session, name)

            def get_providers(self) -> list[str]:
                return used

            def run_with_iobinding(self, binding: Any, options: Any) -> None:
                fake.runs.append(options.graph)
                session.run_with_iobinding(binding)

        return Session()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(*arguments: Any, **options: Any) -> FakeOrt:
        ort = FakeOrt(*arguments, **options)
        monkeypatch.setitem(sys.modules, "onnxruntime", ort)
        return ort

    return install
