"""From log-likelihoods to a decision: posterior, margin, typicality, for the model, archives and exports.

NumPy only, so that an export decides without PyTorch.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflow.readout import GaussianReadout

# A p-value of typicality below this one is a flag.
ATYPICAL = 0.01
# The range of n validation values is widened by this over n of its width.
MARGIN_OF_FEW = 5.0
NOT_FINITE = "the model gives the image a log-likelihood that is not finite"
COMBINE = ("sum", "mean")
# The flag of a volume whose number of slices is none of those that the read-out was fitted to.
READOUT_SLICES = "readout_slices"
# Priors may be given as rounded decimals.
PRIOR_SUM_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class DecisionRule:
    """The settings that a decision depends on, beside the log-likelihoods.

    Attributes:
        temperature: divides log-likelihoods; positive.
        prior: (K,) probabilities of the labels; uniform when None.
        combine: ``"sum"`` or ``"mean"`` of a volume's slices.
        validation: sorted log-likelihoods, nats a slice, of validation volumes under their predicted label;
            None where there are none.
        accepted: lowest and highest log-likelihood, nats a slice, that is not flagged; those of `validation`
            when None. It is a range for `validation` and means nothing without it.
        readout: the Gaussian read-out that decides; None where the largest log-likelihood does (argmax). It
            takes means over slices whatever `combine` says, and has a temperature of its own.

    Raises:
        ValueError: `combine` is neither.
    """

    temperature: float = 1.0
    prior: ArrayLike | None = None
    combine: str = "sum"
    validation: Sequence[float] | None = None
    accepted: tuple[float, float] | None = None
    readout: GaussianReadout | None = None

    def __post_init__(self) -> None:
        if self.combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {self.combine!r}")


@dataclasses.dataclass(frozen=True)
class Decision:
    """The decision on a volume.

    Attributes:
        label_index: the likeliest label a posteriori, by the rule's read-out.
        log_probs: (K,) nats of the volume.
        posterior: (K,) probabilities, by the rule's read-out.
        margin: posterior log-odds between the best and the second label, by the rule's read-out, nats.
        slice_log_prob: mean log-likelihood of a slice under the label that argmax predicts, nats.
        typicality: p-value of `slice_log_prob` among validation data; None where there is nothing to compare
            with.
        flags: (code, message) of each doubt.
        argmax_index: the label of the largest tempered log-likelihood and prior, whatever the read-out.
    """

    label_index: int
    log_probs: NDArray[np.float64]
    posterior: NDArray[np.float64]
    margin: float
    slice_log_prob: float
    typicality: float | None
    flags: tuple[tuple[str, str], ...]
    argmax_index: int


def decide(slice_log_probs: NDArray[np.float64], rule: DecisionRule) -> Decision:
    """Decide a volume's label.

    Args:
        slice_log_probs: (n, K) nats of its slices.
        rule: the settings of the decision.

    Raises:
        FloatingPointError: a log-likelihood is not finite; the message is `NOT_FINITE`.
        ValueError: the temperature or the prior does not fit, or the read-out is of other classes.
    """
    if not np.isfinite(slice_log_probs).all():
        raise FloatingPointError(NOT_FINITE)
    log_probs = slice_log_probs.sum(axis=0) if rule.combine == "sum" else slice_log_probs.mean(axis=0)
    logits = logits_of(log_probs, rule.temperature, rule.prior)
    probabilities = _softmax(logits)
    argmax = best = int(probabilities.argmax())
    # Validation values are those of the argmax, and a likelihood is compared with its like.
    slice_log_prob = float(slice_log_probs[:, argmax].mean())
    p_value = None if rule.validation is None else typicality(slice_log_prob, rule.validation)
    flags = _doubts(slice_log_prob, p_value, rule)
    if rule.readout is not None:
        logits = readout_logits(slice_log_probs.mean(axis=0), rule.readout, rule.prior)
        probabilities = _softmax(logits)
        best = int(probabilities.argmax())
        flags += _doubts_of_readout(len(slice_log_probs), rule.readout)
    odds = _lead_of_the_best(logits)
    return Decision(best, log_probs, probabilities, odds, slice_log_prob, p_value, flags, argmax)


def readout_logits(
    log_probs: NDArray[Any], readout: GaussianReadout, prior: ArrayLike | None = None
) -> NDArray[np.float64]:
    """The read-out's tempered log-densities plus the log prior, which is not tempered.

    Args:
        log_probs: (..., K) means over a volume's slices, nats a slice.
        readout: of K classes.
        prior: (K,) probabilities that sum to 1; uniform when None.

    Returns:
        (..., K), of which `posterior` is the softmax.

    Raises:
        ValueError: the number of classes or the prior does not fit.
    """
    return logits_of(readout.discriminants(log_probs), readout.temperature, prior)


def _doubts_of_readout(count: int, readout: GaussianReadout) -> tuple[tuple[str, str], ...]:
    least, most = readout.slice_counts
    if least <= count <= most:
        return ()
    fitted = str(least) if least == most else f"{least} to {most}"
    message = f"the read-out was fitted to volumes of {fitted} slices, this one has {count}"
    return ((READOUT_SLICES, message),)


def _doubts(log_prob: float, p_value: float | None, rule: DecisionRule) -> tuple[tuple[str, str], ...]:
    """Few validation values have no small p-values, so that a value beyond all of them is told as well."""
    if rule.validation is None or p_value is None:
        return ()
    if p_value < ATYPICAL:
        return (("atypical", f"typicality p-value {p_value:.2g}"),)
    lowest, highest = rule.validation[0], rule.validation[-1]
    low, high = rule.accepted or (lowest, highest)
    if low <= log_prob <= high:
        return ()
    side = "below" if log_prob < low else "above"
    message = (
        f"log-likelihood {log_prob:.6g} nats a slice, {side} all of the {len(rule.validation)} validation "
        f"values ({lowest:.6g} to {highest:.6g})"
    )
    return (("atypical", message),)


def range_around(validation: Sequence[float]) -> tuple[float, float]:
    """The log-likelihoods that are not flagged beside few validation values: `DecisionRule.accepted`.

    A new value lies beyond all of n others with probability ``2 / (n + 1)``. The range from the lowest to the
    highest is therefore widened at each end by ``5 / n`` of its width: of normal values one to two in a
    hundred then lie outside, from n = 8 to 200, from where on p-values tell.

    Args:
        validation: sorted, nats, at least one.
    """
    margin = MARGIN_OF_FEW / len(validation) * (validation[-1] - validation[0])
    return validation[0] - margin, validation[-1] + margin


def accepted_range(validation: Mapping[str, Any]) -> tuple[float, float] | None:
    """`DecisionRule.accepted` of what a model's metadata say of its validation; None where they do not."""
    if validation.get("accepted") is None:
        return None
    low, high = validation["accepted"]
    return float(low), float(high)


