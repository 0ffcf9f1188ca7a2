"""All labels of an image in one batched pass; whatever labels share is computed once.

`LabelScorer` is the engine; `log_prob_all` is the engine with its defaults, under autograd where gradients
are recorded. `score_slices` runs a scorer over 8-bit slices in batches and `volume_log_probs` joins a
volume's slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastflow.decision import check_prior, check_temperature
from fastflow.models.flow import Flow
from fastflow.models.inference.precision import PRECISIONS, has_bfloat16
from fastflow.models.inference.scorer import ENGINES, LabelScorer, LatentScores, Scores, log_prob_all

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "LabelScorer",
    "LatentScores",
    "Scores",
    "from_uint8",
    "has_bfloat16",
    "log_prob_all",
    "posterior_from_log_probs",
    "score_slices",
    "score_slices_with_latents",
    "volume_log_probs",
]


def posterior_from_log_probs(
    log_probs: Tensor, temperature: float = 1.0, prior: Tensor | Sequence[float] | None = None
) -> Tensor:
    """Softmax over labels of ``log_probs / temperature + log prior``.

    Args:
        log_probs: (B, K) nats.
        temperature: positive; tempers the likelihood only.
        prior: (K,) probabilities that sum to 1; uniform when None.

    Returns:
        (B, K).

    Raises:
        ValueError: the temperature is not positive, or the prior has another length, negative entries or
            another sum.
    """
    logits = log_probs.double() / check_temperature(temperature)
    if prior is not None:
        values = prior.tolist() if isinstance(prior, Tensor) else prior
        checked = torch.from_numpy(check_prior(values, log_probs.shape[1]))
        logits = logits + checked.to(logits.device).log()
    return torch.softmax(logits, dim=1).to(log_probs.dtype)


@torch.inference_mode()
def score_slices(
    model: Flow | LabelScorer,
    images: NDArray[np.uint8],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Log-likelihoods of 8-bit slices under every label.

    Args:
        model: the flow, in evaluation mode, or a scorer of it.
        images: (N, 1, H, W) uint8.
        batch_size: images per pass.
        progress: called with the number of slices done.

    Returns:
        (N, K) nats.
    """
    scorer = _scorer_of(model)
    out = np.empty((len(images), scorer.model.config.num_classes))
    for start, x in _batches(scorer, images, batch_size):
        out[start : start + len(x)] = scorer(x).double().cpu().numpy()
        if progress is not None:
            progress(start + len(x))
    return out


@torch.inference_mode()
def score_slices_with_latents(
    model: Flow | LabelScorer, images: NDArray[np.uint8], batch_size: int = 64
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As `score_slices`, with the correlations within the latent from the same passes.

    Args:
        model: see `score_slices`.
        images: (N, 1, H, W) uint8.
        batch_size: images per pass.

    Returns:
        `(log_probs, correlations)`: (N, K) nats, and (N, K, J, 2), see `LatentScores`.
    """
    scorer = _scorer_of(model)
    config = scorer.model.config
    log_probs = np.empty((len(images), config.num_classes))
    correlations = np.empty((*log_probs.shape, len(config.latent_shapes), 2))
    for start, x in _batches(scorer, images, batch_size):
        found = scorer.score_with_latents(x)
        log_probs[start : start + len(x)] = found.log_probs.double().cpu().numpy()
        correlations[start : start + len(x)] = found.correlations.double().cpu().numpy()
    return log_probs, correlations


def _scorer_of(model: Flow | LabelScorer) -> LabelScorer:
    return model if isinstance(model, LabelScorer) else LabelScorer(model, engine="eager")


def _batches(scorer: LabelScorer, images: NDArray[np.uint8], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """The number of the first image of each batch, and the batch in [-1, 1] on the scorer's device."""
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(images[start : start + batch_size])
        if scorer.model.device.type == "cuda":
            # Only pinned memory is copied beside other work, and as fast as the bus can.
            batch = batch.pin_memory()
        yield start, from_uint8(batch.to(scorer.model.device, non_blocking=True))


def from_uint8(images: Tensor) -> Tensor:
    """8-bit images to [-1, 1]: ``2 * v / 255 - 1``, the published scaling."""
    return images.float() * (2.0 / 255.0) - 1.0


def volume_log_probs(slice_log_probs: NDArray[np.float64], volumes: NDArray[Any]) -> NDArray[np.float64]:
    """Sum the log-likelihoods of each volume's slices, as if they were independent given the label.

    Args:
        slice_log_probs: (N, K) nats.
        volumes: (N,) index of each slice's volume, from 0 to V - 1.

    Returns:
        (V, K) nats.
    """
    out = np.zeros((int(volumes.max(initial=-1)) + 1, slice_log_probs.shape[1]))
    np.add.at(out, volumes, slice_log_probs)
    return out
