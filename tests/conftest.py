"""Settings of all tests: one thread each, uninitialised memory full of NaN, repeatable examples in CI."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# These are set before torch or matplotlib are imported. Small tensors lose to threads; waiting threads give
# way where a test asks for more of them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("MPLBACKEND", "Agg")

settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("dev"), derandomize=True, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def prepare_interpreter() -> None:
    """Import Triton as its interpreter where there is no GPU, and make it faster.

    Triton decides while it is imported whether it interprets. Kernels then run on CPU tensors wherever a test
    sets TRITON_INTERPRET again. Where there is a GPU, Triton compiles, and the same tests run on the GPU.
    """
    if importlib.util.find_spec("triton") is None:
        return
    import torch

    if torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime import interpreter

    def call_from_a_kernel(self, *args, **kwargs):
        # Triton 3.7 patches its whole language whenever one kernel calls another, which takes milliseconds.
        modules = [value for value in self.fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(module.load) for module in modules):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_from_a_kernel

    def dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        # The interpreter multiplies by BLAS, in which a row's last bits can depend on its place among the
        # others (OpenBLAS on AVX2). On a GPU they do not, and tests of equal bits are tests of kernels.
        product = np.einsum("ik,kj->ij", a.data, b.data, dtype=d.data.dtype)
        return interpreter.TensorHandle(product + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot
    del os.environ["TRITON_INTERPRET"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore:.*deterministic:UserWarning")
    # The process that only hands tests to others starts seconds earlier without torch.
    hands_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if not hands_out:
        prepare_interpreter()


if os.environ.get("TRITON_INTERPRET") == "1":
    # `test_snapshot.py` runs this file outside of pytest.
    prepare_interpreter()


@pytest.fixture(autouse=True)
def nan_filled_memory() -> None:
    """Make `torch.empty` return NaN, so that a test that reads uninitialised memory cannot pass by luck."""
    torch = sys.modules.get("torch")
    if torch is not None and not torch.are_deterministic_algorithms_enabled():
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture(autouse=True)
def settled_files() -> None:
    """Read files at once that a test has just written: nobody changes them within a step of the clock."""
    opening = sys.modules.get("fastflow.data._opening")
    if opening is not None:
        opening._CLOCK_STEP_NS = 0


CLASSES = ("flat", "striped")


def write_scan(path: Path, label: str, seed: int) -> None:
    """A volume of 14 x 9 x 15 voxels with noise, striped from left to right for the second class."""
    import nibabel as nib

    rng = np.random.default_rng(seed)
    stripes = 60.0 * (np.arange(14) % 2)[:, None, None] if label == "striped" else 0.0
    data = rng.normal(120.0, 10.0, (14, 9, 15)) + stripes
    data[:, :, -3:] = 0.0
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data.clip(0).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])), path)


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of class/file volumes that fit the tiny preset: 2 classes, 10 subjects each. Read only."""
    root = tmp_path_factory.mktemp("scans")
    for k, label in enumerate(CLASSES):
        for i in range(10):
            write_scan(root / label / f"sub-{k}{i:02d}_T1w.nii.gz", label, 100 * k + i)
    return root


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained but initialised tiny model that takes three slices of each of `scans`. Read only."""
    import torch

    from fastflow import FlowConfig, MagicFlow
    from fastflow.data.preprocess import Preprocess

    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.tiny(2, class_names=CLASSES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.initialize(torch.rand(8, 1, 16, 16) * 2 - 1)
    model.metadata["preprocess"] = Preprocess((16, 16), "center+-1", (2.0, 2.0, 2.0), (14, 9, 15)).to_dict()
    model.temperature = 5.0
    folder = tmp_path_factory.mktemp("model")
    model.eval().save(folder)
    return folder


@pytest.fixture(scope="session")
def exported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The score graph of `model_folder`. Read only."""
    from fastflow.export.onnx import export_onnx
    from filelock import FileLock

    # Exporting takes long, so all processes that tests run in share one export.
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with FileLock(base / "export.lock"):
        if not (base / "export").exists():
            export_onnx(model_folder, base / "export", graphs=("score",))
    return base / "export"
