"""Scoring images under every label: the choice of an engine, a precision and a batch size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastflow.errors import InvalidImageWarning, UninitializedModelError
from fastflow.models.flow import Flow
from fastflow.models.inference.engines import Compiled, CudaGraphs, Eager, Engine, State
from fastflow.models.inference.precision import (
    PRECISIONS,
    check_choice,
    evaluating,
    pick_conditioner_dtype,
)
from fastflow.models.inference.prepare import (
    check_unchanged,
    default_rows,
    pick_engine,
    without_parametrizations,
)
from fastflow.models.versions import TensorVersions

ENGINES = ("auto", "eager", "compile", "cuda_graph")


class Scores(NamedTuple):
    """Results of `LabelScorer.score`.

    Attributes:
        log_probs: (B, K) log p(x|y) in nats, float32 or wider; NaN in the rows that are invalid.
        invalid: (B,) bool, whether an image holds NaN or infinity.
    """

    log_probs: Tensor
    invalid: Tensor


class LatentScores(NamedTuple):
    """Results of `LabelScorer.score_with_latents`.

    Attributes:
        log_probs: see `Scores`.
        correlations: (B, K, J, 2) lag-1 correlations across and down of the J latent blocks of each image
            under each label, in the order of `FlowConfig.latent_shapes`, in [-1, 1] and of the dtype of
            `log_probs`; NaN in the rows that are invalid. `fastflow.models.inference.correlations` has their
            equation.
        invalid: see `Scores`.
    """

    log_probs: Tensor
    correlations: Tensor
    invalid: Tensor


class LabelScorer:
    """Scores images under every label: log p(x|y) for all y in one batched pass.

    Tables, matrices and constants are computed once, when the scorer is made. A call after the model has
    changed is an error: weights or buffers that were written to, moved or replaced, and training mode. Only
    writes through ``parameter.data`` are not seen.

    Args:
        model: the flow, initialised and in evaluation mode.
        precision: ``"float32"``: everything in the model's dtype, without TF32. ``"tf32"``: products and
            convolutions of a GPU may round their factors to TF32. ``"mixed"``: conditioners in
            bfloat16, the stream, the log-scales and shifts, exponentials and all sums in float32. Where the
            device has no bfloat16 arithmetic, conditioners stay in float32, with a `PrecisionWarning`.
        engine: ``"eager"``: kernels or ATen one after the other; on a CPU a row's bits depend on no other
            row. ``"compile"``: Inductor, one graph per shape of step, which takes minutes to compile at
            first; on a CPU it needs a C++ compiler, and a row's bits may depend on how many rows are scored
            with it. ``"cuda_graph"``: eager passes captured per power of two of images. ``"auto"``:
            ``"cuda_graph"`` on a CUDA device, else ``"eager"``, which needs no warm-up.
        max_rows: most rows (images times labels) in one pass; chosen from the model's size and the free
            memory when None. Images and, where there are more labels than rows, labels are split accordingly.
            An allocation that fails halves it.

    Attributes:
        engine: the engine in use.
        precision: the precision asked for.
        conditioner_dtype: the dtype that conditioners compute in.
        max_rows: the rows in use.

    Raises:
        ValueError: a choice that does not exist or does not fit the model, or a model in training mode.
        UninitializedModelError: the model has seen no data.
        RuntimeError: ``"compile"`` without a C++ compiler.

    Example:
        >>> from fastflow import FlowConfig, MagicFlow
        >>> model = MagicFlow(FlowConfig.tiny(num_classes=3)).eval()
        >>> x = torch.rand(4, 1, 16, 16) * 2 - 1
        >>> model.initialize(x)
        >>> scorer = LabelScorer(model)
        >>> scorer(x).shape, scorer.engine
        (torch.Size([4, 3]), 'eager')

    Source: MAGIC-Flow (Caldera, Bottacini, Cavinato; arXiv 2510.22070), whose published code runs one pass
    per label.
    """

    def __init__(
        self, model: Flow, precision: str = "float32", engine: str = "auto", max_rows: int | None = None
    ) -> None:
        check_choice("precision", precision, PRECISIONS)
        _check_rows(max_rows)
        self.engine = pick_engine(model, engine, ENGINES, "scored with")
        self.model, self.precision = model, precision
        self.conditioner_dtype = pick_conditioner_dtype(precision, model.dtype, model.device)
        self.max_rows = default_rows(model) if max_rows is None else max_rows
        self._versions = TensorVersions(model)
        # Tables and matrices are computed wide whatever the precision: rounded, they would shift whole
        # labels.
        with self._context(narrow=False):
            if self.engine == "compile":
                self._engine: Engine = Compiled(model, self.conditioner_dtype)
            else:
                eager = Eager(without_parametrizations(model))
                self._engine = CudaGraphs(eager) if self.engine == "cuda_graph" else eager

    def __call__(self, x: Tensor) -> Tensor:
        """Log-likelihoods of images.

        Args:
            x: (B, C, H, W) images in [-1, 1], on any device.

        Returns:
            (B, K) log p(x|y) in nats, float32 or wider, on the device of the model. Rows of images that hold
            NaN or infinity are
            NaN, with an `InvalidImageWarning` that names them; the others are what they would be without
            these.

        Raises:
            ValueError: the shape or dtype does not fit.
            RuntimeError: the model has changed since the scorer was made, or is in training mode.
        """
        scores, invalid = self.score(x)
        if bool(invalid.any()):
            rows = torch.nonzero(invalid).flatten().tolist()
            shown = ", ".join(map(str, rows[:20])) + (", ..." if len(rows) > 20 else "")
            warnings.warn(
                f"{len(rows)} of {len(x)} images in x hold NaN or infinity, their scores are NaN: rows "
                f"{shown}",
                InvalidImageWarning,
                stacklevel=2,
            )
        return scores

    def score(self, x: Tensor) -> Scores:
        """As calling the scorer, but invalid images are told by a flag instead of a warning."""
        found, invalid = self._score(x, self._engine.finish)
        return Scores(found, invalid)

    def score_with_latents(self, x: Tensor) -> LatentScores:
        """As `score`, with the correlations within the latent, from the same pass and with the same bits."""
        found, invalid = self._score(x, self._engine.finish_with_latents)
        blocks = len(self.model.config.latent_shapes)
        if not len(x):
            found = found.unsqueeze(2).expand(-1, -1, 1 + 2 * blocks)
        correlations = found[..., 1:].unflatten(2, (blocks, 2))
        return LatentScores(found[..., 0].contiguous(), correlations, invalid)

    def _score(self, x: Tensor, finish: Finish) -> tuple[Tensor, Tensor]:
        """`(found, invalid)`: what `finish` gives for each image and label, and which images are invalid."""
        check_unchanged(self.model, self._versions, "LabelScorer")
        x = self.model.check_images(x.to(self.model.device))
        with self._context():
            invalid = ~torch.isfinite(x.flatten(1)).all(dim=1)
            # A zero image in their place: compiled code is free to assume that there are no NaNs.
            x = torch.where(invalid[:, None, None, None], 0.0, x)
            labels = self.model.config.num_classes
            found, self.max_rows = _score(self._engine, x, labels, self.max_rows, finish)
            found = found.to(torch.promote_types(x.dtype, torch.float32))
            return found.masked_fill(invalid.view(-1, *(1,) * (found.ndim - 1)), float("nan")), invalid

    def _context(self, narrow: bool = True) -> AbstractContextManager[Any]:
        """Evaluation in the scorer's precision; where it is mixed, eager passes are under autocast."""
        narrow = narrow and self.conditioner_dtype != self.model.dtype and self.engine != "compile"
        # A graph that was captured reads what it read then: weights that autocast had cached would be freed
        # memory by now.
        return evaluating(
            self.precision,
            self.model.device,
            self.conditioner_dtype if narrow else None,
            cache_weights=self.engine != "cuda_graph",
        )


