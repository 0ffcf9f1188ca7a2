"""The temperature: recovered where it is known, and better than 1 where likelihoods are overconfident."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflow.decision import typicality
from fastflow.training.calibration import fit_temperature, negative_log_posterior


def samples(temperature, prior, count=20000, seed=0):
    """Log-likelihoods whose posterior at `temperature` is the distribution that the labels are drawn from."""
    rng = np.random.default_rng(seed)
    log_probs = rng.normal(-30000, 3 * temperature, (count, len(prior)))
    logits = log_probs / temperature + np.log(prior)
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return log_probs, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 40.0, 600.0])
@pytest.mark.parametrize("prior", [[1 / 3] * 3, [0.7, 0.2, 0.1]])
def test_the_temperature_behind_the_labels_is_found(temperature, prior):
    log_probs, labels = samples(temperature, prior)
    assert fit_temperature(log_probs, labels, np.array(prior)) == pytest.approx(temperature, rel=0.05)


def test_no_other_temperature_is_better():
    log_probs, labels = samples(7.0, [0.5, 0.5], 300, seed=1)
    best = fit_temperature(log_probs, labels)
    at = [negative_log_posterior(log_probs, labels, t) for t in (best, best * 1.1, best / 1.1, 1.0)]
    assert at[0] == min(at)


def test_it_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="N > 0"):
        fit_temperature(np.zeros((0, 3)), np.zeros(0, dtype=int))
    with pytest.raises(ValueError, match="fit"):
        fit_temperature(np.zeros((2, 3)), np.zeros(3, dtype=int))
    for value in (np.nan, np.inf, -np.inf):
        log_probs = np.zeros((4, 2))
        log_probs[2, 1] = value
        with pytest.raises(ValueError, match=r"log_probs must be finite, but 1 of 4 rows are not, .* row 2"):
            fit_temperature(log_probs, np.zeros(4, dtype=int))


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=50), st.floats(-2e5, 2e5))
def test_typicality_is_a_two_sided_rank(values: list[float], value: float) -> None:
    ordered = sorted(values)
    below, above = sum(v <= value for v in values), sum(v >= value for v in values)
    assert typicality(value, ordered) == pytest.approx(
        min(1.0, 2 * (1 + min(below, above)) / (len(values) + 1))
    )
    # Outside of all of them it is as small as it can be.
    lowest = min(1.0, 2 / (len(values) + 1))
    assert (
        typicality(ordered[0] - 1.0, ordered)
        == typicality(ordered[-1] + 1.0, ordered)
        == pytest.approx(lowest)
    )


def test_typicality_of_like_data_is_uniform() -> None:
    rng = np.random.default_rng(0)
    values = [typicality(float(rng.normal()), np.sort(rng.normal(size=199)).tolist()) for _ in range(2000)]
    for level in (0.05, 0.2, 0.5):
        assert np.mean(np.array(values) <= level) == pytest.approx(level, abs=0.035)


def test_typicality_needs_validation_values() -> None:
    with pytest.raises(ValueError, match="at least one"):
        typicality(0.0, [])
