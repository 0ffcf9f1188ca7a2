"""Drawing images: everything that no image changes is computed once, and passes are CUDA graphs on a GPU."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastflow.kernels.checks import mark_label_index
from fastflow.models.flow import Flow
from fastflow.models.inference.graphs import GraphPerSize
from fastflow.models.inference.precision import evaluating, pick_conditioner_dtype
from fastflow.models.inference.prepare import (
    check_unchanged,
    default_rows,
    pick_engine,
    without_parametrizations,
)
from fastflow.models.versions import TensorVersions

SAMPLER_ENGINES = ("auto", "eager", "cuda_graph")


class Sampler:
    """Draws images given labels, for any number of batches.

    Label parameters of all labels, inverse matrices and normed weights are computed once, when the sampler is
    made; a call after the model has changed is an error, see `LabelScorer`. The latent is drawn outside of
    captured graphs, as `MagicFlow.sample` draws it: a generator in the same state gives the same images,
    however they are split into passes. On a CPU they have the bits of `MagicFlow.sample` where there are at
    least as many images as labels (else label parameters come from a smaller product, a rounding apart).

    Args:
        model: the flow, initialised and in evaluation mode.
        precision: ``"float32"``, ``"tf32"`` or ``"mixed"``, see `LabelScorer`.
        engine: ``"eager"``: kernels or ATen one after the other. ``"cuda_graph"``: eager passes captured per
            power of two of images. ``"auto"``: ``"cuda_graph"`` on a CUDA device, else ``"eager"``.

    Attributes:
        engine: the engine in use.
        precision: the precision asked for.
        conditioner_dtype: the dtype that conditioners compute in.
        max_images: most images in one pass, by the memory that was free when the sampler was made; a power of
            two where passes are captured.

    Raises:
        ValueError: a choice that does not exist or does not fit the model, or a model in training mode.
        UninitializedModelError: the model has seen no data.

    Example:
        >>> from fastflow import FlowConfig, MagicFlow
        >>> model = MagicFlow(FlowConfig.tiny(num_classes=3)).eval()
        >>> model.initialize(torch.rand(4, 1, 16, 16) * 2 - 1)
        >>> sampler = Sampler(model)
        >>> sampler(torch.tensor([2, 0, 1]), temperature=0.7).shape, sampler.engine
        (torch.Size([3, 1, 16, 16]), 'eager')

    Source: MAGIC-Flow (Caldera, Bottacini, Cavinato; arXiv 2510.22070).
    """

    def __init__(self, model: Flow, precision: str = "float32", engine: str = "auto") -> None:
        self.engine = pick_engine(model, engine, SAMPLER_ENGINES, "sampled from")
        self.conditioner_dtype = pick_conditioner_dtype(precision, model.dtype, model.device)
        self.model, self.precision = model, precision
        self._graphs = GraphPerSize() if self.engine == "cuda_graph" else None
        rows = default_rows(model)
        self.max_images = 1 << (rows.bit_length() - 1) if self._graphs else rows
        self._device, self._dtype = model.device, model.dtype
        self._versions = TensorVersions(model)
        sizes = [math.prod(shape) for shape in model.config.latent_shapes]
        self._ends = [0, *itertools.accumulate(sizes)]
        self._temperatures = (1.0,) * len(sizes)
        # Captured passes read it, so that other temperatures need no new capture.
        self._deviation = torch.ones(self._ends[-1], dtype=model.dtype, device=model.device)
        # Label parameters and matrices are computed wide whatever the precision.
        with self._context(narrow=False):
            labels = torch.arange(model.config.num_classes, device=model.device)
            self._flow = without_parametrizations(model).condition(labels, inverse=True)

    def __call__(
        self,
        y: Tensor,
        temperature: float | Sequence[float] = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images.

        Args:
            y: (B,) integer labels in [0, K), on any device. On a CUDA device the host waits for them, to
                check them.
            temperature: standard deviation of the latent, or of each of its blocks in the order of
                `FlowConfig.latent_shapes`; below 1 gives smoother, more typical images.
            generator: source of randomness, for repeatable draws; the default one of the model's device when
                None.

        Returns:
            (B, C, H, W) images on the device of the model; values are not clamped to [-1, 1].

        Raises:
            ValueError: a label or a temperature does not fit.
            RuntimeError: the model has changed since the sampler was made, or is in training mode.
        """
        temperatures = self._check_temperature(temperature)
        labels = self.model.check_labels(y, y.shape[0])
        where = self._device if generator is None else generator.device
        z = torch.randn(len(labels), self._ends[-1], dtype=self._dtype, device=where, generator=generator)
        return self._passes(z, labels, temperatures)

    def inverse(self, z: Tensor, y: Tensor) -> Tensor:
        """Latent to image, as `Flow.inverse`.

        Args:
            z: (B, D) latents, on any device.
            y: (B,) integer labels in [0, K), on any device.

        Returns:
            (B, C, H, W) images on the device of the model; values are not clamped.

        Raises:
            ValueError: a shape or a label does not fit.
            RuntimeError: the model has changed since the sampler was made, or is in training mode.
        """
        if z.ndim != 2 or z.shape[1] != self._ends[-1]:
            raise ValueError(f"z must be (B, {self._ends[-1]}), got {tuple(z.shape)}")
        return self._passes(
            z.to(self._dtype), self.model.check_labels(y, z.shape[0]), (1.0,) * (len(self._ends) - 1)
        )

    def _check_temperature(self, temperature: float | Sequence[float]) -> tuple[float, ...]:
        blocks = len(self._ends) - 1
        values = [temperature] * blocks if isinstance(temperature, (int, float)) else list(temperature)
        if len(values) != blocks or not all(math.isfinite(value) and value >= 0 for value in values):
            raise ValueError(
                f"temperature must be a finite number that is not negative, or {blocks} of them (one per "
                f"latent block), got {temperature}"
            )
        return tuple(float(value) for value in values)

    def _passes(self, z: Tensor, labels: Tensor, temperatures: tuple[float, ...]) -> Tensor:
        """Images of checked latents and labels."""
        check_unchanged(self.model, self._versions, "Sampler")
        with self._context():
            z, labels = z.to(self._device), labels.to(self._device)
            self._set(temperatures)
            parts = [
                self._run(z[start : start + self.max_images], labels[start : start + self.max_images])
                for start in range(0, len(z), self.max_images)
            ]
            if not parts:
                return z.new_zeros(0, *self.model.config.input_shape)
            return parts[0] if len(parts) == 1 else torch.cat(parts)

    def reads_its_model(self) -> bool:
        """Whether the model still is what this sampler was made of."""
        return self._versions.change() is None

    def _run(self, z: Tensor, labels: Tensor) -> Tensor:
        if self._graphs is None:
            return self._decode(z, labels)
        return self._graphs(self._decode, (z, labels))

    def _decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """The pass that is captured: no value is read on the host."""
        labels = mark_label_index(labels, self.model.config.num_classes)
        shapes = self.model.config.latent_shapes
        parts = torch.split(self._deviation * z, [math.prod(shape) for shape in shapes], dim=1)
        blocks = [part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True)]
        return self._flow.inverse(blocks, labels)

    def _set(self, temperatures: tuple[float, ...]) -> None:
        if temperatures != self._temperatures:
            for (first, last), value in zip(itertools.pairwise(self._ends), temperatures, strict=True):
                self._deviation[first:last].fill_(value)
            self._temperatures = temperatures

    def _context(self, narrow: bool = True) -> AbstractContextManager[Any]:
        """Evaluation in the sampler's precision."""
        narrow = narrow and self.conditioner_dtype != self._dtype
        # As with the scorer, what autocast cached would be gone when a graph is replayed.
        cache = self.engine != "cuda_graph"
        return evaluating(self.precision, self._device, self.conditioner_dtype if narrow else None, cache)


class SamplerOfWeights:
    """The sampler of a model whose weights may change: made anew when they did, captured when they did not.

    The first call after a change gets an eager sampler, since a capture takes as long as several passes;
    later ones get the engine `auto`. Images are the same.
    """

    def __init__(self) -> None:
        self._sampler: Sampler | None = None
        self._settled = False

    def get(self, model: Flow) -> Sampler:
        """A sampler of the weights as they are now, in float32 without TF32.

        Raises:
            ValueError: the model is in training mode.
            UninitializedModelError: the model has seen no data.
        """
        if self._sampler is None or not self._sampler.reads_its_model():
            self._sampler, self._settled = Sampler(model, engine="eager"), False
        elif not self._settled:
            self._sampler, self._settled = Sampler(model), True
        return self._sampler
