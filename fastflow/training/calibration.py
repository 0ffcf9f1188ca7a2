"""From log-likelihoods to decisions: posterior, margin, typicality, and the temperature, fitted on validation data.

Torch-free, and all but the fit needs NumPy only.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOWEST, HIGHEST = 1e-2, 1e6
# A p-value of typicality below it is a flag.
ATYPICAL = 0.01


def check_prior(prior: ArrayLike, classes: int) -> NDArray[np.float64]:
    """Probabilities of labels as (K,) float64.

    Raises:
        ValueError: they are of another number, negative, not finite, or have another sum than 1.
    """
    values = np.asarray(prior, dtype=np.float64)
    if values.shape != (classes,) or not (values >= 0).all() or not abs(float(values.sum()) - 1.0) <= 1e-4:
        raise ValueError(f"prior must be {classes} probabilities that sum to 1, got {values.tolist()}")
    return values


def logits_of(log_probs: NDArray[Any], temperature: float = 1.0, prior: ArrayLike | None = None) -> NDArray[np.float64]:
    """``log_probs / temperature + log prior``, of which posterior and margin are made.

    Args:
        log_probs: (..., K) nats.
        temperature: positive; tempers the likelihood only.
        prior: (K,) probabilities that sum to 1; uniform when None.

    Raises:
        ValueError: the temperature is not positive, or the prior has another length, negative entries or another sum.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    logits = np.asarray(log_probs, dtype=np.float64) / temperature
    if prior is None:
        return logits
    with np.errstate(divide="ignore"):
        return logits + np.log(check_prior(prior, logits.shape[-1]))


def posterior(log_probs: NDArray[Any], temperature: float = 1.0, prior: ArrayLike | None = None) -> NDArray[np.float64]:
    """Probabilities of labels: the softmax of `logits_of`, whose arguments and errors it has.

    Returns:
        (..., K); NaN in rows that hold NaN.
    """
    logits = logits_of(log_probs, temperature, prior)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def margin(log_probs: NDArray[np.float64], temperature: float = 1.0, prior: ArrayLike | None = None) -> float:
    """Posterior log-odds between the best and the second label, nats, also where the probabilities round to 1 and 0.

    Args:
        log_probs: (K,) nats.
        temperature: see `logits_of`.
        prior: see `logits_of`.
    """
    if len(log_probs) < 2:
        return math.inf
    second, best = np.sort(logits_of(log_probs, temperature, prior))[-2:]
    return float(best - second)


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


def fit_temperature(log_probs: NDArray[Any], labels: NDArray[Any], prior: NDArray[Any] | None = None) -> float:
    """The temperature that makes held-out posteriors most likely. Source: Guo et al., 2017, with an untempered prior.

    Args:
        log_probs: (N, K) nats.
        labels: (N,) integers in [0, K).
        prior: (K,) probabilities; uniform when None.

    Returns:
        A temperature between 0.01 and 1e6.

    Raises:
        ValueError: there are no samples, or shapes do not fit.
    """
    from scipy.optimize import minimize_scalar

    if log_probs.ndim != 2 or labels.shape != (len(log_probs),) or len(labels) == 0:
        raise ValueError(f"log_probs (N, K) and labels (N,) must fit, N > 0; got {log_probs.shape} and {labels.shape}")
    bounds = (np.log(LOWEST), np.log(HIGHEST))
    # The loss may have flat stretches far from its minimum, so a coarse scan brackets it first.
    grid = np.linspace(*bounds, 60)
    best = int(np.argmin([negative_log_posterior(log_probs, labels, float(np.exp(g)), prior) for g in grid]))
    bracket = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    found = minimize_scalar(
        lambda g: negative_log_posterior(log_probs, labels, float(np.exp(g)), prior), bounds=bracket, method="bounded"
    )
    return float(np.exp(found.x))


def typicality(log_prob: float, validation: Sequence[float]) -> float:
    """Two-sided p-value of a log-likelihood among those of validation data: small where it is lower or higher than usual.

    Likelihoods of unlike images can be too high as well as too low. Source: Nalisnick et al., 2019, with one sample and ranks
    in place of a bootstrap.

    Args:
        log_prob: nats.
        validation: sorted, nats, at least one.

    Returns:
        ``2 (1 + r) / (n + 1)``, at most 1, r the number of validation values that are as extreme on the nearer side. Its lowest
        value is ``2 / (n + 1)``.

    Raises:
        ValueError: there are no validation values.
    """
    n = len(validation)
    if n == 0:
        raise ValueError("validation must hold at least one log-likelihood")
    below, above = bisect.bisect_right(validation, log_prob), n - bisect.bisect_left(validation, log_prob)
    return min(1.0, 2.0 * (1 + min(below, above)) / (n + 1))
