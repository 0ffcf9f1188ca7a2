from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from fastflow.data.slices import SliceSet
from fastflow.evaluation.classification import (
    BINS,
    HistogramBaseline,
    classification_metrics,
    volume_histograms,
)


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


def make_set(levels: list[int], per_volume: int = 2, seed: int = 0) -> SliceSet:
    """Volume v has noise around levels[v]; its label is 0 below 128."""
    rng = np.random.default_rng(seed)
    volumes = np.repeat(np.arange(len(levels)), per_volume)
    images = (
        rng.normal(np.array(levels)[volumes][:, None, None, None], 6.0, (len(volumes), 1, 8, 8))
        .clip(0, 255)
        .astype(np.uint8)
    )
    labels = (np.array(levels)[volumes] >= 128).astype(np.int64)
    names = tuple(str(v) for v in range(len(levels)))
    return SliceSet(images, labels, volumes, names, names, ("dark", "bright"))


def test_baseline_tells_brightness_but_no_structure() -> None:
    train, test = make_set([60, 70, 80, 180, 190, 200] * 3), make_set([65, 75, 185, 195], seed=1)
    baseline = HistogramBaseline().fit(train)
    assert baseline.predict(test).tolist() == [0, 0, 1, 1]
    rng = np.random.default_rng(2)
    shuffled = rng.permuted(test.images.reshape(len(test), -1), axis=1).reshape(test.images.shape)
    scrambled = SliceSet(shuffled, test.labels, test.volumes, test.paths, test.subjects, test.class_names)
    assert baseline.predict(scrambled).tolist() == baseline.predict(test).tolist()


def test_histograms_share_out_every_pixel() -> None:
    data = make_set([10, 240], per_volume=3)
    histograms = volume_histograms(data)
    assert histograms.shape == (2, BINS)
    np.testing.assert_allclose(histograms.sum(axis=1), 1.0)
    np.testing.assert_allclose(
        histograms[1], np.histogram(data.images[3:], bins=BINS, range=(0, 256))[0] / (3 * 64)
    )


def test_baseline_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        HistogramBaseline().fit(make_set([10, 20]))
