"""ONNX Runtime: sessions that run where they were asked to, and batches that go through them. Torch-free."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.errors import ExportError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CHOICES = ("auto", "cpu", "cuda")
# TensorFloat-32 would move log-odds by more than what an export may differ by; an exhaustive search may choose another
# convolution in every process.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
INSTALL = (
    "pip install 'fastflow[export-cpu]' (or onnxruntime) for CPUs, or 'fastflow[export]' (or onnxruntime-gpu) for CUDA; they "
    "exclude each other"
)

Attempt = list[str | tuple[str, dict[str, str]]]
Run = Callable[[NDArray[np.float32]], NDArray[np.float64]]

log = logging.getLogger("fastflow.export")


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"scoring with an export needs ONNX Runtime: {INSTALL}") from error
    return onnxruntime


def default_threads() -> int:
    """Physical cores that this process may use, as far as the system tells."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def _attempts(providers: str | Sequence[Any], available: Sequence[str], cuda_graph: bool) -> list[Attempt]:
    """Lists of providers to try, one after the other."""
    if not isinstance(providers, str) and len(providers) > 0:
        return [list(providers)]
    if providers not in CHOICES:
        raise ValueError(f"providers must be one of {', '.join(CHOICES)} or a list of ONNX Runtime's, got {providers!r}")
    if providers == "cpu" or (providers == "auto" and CUDA not in available):
        return [[CPU]]
    if CUDA not in available:
        raise ValueError(_not_in_use(providers, f"this ONNX Runtime offers {', '.join(available)}"))
    cuda: Attempt = [(CUDA, CUDA_OPTIONS | ({"enable_cuda_graph": "1"} if cuda_graph else {})), CPU]
    return [cuda] if providers == "cuda" else [cuda, [CPU]]


def _not_in_use(providers: str | Sequence[Any], reason: str) -> str:
    advice = (
        ". CUDA needs an NVIDIA driver, and onnxruntime-gpu in the place of onnxruntime: pip uninstall onnxruntime; "
        "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )
    return f"providers {providers!r} were asked for, but {reason}{advice if providers == 'cuda' else ''}"


def open_session(
    path: str | PathLike[str], providers: str | Sequence[Any] = "auto", *, threads: int | None = None, cuda_graph: bool = False
) -> Any:
    """An ONNX Runtime session of one graph. The provider that it really uses is logged.

    Args:
        path: the graph's file.
        providers: see `OnnxScorer`.
        threads: of one operator on the CPU; `default_threads` when None.
        cuda_graph: capture CUDA graphs; every run then needs its ``gpu_graph_id``.

    Raises:
        ExportError: the graph cannot be loaded.
        ValueError: CUDA was asked for and is not in use, ONNX Runtime is not installed, or a choice does not exist.
    """
    ort = import_onnxruntime()
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ValueError(f"threads must be an integer of at least 1, got {threads!r}")
    options = _session_options(ort, default_threads() if threads is None else threads)
    attempts = _attempts(providers, ort.get_available_providers(), cuda_graph)
    for attempt in attempts[:-1]:
        try:
            return _open(ort, path, options, attempt)
        except _NotInUse as error:
            log.warning("%s: CUDA cannot be used here, so it runs on the CPU: %s", path, error)
    try:
        return _open(ort, path, options, attempts[-1])
    except _NotInUse as error:
        raise ValueError(_not_in_use(providers, str(error))) from error


class _NotInUse(Exception):
    """A provider that ONNX Runtime offers does not work here."""


def _open(ort: Any, path: str | PathLike[str], options: Any, attempt: Attempt) -> Any:
    first = attempt[0] if isinstance(attempt[0], str) else attempt[0][0]
    # The runtime prints what it misses, and would fall back by itself.
    with contextlib.redirect_stdout(sys.stderr):
        if first == CUDA and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        try:
            session = ort.InferenceSession(os.fspath(path), options, providers=attempt, enable_fallback=0)
        except Exception as error:
            # Of classes that have no other base. On the CPU it can only be the graph.
            if first != CPU:
                raise _NotInUse(f"{type(error).__name__}: {error}") from error
            raise ExportError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}") from error
    session.disable_fallback()
    if first not in session.get_providers():
        raise _NotInUse(f"its session uses {', '.join(session.get_providers())}")
    log.info("%s runs on %s", path, ", ".join(session.get_providers()))
    return session


def _session_options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.enable_mem_pattern = True
    # Errors only: fallbacks are told here.
    options.log_severity_level = 3
    return options


def is_memory_error(error: Exception) -> bool:
    """Whether what ONNX Runtime raised says that there is not enough memory."""
    return any(words in str(error) for words in ("bad allocation", "bad_alloc", "allocate memory"))


class Plain:
    """Runs batches of any size.

    Args:
        session: of the score graph.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, C, H, W) -> (n, K)."""
        return self._session.run(["log_probs"], {"image": images})[0]


class Bound:
    """Runs batches by tensors that stay on the device, a pair for each size: a shape is planned, and its graph captured, once.

    Args:
        session: of the score graph.
        ort: the module ``onnxruntime``.
        classes: K.
        device: ``"cuda"``; ``"cpu"`` works as well.
        graphs: whether the session captures CUDA graphs.
    """

    def __init__(self, session: Any, ort: Any, classes: int, device: str, graphs: bool = False) -> None:
        self._session, self._ort, self._classes, self._device, self._graphs = session, ort, classes, device, graphs
        self._sizes: dict[int, tuple[Any, Any, Any, Any]] = {}
        self._lock = threading.Lock()

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, C, H, W) -> (n, K)."""
        # The tensors are everybody's.
        with self._lock:
            if len(images) not in self._sizes:
                self._sizes[len(images)] = self._bind(images)
            image, log_probs, binding, options = self._sizes[len(images)]
            image.update_inplace(images)
            binding.synchronize_inputs()
            self._session.run_with_iobinding(binding, options)
            binding.synchronize_outputs()
            return np.array(log_probs.numpy())

    def _bind(self, images: NDArray[np.float32]) -> tuple[Any, Any, Any, Any]:
        values, binding = self._ort.OrtValue, self._session.io_binding()
        image = values.ortvalue_from_numpy(images, self._device, 0)
        log_probs = values.ortvalue_from_shape_and_type([len(images), self._classes], np.float64, self._device, 0)
        binding.bind_ortvalue_input("image", image)
        binding.bind_ortvalue_output("log_probs", log_probs)
        options = self._ort.RunOptions()
        if self._graphs:
            # A captured graph is of one shape; each gets a name of its own.
            options.add_run_config_entry("gpu_graph_id", str(len(self._sizes) + 1))
        return image, log_probs, binding, options
