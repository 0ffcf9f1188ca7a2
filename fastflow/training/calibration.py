"""The temperature of the posterior, fitted on validation data. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e6


def negative_log_posterior(
    log_probs: NDArray[Any], labels: NDArray[Any], temperature: float, prior: NDArray[Any] | None = None
) -> float:
    """Mean of ``-log softmax(log_probs / temperature + log prior)[label]`` in nats.

    Args:
        log_probs: (N, K) nats.
        labels: (N,) integers.
        temperature: positive.
        prior: (K,) probabilities; uniform when None.
    """
    from scipy.special import log_softmax

    logits = np.asarray(log_probs, dtype=np.float64) / temperature
    if prior is not None:
        logits = logits + np.log(np.asarray(prior, dtype=np.float64))
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def fit_temperature(
    log_probs: NDArray[Any],
    labels: NDArray[Any],
    prior: NDArray[Any] | None = None,
    least: float = MIN_TEMPERATURE,
) -> float:
    """The temperature that makes held-out posteriors most likely.

    Source: Guo et al., 2017, with an untempered prior.

    Args:
        log_probs: (N, K) nats.
        labels: (N,) integers in [0, K).
        prior: (K,) probabilities; uniform when None.
        least: lowest temperature that is tried.

    Returns:
        A temperature between `least` and 1e6.

    Raises:
        ValueError: there are no samples, shapes do not fit, or log-likelihoods are not finite.
    """
    from scipy.optimize import minimize_scalar

    if log_probs.ndim != 2 or labels.shape != (len(log_probs),) or len(labels) == 0:
        raise ValueError(
            f"log_probs (N, K) and labels (N,) must fit, N > 0; got {log_probs.shape} and {labels.shape}"
        )
    wrong = np.flatnonzero(~np.isfinite(log_probs).all(axis=1))
    if len(wrong):
        raise ValueError(
            f"log_probs must be finite, but {len(wrong)} of {len(log_probs)} rows are not, the first is row "
            f"{wrong[0]}: {log_probs[wrong[0]].tolist()}; leave such samples out, or look at the model"
        )
    bounds = (np.log(least), np.log(MAX_TEMPERATURE))
    # The loss may have flat stretches far from its minimum, so a coarse scan brackets it first.
    grid = np.linspace(*bounds, 60)
    best = int(np.argmin([negative_log_posterior(log_probs, labels, float(np.exp(g)), prior) for g in grid]))
    bracket = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(
        lambda g: negative_log_posterior(log_probs, labels, float(np.exp(g)), prior),
        bounds=bracket,
        method="bounded",
    )
    return float(np.exp(found.x))
