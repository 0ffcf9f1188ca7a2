"""Scorers of a run's images: a model of PyTorch, or an export on ONNX Runtime, behind one protocol.

Torch-free until a `ModelScorer` scores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from fastflow.errors import RunStoppedError
from fastflow.runtime.export_folder import Export as Export
from fastflow.runtime.export_folder import read_export as read_export
from fastflow.runtime.scorer import OnnxScorer as OnnxScorer

if TYPE_CHECKING:
    from fastflow.models.scoring import LabelScorer


class ImageScorer(Protocol):
    """A scorer of images.

    Attributes:
        input_shape: (C, H, W) of an image.
        needs_full_batches: whether an image's last bits may depend on its batch, so that all batches must
            have one size.
    """

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def needs_full_batches(self) -> bool: ...

    def score(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Log-likelihoods of images, (B, C, H, W) uint8 -> (B, K) nats, in one pass."""
        ...

    def score_with_latents(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As `score`, with (B, K, J, 2) correlations of the J latent blocks under each label."""
        ...


class ModelScorer:
    """A model of PyTorch.

    Args:
        scorer: the model with its engine.
    """

    needs_full_batches = True

    def __init__(self, scorer: LabelScorer) -> None:
        self.scorer = scorer

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return self.scorer.model.config.input_shape

    def score(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """See `ImageScorer`."""
        from fastflow.models.scoring import score_slices

        return score_slices(self.scorer, images, len(images))

    def score_with_latents(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `ImageScorer`."""
        from fastflow.models.scoring import score_slices_with_latents

        return score_slices_with_latents(self.scorer, images, len(images))


class ExportScorer:
    """An export.

    Args:
        scorer: its score graph.
    """

    def __init__(self, scorer: OnnxScorer) -> None:
        self.scorer = scorer

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return self.scorer.input_shape

    @property
    def needs_full_batches(self) -> bool:
        """Images that go one by one depend on no other image."""
        return self.scorer.buckets != (1,)

    def score(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """See `ImageScorer`.

        Raises:
            RunStoppedError: ONNX Runtime fails.
        """
        with _runtime_errors():
            return self.scorer.score(images)

    def score_with_latents(
        self, images: NDArray[np.uint8]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """See `ImageScorer`.

        Raises:
            RunStoppedError: ONNX Runtime fails.
        """
        with _runtime_errors():
            return self.scorer.score_with_latents(images)


@contextlib.contextmanager
def _runtime_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunStoppedError(f"{error}. The rows so far are kept; --resume goes on") from error
