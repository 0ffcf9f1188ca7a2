from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.decision import (
    NOT_FINITE,
    DecisionRule,
    accepted_range,
    check_prior,
    decide,
    logits_of,
    margin,
    posterior,
    range_around,
    typicality,
)
from fastflow.readout import GaussianReadout, gaps

SLICES = np.array([[-10.0, -12.0, -30.0], [-14.0, -11.0, -30.0]])
# The second class lies where the slices are, and has not the largest posterior by likelihood and prior.
READOUT_MEANS = gaps(SLICES.mean(axis=0)) + np.array([[2.0, 3.0], [0.0, 0.0], [-3.0, 2.0]])


def test_a_decision_by_hand() -> None:
    decision = decide(SLICES, DecisionRule(temperature=2.0, prior=[0.5, 0.25, 0.25]))
    assert decision.log_probs.tolist() == [-24.0, -23.0, -60.0]
    logits = np.array([-12.0, -11.5, -30.0]) + np.log([0.5, 0.25, 0.25])
    expected = np.exp(logits) / np.exp(logits).sum()
    assert decision.posterior == pytest.approx(expected)
    # The prior outweighs half a nat.
    assert decision.label_index == 0
    assert decision.margin == pytest.approx(math.log(2.0) - 0.5)
    assert decision.slice_log_prob == -12.0
    assert (decision.typicality, decision.flags) == (None, ())


def test_a_mean_is_a_slice_and_no_prior_is_a_uniform_one() -> None:
    decision = decide(SLICES, DecisionRule(combine="mean"))
    assert decision.log_probs.tolist() == [-12.0, -11.5, -30.0]
    assert (decision.label_index, decision.slice_log_prob) == (1, -11.5)
    uniform = decide(SLICES, DecisionRule(combine="mean", prior=[1 / 3] * 3))
    assert uniform.posterior == pytest.approx(decision.posterior)


@given(
    st.lists(st.lists(st.floats(-1e5, 1e5), min_size=3, max_size=3), min_size=1, max_size=4),
    st.floats(0.1, 100),
    st.sampled_from(["sum", "mean"]),
)
@settings(max_examples=50)
def test_a_decision_is_its_parts(rows: list[list[float]], temperature: float, combine: str) -> None:
    prior, values = [0.2, 0.3, 0.5], np.array(rows)
    decision = decide(values, DecisionRule(temperature, prior, combine))
    log_probs = values.sum(axis=0) if combine == "sum" else values.mean(axis=0)
    assert (decision.log_probs == log_probs).all()
    assert (decision.posterior == posterior(log_probs, temperature, prior)).all()
    assert decision.margin == margin(log_probs, temperature, prior)
    assert decision.posterior[decision.label_index] == decision.posterior.max()
    assert decision.slice_log_prob == values[:, decision.label_index].mean()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_likelihoods_that_are_not_finite_are_not_decided(value: float) -> None:
    with pytest.raises(FloatingPointError, match=NOT_FINITE):
        decide(np.array([[0.0, 1.0], [value, 0.0]]), DecisionRule())


def test_rare_likelihoods_are_flagged() -> None:
    validation = np.linspace(-1.0, 1.0, 999).tolist()
    for value, flagged in ((0.0, False), (-2.0, True), (2.0, True)):
        decision = decide(np.array([[value, -9.0]]), DecisionRule(validation=validation))
        assert decision.typicality == typicality(value, validation)
        assert bool(decision.flags) == flagged
    assert decision.flags == (("atypical", "typicality p-value 0.002"),)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30), st.floats(-2e3, 2e3))
def test_a_likelihood_beyond_all_of_few_validation_values_is_flagged(
    values: list[float], value: float
) -> None:
    validation = sorted(values)
    decision = decide(np.array([[value, -9e3]]), DecisionRule(validation=validation))
    beyond = not validation[0] <= value <= validation[-1]
    assert [code for code, _ in decision.flags] == (["atypical"] if beyond else [])
    assert decision.typicality is not None and decision.typicality >= 2 / 31
    # A model says how far beyond them is too far.
    wide = DecisionRule(validation=validation, accepted=(-3e3, 3e3))
    assert decide(np.array([[value, -9e3]]), wide).flags == ()


def test_a_flag_names_the_likelihood_and_those_of_validation() -> None:
    rule = DecisionRule(validation=[-3.0, -2.0, -1.5], accepted=(-4.0, -0.5))
    for value, side in ((-4.5, "below"), (0.0, "above")):
        ((code, message),) = decide(np.array([[value, -9.0]]), rule).flags
        assert code == "atypical"
        assert message == (
            f"log-likelihood {value:.6g} nats a slice, {side} all of the 3 validation values (-3 to -1.5)"
        )
    assert decide(np.array([[-3.5, -9.0]]), rule).flags == ()
    # Without values to compare with, a range means nothing.
    assert decide(np.array([[0.0, -9.0]]), DecisionRule(accepted=(-4.0, -0.5))).flags == ()
    # Many values have small p-values of their own.
    many = DecisionRule(validation=np.linspace(-3.0, -1.0, 999).tolist(), accepted=(-9.0, 9.0))
    assert [code for code, _ in decide(np.array([[0.0, -9.0]]), many).flags] == ["atypical"]


