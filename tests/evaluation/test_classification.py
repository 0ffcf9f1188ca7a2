from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from fastflow.evaluation.classification import classification_metrics


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_metrics_are_those_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    labels, predictions = np.array(pairs).T
    got = classification_metrics(labels, predictions, 4)
    assert got["accuracy"] == pytest.approx(reference.accuracy_score(labels, predictions))
    assert got["confusion"] == reference.confusion_matrix(labels, predictions, labels=range(4)).tolist()
    recall = reference.recall_score(labels, predictions, labels=range(4), average=None, zero_division=np.nan)
    assert list(got["per_class_recall"].values()) == [
        None if np.isnan(r) else pytest.approx(r) for r in recall
    ]
    assert got["balanced_accuracy"] == pytest.approx(np.nanmean(recall))
    json.dumps(got)


def test_majority_vote_does_not_pass_for_balanced() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    got = classification_metrics(labels, np.zeros(100, dtype=int), 2, ["many", "few"])
    assert got["accuracy"] == 0.9
    assert got["balanced_accuracy"] == 0.5
    assert got["per_class_recall"] == {"many": 1.0, "few": 0.0}


@pytest.mark.parametrize(
    ("labels", "predictions", "names", "message"),
    [
        ([], [], None, "N > 0"),
        ([0, 1], [0], None, r"\(2,\) and \(1,\)"),
        ([0, 3], [0, 1], None, "labels must lie in 0 to 2"),
        ([0, 1], [0, -1], None, "predictions must lie"),
        ([0], [0], ["a", "b"], "class_names must be 3"),
    ],
)
def test_bad_arguments_are_named(
    labels: list[int], predictions: list[int], names: list[str] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classification_metrics(np.array(labels, dtype=int), np.array(predictions, dtype=int), 3, names)
