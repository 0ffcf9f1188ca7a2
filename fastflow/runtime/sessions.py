"""ONNX Runtime: sessions on the provider that was asked for, and runners of batches. Torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
import threading
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastflow.errors import ExportError

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDER_CHOICES = ("auto", "cpu", "cuda")
# TensorFloat-32 would move log-odds by more than the limit of an export; an exhaustive search may choose
# another convolution in every process.
CUDA_OPTIONS = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC"}
INSTALL_HINT = (
    "pip install 'fastflow[export-cpu]' (or onnxruntime) for CPUs, or 'fastflow[export]' "
    "(or onnxruntime-gpu) for CUDA; they exclude each other"
)
# ONNX Runtime logs errors from this level on; a fallback to another provider is reported here.
ERRORS_ONLY = 3

# The providers of one attempt to open a session, each with its options.
Attempt = list[str | tuple[str, dict[str, str]]]


class Runner(Protocol):
    """Runs a score graph."""

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """Images (n, C, H, W) -> log-likelihoods (n, K)."""
        ...

    def with_latents(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As a call, with the correlations (n, K, J, 2) of the latent."""
        ...


# Programs may already filter messages by this name.
log = logging.getLogger("fastflow.export")


def import_onnxruntime() -> Any:
    """The module ``onnxruntime``.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"scoring with an export needs ONNX Runtime: {INSTALL_HINT}") from error
    return onnxruntime


def default_threads() -> int:
    """Physical cores that this process may use, as far as the system tells."""
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = set()
    for cpu in cpus:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text(encoding="ascii"))
        except OSError:
            cores.add(str(cpu))
    return max(1, len(cores))


def _attempts(providers: str | Sequence[Any], available: Sequence[str], cuda_graph: bool) -> list[Attempt]:
    """Lists of providers to try, one after the other."""
    if not isinstance(providers, str) and len(providers) > 0:
        return [list(providers)]
    if providers not in PROVIDER_CHOICES:
        raise ValueError(
            f"providers must be one of {', '.join(PROVIDER_CHOICES)} or a list of ONNX Runtime's, "
            f"got {providers!r}"
        )
    if providers == "cpu" or (providers == "auto" and CUDA_PROVIDER not in available):
        return [[CPU_PROVIDER]]
    if CUDA_PROVIDER not in available:
        raise ValueError(_not_in_use(providers, f"this ONNX Runtime offers {', '.join(available)}"))
    options = CUDA_OPTIONS | ({"enable_cuda_graph": "1"} if cuda_graph else {})
    cuda: Attempt = [(CUDA_PROVIDER, options), CPU_PROVIDER]
    return [cuda] if providers == "cuda" else [cuda, [CPU_PROVIDER]]


def _not_in_use(providers: str | Sequence[Any], reason: str) -> str:
    advice = (
        ". CUDA needs an NVIDIA driver, and onnxruntime-gpu in the place of onnxruntime: "
        "pip uninstall onnxruntime; pip install 'onnxruntime-gpu[cuda,cudnn]'"
    )
    return f"providers {providers!r} were asked for, but {reason}{advice if providers == 'cuda' else ''}"


def open_session(
    path: str | PathLike[str],
    providers: str | Sequence[Any] = "auto",
    *,
    threads: int | None = None,
    cuda_graph: bool = False,
) -> Any:
    """An ONNX Runtime session of one graph. The provider that it really uses is logged.

    Args:
        path: the graph's file.
        providers: see `fastflow.runtime.scorer.OnnxScorer`.
        threads: number of threads of one operator on the CPU; `default_threads` when None.
        cuda_graph: capture CUDA graphs; every run then needs its ``gpu_graph_id``.

    Raises:
        ExportError: the graph cannot be loaded.
        ValueError: CUDA was asked for and is not in use, ONNX Runtime is not installed, or a choice does not
            exist.
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
    # ONNX Runtime prints what it misses, and would fall back to another provider by itself.
    with contextlib.redirect_stdout(sys.stderr):
        if first == CUDA_PROVIDER and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        try:
            session = ort.InferenceSession(os.fspath(path), options, providers=attempt, enable_fallback=0)
        except Exception as error:
            # ONNX Runtime's errors have no base class but Exception. On the CPU only the graph can be at
            # fault.
            if (first == CPU_PROVIDER or "xternal data" in str(error)) and _files_lie_apart(Path(path)):
                raise ExportError(
                    f"{path}: it and the files beside it are links into several folders, where ONNX Runtime "
                    f"does not look for weights: copy the folder with cp -L and use the copy ({error})"
                ) from error
            if first != CPU_PROVIDER:
                raise _NotInUse(f"{type(error).__name__}: {error}") from error
            raise ExportError(f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}") from error
    session.disable_fallback()
    if first not in session.get_providers():
        raise _NotInUse(f"its session uses {', '.join(session.get_providers())}")
    log.info("%s runs on %s", path, ", ".join(session.get_providers()))
    return session


