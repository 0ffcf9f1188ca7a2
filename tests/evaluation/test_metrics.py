from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from fastflow.evaluation.metrics import (
    FIGURES,
    auc_one_vs_rest,
    expected_calibration_error,
    log_odds,
    logs_of,
    mean_over_classes,
    negative_log_likelihood,
    probability_metrics,
    weighted_figures,
)

LABELS = np.array([0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.1, 0.3, 0.6]]
)


def test_figures_are_those_computed_by_hand() -> None:
    """Predictions are 0, 1, 1, 0, 2: one of two, one of two, one of one is right."""
    got = probability_metrics(LABELS, PROBABILITIES)
    assert got["accuracy"] == pytest.approx(3 / 5)
    assert got["recall"] == got["balanced_accuracy"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert got["precision"] == got["f1"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    # Agreement by chance: (2 * 2 + 2 * 2 + 1 * 1) / 25.
    assert got["kappa"] == pytest.approx((3 / 5 - 9 / 25) / (1 - 9 / 25))
    assert got["nll"] == pytest.approx(-math.log(0.8 * 0.3 * 0.7 * 0.4 * 0.6) / 5)
    # Class 0 wins 5 of 6 pairs (0.3 against 0.5 is lost), class 1 has 0.7, 0.4 against 0.1, 0.6, 0.3: 5 of 6.
    assert got["auc"] == pytest.approx((5 / 6 + 5 / 6 + 1) / 3)
    # Two volumes lie in the bin of 0.6, of which one is right; three are alone: 0.8, 0.7 right, 0.5 wrong.
    assert got["ece"] == pytest.approx((abs(1 - 1.2) + 0.2 + 0.3 + 0.5) / 5)


def test_ties_count_as_half_and_are_not_broken_by_rounding() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.5, 0.1, 0.4]])
    scores = log_odds(logs_of(probabilities))
    assert np.unique(scores[:, 0]).tolist() == [0.0]
    assert auc_one_vs_rest(np.array([0, 1, 1]), np.full((3, 2), 0.5)) == 0.5


def test_ranking_sees_what_probabilities_round_away() -> None:
    """A softmax of 100 and of 200 nats is 1 in float64, and the second is the surer one."""
    logs = np.array([[0.0, -100.0], [0.0, -200.0], [-300.0, 0.0]])
    labels = np.array([1, 0, 1])
    got = weighted_figures(labels, logs, np.ones((1, 3)))
    assert got["auc"][0, 0] == 1.0
    assert reference.roc_auc_score(labels == 0, np.exp(logs)[:, 0]) < 1.0


def cases(classes: int = 3) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Labels and probabilities with coarse steps, so that ties occur."""
    row = st.tuples(
        st.integers(0, classes - 1), st.lists(st.integers(1, 4), min_size=classes, max_size=classes)
    )

    def arrays(rows: list[tuple[int, list[int]]]) -> tuple[np.ndarray, np.ndarray]:
        weights = np.array([weights for _, weights in rows], dtype=np.float64)
        return np.array([label for label, _ in rows]), weights / weights.sum(axis=1, keepdims=True)

    return st.lists(row, min_size=2, max_size=25).map(arrays)


@settings(max_examples=60)
@given(cases())
def test_figures_are_those_of_scikit_learn(case: tuple[np.ndarray, np.ndarray]) -> None:
    labels, probabilities = case
    got, predictions = probability_metrics(labels, probabilities), probabilities.argmax(axis=1)
    there = np.unique(labels)
    precision, recall, f1, _ = reference.precision_recall_fscore_support(
        labels, predictions, labels=there, average="macro", zero_division=0.0
    )
    assert [got[name] for name in ("precision", "recall", "f1")] == pytest.approx([precision, recall, f1])
    assert got["nll"] == pytest.approx(reference.log_loss(labels, probabilities, labels=range(3)))
    if len(there) > 1:
        areas = [reference.roc_auc_score(labels == k, probabilities[:, k]) for k in there]
        assert got["auc"] == pytest.approx(np.mean(areas))
        kappa = reference.cohen_kappa_score(labels, predictions, labels=range(3))
        assert got["kappa"] == pytest.approx(kappa)
    else:
        assert got["auc"] is None


@settings(max_examples=40)
@given(cases(), st.data())
def test_a_weight_is_a_number_of_repetitions(
    case: tuple[np.ndarray, np.ndarray], data: st.DataObject
) -> None:
    labels, probabilities = case
    counts = data.draw(st.lists(st.integers(0, 3), min_size=len(labels), max_size=len(labels)).filter(any))
    weighted = weighted_figures(labels, logs_of(probabilities), np.array([counts, [1] * len(labels)]))
    repeated = probability_metrics(np.repeat(labels, counts), np.repeat(probabilities, counts, axis=0))
    for name in FIGURES:
        value = mean_over_classes(weighted[name])[0]
        assert (None if np.isnan(value) else value) == (
            None if repeated[name] is None else pytest.approx(repeated[name], abs=1e-12)
        )


def test_parts_are_the_figures_of_the_whole() -> None:
    got = probability_metrics(LABELS, PROBABILITIES)
    assert expected_calibration_error(LABELS, PROBABILITIES) == got["ece"]
    assert negative_log_likelihood(LABELS, PROBABILITIES) == got["nll"]
    assert auc_one_vs_rest(LABELS, PROBABILITIES) == got["auc"]
    # One bin holds all: mean confidence 0.64 and accuracy 0.6.
    assert expected_calibration_error(LABELS, PROBABILITIES, bins=1) == pytest.approx(0.04)


def test_an_impossible_label_costs_much_and_not_infinity() -> None:
    assert 600 < negative_log_likelihood(np.array([0]), np.array([[0.0, 1.0]])) < 1000


def test_one_class_has_no_ranking_and_no_chance_agreement() -> None:
    got = probability_metrics(np.zeros(4, dtype=int), np.ones((4, 1)))
    assert (got["accuracy"], got["auc"], got["kappa"], got["nll"]) == (1.0, None, None, 0.0)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"probabilities must be \(N, K\) beside 5 labels"):
        probability_metrics(LABELS, PROBABILITIES[:4])
    with pytest.raises(ValueError, match="must be finite"):
        probability_metrics(LABELS, np.full((5, 3), np.nan))