@pytest.mark.parametrize("count", [8, 20, 56, 150])
def test_hardly_any_value_like_the_others_lies_outside_of_the_range_around_them(count: int) -> None:
    rng = np.random.default_rng(0)
    outside = []
    for _ in range(200):
        low, high = range_around(np.sort(rng.normal(size=count)).tolist())
        new = rng.normal(size=100)
        outside.append(np.mean((new < low) | (new > high)))
    assert 0.002 < np.mean(outside) < 0.025


def test_the_range_around_values_by_hand() -> None:
    assert range_around([-3.0, -2.0, -1.5, -1.0]) == (-5.5, 1.5)
    assert range_around([7.0]) == (7.0, 7.0)


def test_the_accepted_range_of_a_document() -> None:
    assert accepted_range({}) is None and accepted_range({"accepted": None}) is None
    assert accepted_range({"accepted": [-4, 1]}) == (-4.0, 1.0)


def test_rules_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="combine must be one of sum, mean, got 'max'"):
        DecisionRule(combine="max")
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            decide(SLICES, DecisionRule(temperature=temperature))
    for prior in ([0.5, 0.5], [0.5, 0.4, 0.0], [1.5, -0.5, 0.0], [math.nan, 0.5, 0.5]):
        with pytest.raises(ValueError, match="prior must be 3 probabilities that sum to 1"):
            decide(SLICES, DecisionRule(prior=prior))
        with pytest.raises(ValueError, match="prior must be 3 probabilities that sum to 1"):
            check_prior(prior, 3)


def test_posteriors_of_many_rows_at_once() -> None:
    values = np.array([[0.0, 0.0], [1000.0, 0.0], [np.nan, 0.0]])
    probabilities = posterior(values, prior=[0.25, 0.75])
    assert probabilities[0] == pytest.approx([0.25, 0.75])
    assert probabilities[1].tolist() == [1.0, 0.0]
    assert np.isnan(probabilities[2]).all()
    assert logits_of(values, 2.0)[1].tolist() == [500.0, 0.0]


@given(st.lists(st.floats(-1e5, 1e5), min_size=2, max_size=6), st.floats(0.1, 1000))
def test_margin_is_the_log_odds_of_the_best_two(log_probs: list[float], temperature: float) -> None:
    values = np.array(log_probs)
    best, second = sorted(values / temperature, reverse=True)[:2]
    assert margin(values, temperature) == pytest.approx(best - second)


def test_margin_does_not_saturate_and_knows_the_impossible() -> None:
    assert margin(np.array([0.0, -5000.0])) == 5000.0
    assert margin(np.array([0.0, -1.0]), prior=[1.0, 0.0]) == np.inf
    assert margin(np.array([0.0])) == np.inf


def test_a_readout_decides_and_the_argmax_stands_beside_it() -> None:
    readout = GaussianReadout(("a", "b", "c"), READOUT_MEANS, np.eye(2), temperature=2.0, slice_counts=(2, 2))
    plain = decide(SLICES, DecisionRule(3.0, [0.5, 0.25, 0.25], validation=[-9.0, -1.0]))
    rule = DecisionRule(3.0, [0.5, 0.25, 0.25], validation=[-9.0, -1.0], readout=readout)
    decision = decide(SLICES, rule)
    logits = readout.discriminants(SLICES.mean(axis=0)) / 2.0 + np.log([0.5, 0.25, 0.25])
    np.testing.assert_allclose(decision.posterior, np.exp(logits) / np.exp(logits).sum())
    second, best = np.sort(logits)[-2:]
    assert decision.margin == pytest.approx(best - second)
    assert decision.label_index == logits.argmax() != plain.label_index
    assert decision.argmax_index == plain.label_index == plain.argmax_index
    assert (decision.slice_log_prob, decision.typicality) == (plain.slice_log_prob, plain.typicality)
    assert np.array_equal(decision.log_probs, plain.log_probs) and decision.flags == plain.flags
    mean = decide(SLICES, dataclasses.replace(rule, combine="mean"))
    assert np.array_equal(mean.posterior, decision.posterior)


def test_another_number_of_slices_than_the_readouts_is_flagged() -> None:
    readout = GaussianReadout(("a", "b", "c"), READOUT_MEANS, np.eye(2), slice_counts=(3, 5))
    ((code, message),) = decide(SLICES, DecisionRule(readout=readout)).flags
    assert (code, message) == (
        "readout_slices",
        f"the read-out was fitted to volumes of 3 to 5 slices, this one has {len(SLICES)}",
    )
    with pytest.raises(ValueError, match="3 classes"):
        decide(SLICES[:, :2], DecisionRule(readout=readout))