def _files_lie_apart(graph: Path) -> bool:
    """Whether links lead from the folder of a graph into another one than that of the graph itself."""
    try:
        files = list(graph.parent.iterdir())
    except OSError:
        return False
    homes = {file.resolve().parent for file in files if file.is_symlink()}
    return bool(homes) and len(homes | {graph.resolve().parent}) > 1


def _session_options(ort: Any, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.enable_mem_pattern = True
    options.log_severity_level = ERRORS_ONLY
    return options


def is_memory_error(error: Exception) -> bool:
    """Whether an error of ONNX Runtime says that there is not enough memory."""
    return any(words in str(error) for words in ("bad allocation", "bad_alloc", "allocate memory"))


class PlainRunner:
    """Runs batches of any size.

    Args:
        session: a session of the score graph.
    """

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, C, H, W) -> (n, K) nats."""
        return self._session.run(["log_probs"], {"image": images})[0]

    def with_latents(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, C, H, W) -> (n, K) nats and (n, K, J, 2) correlations."""
        log_probs, correlations = self._session.run(["log_probs", "correlations"], {"image": images})
        return log_probs, correlations


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """Tensors on the device for batches of one size, and how they are bound to the session."""

    image: Any
    outputs: dict[str, Any]
    binding: Any
    options: Any


class BoundRunner:
    """Runs batches by tensors that stay on the device, a pair for each batch size.

    So each shape is planned, and its CUDA graph captured, once.

    Args:
        session: a session of the score graph.
        ort: the module ``onnxruntime``.
        classes: K.
        device: ``"cuda"``; ``"cpu"`` works as well.
        graphs: whether the session captures CUDA graphs.
        latent_blocks: J of the graph's correlations; 0 where it has none.
    """

    def __init__(
        self,
        session: Any,
        ort: Any,
        classes: int,
        device: str,
        graphs: bool = False,
        latent_blocks: int = 0,
    ) -> None:
        self._session, self._ort = session, ort
        self._shapes: dict[str, tuple[int, ...]] = {"log_probs": (classes,)}
        if latent_blocks:
            self._shapes["correlations"] = (classes, latent_blocks, 2)
        self._device, self._graphs = device, graphs
        self._tensors: dict[int, _Tensors] = {}
        self._lock = threading.Lock()

    def __call__(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """(n, C, H, W) -> (n, K) nats."""
        return self._run(images)["log_probs"]

    def with_latents(self, images: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(n, C, H, W) -> (n, K) nats and (n, K, J, 2) correlations."""
        found = self._run(images)
        return found["log_probs"], found["correlations"]

    def _run(self, images: NDArray[np.float32]) -> dict[str, NDArray[np.float64]]:
        """Every output of the graph, by name."""
        # All threads share the tensors.
        with self._lock:
            if len(images) not in self._tensors:
                self._tensors[len(images)] = self._bind(images)
            tensors = self._tensors[len(images)]
            tensors.image.update_inplace(images)
            tensors.binding.synchronize_inputs()
            self._session.run_with_iobinding(tensors.binding, tensors.options)
            tensors.binding.synchronize_outputs()
            return {name: np.array(value.numpy()) for name, value in tensors.outputs.items()}

    def _bind(self, images: NDArray[np.float32]) -> _Tensors:
        values, binding = self._ort.OrtValue, self._session.io_binding()
        image = values.ortvalue_from_numpy(images, self._device, 0)
        binding.bind_ortvalue_input("image", image)
        outputs = {}
        for name, shape in self._shapes.items():
            outputs[name] = values.ortvalue_from_shape_and_type(
                [len(images), *shape], np.float64, self._device, 0
            )
            binding.bind_ortvalue_output(name, outputs[name])
        options = self._ort.RunOptions()
        if self._graphs:
            # A captured graph fits one shape only, so each shape has a graph with a name of its own.
            options.add_run_config_entry("gpu_graph_id", str(len(self._tensors) + 1))
        return _Tensors(image, outputs, binding, options)