def _check_rows(max_rows: int | None) -> None:
    if max_rows is not None and (isinstance(max_rows, bool) or not isinstance(max_rows, int) or max_rows < 1):
        raise ValueError(f"max_rows must be an integer of at least 1, got {max_rows!r}")


# The second part of an engine, see `Engine`.
Finish = Callable[[State, int, int], Tensor]

# Words of errors that tell of memory: an allocation that fails on a CPU is a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        words in str(error) for words in _NO_MEMORY
    )


def _score(
    engine: Engine, x: Tensor, classes: int, max_rows: int, finish: Finish | None = None
) -> tuple[Tensor, int]:
    """The results of `finish` (B, K, ...) in float64, and the rows that memory turned out to allow.

    They are log-likelihoods (B, K) where no other part of the engine is named.
    """
    finish = finish or engine.finish
    parts: list[Tensor] = []
    done = 0
    while done < len(x):
        images = max(1, max_rows // classes)
        block = x[done : done + images]
        try:
            state = engine.start(block)
            labels = [finish(state, first, last) for first, last in _spans(classes, max_rows)]
            parts.append(labels[0] if len(labels) == 1 else torch.cat(labels, dim=1))
        except (RuntimeError, MemoryError) as error:
            if max_rows == 1 or not _is_out_of_memory(error):
                raise
            max_rows = max(1, min(max_rows, len(block) * classes) // 2)
            if x.is_cuda:
                torch.cuda.empty_cache()
            continue
        done += len(block)
    return torch.cat(parts) if parts else x.new_zeros(0, classes, dtype=torch.float64), max_rows


def _spans(classes: int, max_rows: int) -> Iterator[tuple[int, int]]:
    """Labels in parts of at most `max_rows`, as even as can be."""
    parts = -(-classes // max_rows)
    size = -(-classes // parts)
    return ((first, min(first + size, classes)) for first in range(0, classes, size))


def log_prob_all(model: Flow, x: Tensor, max_rows: int | None = None) -> Tensor:
    """Log p(x|y) for every label, as a `LabelScorer` with defaults; under autograd and autocast if on.

    Args:
        model: the flow.
        x: (B, C, H, W) images in [-1, 1].
        max_rows: most rows (images times labels) in one pass; see `LabelScorer`.

    Returns:
        (B, K) nats, float32 or wider.

    Raises:
        ValueError: `max_rows` is smaller than 1.
        UninitializedModelError: the model has seen no data.
    """
    _check_rows(max_rows)
    if not model.initialized:
        raise UninitializedModelError
    scores, _ = _score(
        Eager(model), x, model.config.num_classes, default_rows(model) if max_rows is None else max_rows
    )
    return scores.to(torch.promote_types(x.dtype, torch.float32))
