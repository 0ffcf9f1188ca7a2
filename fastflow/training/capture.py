"""A training step as a CUDA graph: eager first steps, one capture, replays.

Source of the rules of capture: the notes of PyTorch on CUDA graphs (whole-network capture).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from fastflow.models.versions import TensorVersions

WARM_UP_STEPS = 3

Function = Callable[[], None]


class StepGraph(Protocol):
    """A graph runs a function of no arguments again and again on tensors that stay where they are."""

    def warm_up(self, function: Function) -> None:
        """Run the function eagerly, on the stream that will capture it."""

    def capture(self, function: Function) -> None:
        """Record what the function launches; nothing is computed."""

    def replay(self) -> None:
        """Launch what was recorded."""

    def successor(self) -> StepGraph:
        """A graph that has recorded nothing, for another function that takes the place of this one's."""


class CudaStepGraph:
    """A `StepGraph` by `torch.cuda.graph`.

    Warm-up and capture share a side stream, since autograd adds up the gradient of a parameter on the stream
    on which it first met the parameter (PyTorch issue 64339). Other threads may allocate device memory
    during the capture, whose error mode is ``"thread_local"`` for that reason.

    Args:
        device: a CUDA device.
        stream: of the device, for warm-up and capture; a new one when None.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self._device = device
        self._stream = stream or torch.cuda.Stream(device)
        self._graph = torch.cuda.CUDAGraph()

    def warm_up(self, function: Function) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def capture(self, function: Function) -> None:
        index = torch.cuda.current_device() if self._device.index is None else self._device.index
        generator = torch.cuda.default_generators[index]
        state = generator.clone_state()
        try:
            # The outer context puts the stream back where a capture fails before or while it ends.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self._device)),
                torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                function()
        except BaseException:
            # A failed capture leaves its generator refusing to draw, so that it gets another state object.
            generator.graphsafe_set_state(state)
            raise

    def replay(self) -> None:
        self._graph.replay()

    def successor(self) -> CudaStepGraph:
        # One stream serves both, for the sake of the gradients' streams.
        return CudaStepGraph(self._device, self._stream)


def graph_for(engine: str, device: torch.device) -> StepGraph | None:
    """The graph that an engine of `TrainConfig` asks for on a device; None for eager steps.

    Raises:
        ValueError: the engine is ``"cuda_graph"`` and the device is no CUDA device.
    """
    if device.type == "cuda":
        return None if engine == "eager" else CudaStepGraph(device)
    if engine == "cuda_graph":
        raise ValueError(f"engine 'cuda_graph' needs a CUDA device, got {device}; take 'auto' or 'eager'")
    return None


class CapturedFunction:
    """A function that runs eagerly `WARM_UP_STEPS` times, is then captured, and replayed from there on.

    The eager runs are real ones and change what the function changes, so nothing has to be put back.

    Args:
        function: works on tensors that stay where they are, and waits for no device.
        graph: captures it.
        model: whose parameters it uses.
        falls_back: whether a function that cannot be captured is run eagerly, with a warning that says why.
    """

    def __init__(
        self, function: Function, graph: StepGraph, model: nn.Module, falls_back: bool = False
    ) -> None:
        self._function, self._model, self._falls_back = function, model, falls_back
        self._graph: StepGraph | None = graph
        self._warm_ups = 0
        self._versions: TensorVersions | None = None

    @property
    def captured(self) -> bool:
        """Whether the next call is a replay."""
        return self._versions is not None

    def __call__(self) -> None:
        """Run the function, or replay it.

        Raises:
            RuntimeError: a parameter or a buffer was moved or replaced after the capture.
        """
        graph = self._graph
        if graph is None:
            self._function()
        elif self._warm_ups < WARM_UP_STEPS:
            self._warm_ups += 1
            graph.warm_up(self._function)
        else:
            if self._versions is None:
                self._versions = self._capture(graph)
            if self._versions is None:
                self._function()
            else:
                self._replay(graph, self._versions)

    def _replay(self, graph: StepGraph, versions: TensorVersions) -> None:
        change = versions.moved()
        if change is not None:
            raise RuntimeError(
                f"{change} after the training step was captured: make a new TrainingStep, which captures "
                "again"
            )
        graph.replay()
        versions.count_writes()

    def _capture(self, graph: StepGraph) -> TensorVersions | None:
        try:
            graph.capture(self._function)
        except Exception as error:
            if not self._falls_back:
                raise
            self._graph = None
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"training steps run eagerly, as their capture in a CUDA graph failed with {reason}",
                stacklevel=4,
            )
            return None
        return TensorVersions(self._model)