def check_temperature(temperature: float) -> float:
    """The temperature.

    Raises:
        ValueError: it is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return temperature


def check_prior(prior: ArrayLike, classes: int) -> NDArray[np.float64]:
    """Probabilities of labels as (K,) float64.

    Raises:
        ValueError: they are of another number, negative, not finite, or have another sum than 1.
    """
    values = np.asarray(prior, dtype=np.float64)
    fits = values.shape == (classes,) and bool((values >= 0).all())
    # A comparison with NaN is false.
    if not (fits and abs(float(values.sum()) - 1.0) <= PRIOR_SUM_TOLERANCE):
        raise ValueError(f"prior must be {classes} probabilities that sum to 1, got {values.tolist()}")
    return values


def logits_of(
    log_probs: NDArray[Any], temperature: float = 1.0, prior: ArrayLike | None = None
) -> NDArray[np.float64]:
    """``log_probs / temperature + log prior``, of which posterior and margin are made.

    Args:
        log_probs: (..., K) nats.
        temperature: positive; tempers the likelihood only.
        prior: (K,) probabilities that sum to 1; uniform when None.

    Raises:
        ValueError: the temperature is not positive, or the prior has another length, negative entries or
            another sum.
    """
    logits = np.asarray(log_probs, dtype=np.float64) / check_temperature(temperature)
    if prior is None:
        return logits
    with np.errstate(divide="ignore"):
        return logits + np.log(check_prior(prior, logits.shape[-1]))


def posterior(
    log_probs: NDArray[Any], temperature: float = 1.0, prior: ArrayLike | None = None
) -> NDArray[np.float64]:
    """Probabilities of labels: the softmax of `logits_of`, whose arguments and errors it has.

    Returns:
        (..., K); NaN in rows that hold NaN.
    """
    return _softmax(logits_of(log_probs, temperature, prior))


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def margin(log_probs: NDArray[np.float64], temperature: float = 1.0, prior: ArrayLike | None = None) -> float:
    """Posterior log-odds between the best and the second label, nats; exact also where probabilities round.

    Args:
        log_probs: (K,) nats.
        temperature: see `logits_of`.
        prior: see `logits_of`.
    """
    return _lead_of_the_best(logits_of(log_probs, temperature, prior))


def _lead_of_the_best(logits: NDArray[np.float64]) -> float:
    if len(logits) < 2:
        return math.inf
    second, best = np.sort(logits)[-2:]
    return float(best - second)


def typicality(log_prob: float, validation: Sequence[float]) -> float:
    """Two-sided p-value of a log-likelihood among those of validation data.

    It is small where the log-likelihood is lower or higher than usual: likelihoods of unlike images can be
    too high as well as too low. Source: Nalisnick et al., 2019, with one sample and ranks in place of a
    bootstrap.

    Args:
        log_prob: nats.
        validation: sorted, nats, at least one.

    Returns:
        ``2 (1 + r) / (n + 1)``, at most 1, r the number of validation values that are as extreme on the
        nearer side. Its lowest value is ``2 / (n + 1)``.

    Raises:
        ValueError: there are no validation values.
    """
    n = len(validation)
    if n == 0:
        raise ValueError("validation must hold at least one log-likelihood")
    below, above = bisect.bisect_right(validation, log_prob), n - bisect.bisect_left(validation, log_prob)
    return min(1.0, 2.0 * (1 + min(below, above)) / (n + 1))
