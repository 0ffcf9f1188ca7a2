"""All labels of an image in one batched pass: labels are a batch dimension, and what they share is computed once.

`log_prob_all` is the engine; `score_slices` runs it over 8-bit slices in batches and `volume_log_probs` joins a volume's slices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastflow import kernels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fastflow.models.magic_flow import LabelTables, MagicFlow

# Rows are micro-batched so that one activation of the widest stage stays near this many elements (tens of MB): larger batches
# only stream more memory.
ELEMENTS = 1 << 21


def log_prob_all(model: MagicFlow, x: Tensor, max_rows: int | None = None) -> Tensor:
    """Log p(x|y) for every label.

    Args:
        model: the flow.
        x: (B, C, H, W) images in [-1, 1].
        max_rows: most rows (images times labels) in one pass; chosen from the image size when None.

    Returns:
        (B, K) nats, float32 or wider.

    Raises:
        ValueError: `max_rows` is smaller than 1.
    """
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    classes = model.config.num_classes
    if max_rows is None:
        max_rows = max(classes, ELEMENTS // (model.config.num_dims * max(1, model.config.widths[0][0] // 4)))
    images = max(1, max_rows // classes)
    tables = model.label_tables(torch.arange(classes, device=x.device))
    return torch.cat([_all_labels(model, part, tables) for part in x.split(images)] or [x.new_zeros(0, classes)])


def _all_labels(model: MagicFlow, x: Tensor, tables: LabelTables) -> Tensor:
    classes, steps, free = model.config.num_classes, model.config.num_steps, tables.free_steps
    shared = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    h, splits, logdets = model.run_steps(x, tables, shared, 0, free)
    rows = torch.arange(classes, device=x.device).repeat(x.shape[0])
    h, more_splits, more_logdets = model.run_steps(h.repeat_interleave(classes, dim=0), tables, rows, free, steps)
    terms = [value.repeat_interleave(classes) for value in logdets + [kernels.latent_prior(block.flatten(1)) for block in splits]]
    terms += more_logdets + [kernels.latent_prior(block.flatten(1)) for block in (h, *more_splits)]
    return model.total(terms).view(-1, classes)


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
        ValueError: the temperature is not positive, or the prior has another length, negative entries or another sum.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = log_probs.double() / temperature
    if prior is not None:
        logits = logits + _check_prior(prior, log_probs.shape[1]).to(logits.device).log()
    return torch.softmax(logits, dim=1).to(log_probs.dtype)


def _check_prior(prior: Tensor | Sequence[float], classes: int) -> Tensor:
    values = torch.as_tensor(prior, dtype=torch.float64)
    if tuple(values.shape) != (classes,) or bool((values < 0).any()) or abs(float(values.sum()) - 1.0) > 1e-4:
        raise ValueError(f"prior must be {classes} probabilities that sum to 1, got {values.tolist()}")
    return values


@torch.inference_mode()
def score_slices(
    model: MagicFlow,
    images: NDArray[np.uint8],
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> NDArray[np.float64]:
    """Log-likelihoods of 8-bit slices under every label.

    Args:
        model: the flow, in evaluation mode.
        images: (N, 1, H, W) uint8.
        batch_size: images per pass.
        progress: called with the number of slices done.

    Returns:
        (N, K) nats.
    """
    out = np.empty((len(images), model.config.num_classes))
    for start in range(0, len(images), batch_size):
        x = from_uint8(torch.from_numpy(images[start : start + batch_size]).to(model.device))
        out[start : start + batch_size] = model.log_prob_all(x).double().cpu().numpy()
        if progress is not None:
            progress(min(start + batch_size, len(images)))
    return out


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
