from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.evaluation import bootstrap
from fastflow.evaluation.bootstrap import Resamples, estimate, interval


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=20))
def test_subjects_are_drawn_whole_and_classes_keep_their_number(volumes: list[tuple[int, int]]) -> None:
    subjects = [f"sub-{subject}" for subject, _ in volumes]
    labels = np.array([label for _, label in volumes])
    draws = Resamples.of(subjects, labels, 30)
    weights = np.concatenate(list(draws))
    assert weights.shape == (30, len(volumes))
    first_of = {subject: subjects.index(subject) for subject in subjects}
    for i, subject in enumerate(subjects):
        np.testing.assert_array_equal(weights[:, i], weights[:, first_of[subject]])
    stratum = {s: min(label for t, label in zip(subjects, labels, strict=True) if t == s) for s in subjects}
    for k in set(stratum.values()):
        members = [first_of[s] for s in first_of if stratum[s] == k]
        assert (weights[:, members].sum(axis=1) == len(members)).all()


def test_equal_seeds_draw_alike_in_any_order_and_in_any_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    subjects, labels = [f"s{i % 7}" for i in range(12)], np.arange(12) % 7 % 2
    whole = np.concatenate(list(Resamples.of(subjects, labels, 20, seed=3)))
    again = Resamples.of(subjects[::-1], labels[::-1], 20, seed=3)
    np.testing.assert_array_equal(np.concatenate(list(again))[:, ::-1], whole)
    np.testing.assert_array_equal(np.concatenate(list(again)), np.concatenate(list(again)))
    assert not np.array_equal(np.concatenate(list(Resamples.of(subjects, labels, 20, seed=4))), whole)
    monkeypatch.setattr(bootstrap, "MAX_WEIGHTS", 5 * 12)
    assert [len(part) for part in again] == [5, 5, 5, 5]


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    """Of 200 samples of 60 subjects with two volumes each, the true mean lies in about 190 intervals."""
    rng = np.random.default_rng(0)
    covered = 0
    subjects, labels = [str(i // 2) for i in range(120)], np.zeros(120, dtype=np.int64)
    for seed in range(200):
        # Both volumes of a subject are equal: drawn apart, they would make intervals too narrow.
        values = np.repeat(rng.normal(size=60), 2)
        drawn = Resamples.of(subjects, labels, 200, seed).apply(lambda w, v=values: {"mean": w @ v / 120})
        low, high = interval(drawn["mean"]) or (0.0, 0.0)
        covered += low <= 0.0 <= high
    assert 180 <= covered <= 198


def test_percentiles_leave_out_what_is_not_defined() -> None:
    values = np.linspace(0.0, 1.0, 101)
    assert interval(values) == pytest.approx((0.025, 0.975))
    assert interval(np.append(values, np.full(50, np.nan))) == pytest.approx((0.025, 0.975))
    assert interval(np.append(values, np.full(150, np.nan))) is None
    assert interval(np.full(3, np.nan)) is None
    assert estimate(float("nan"), values) == {"value": None, "low": None, "high": None}
    assert estimate(0.5, values)["value"] == 0.5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        Resamples.of(["a"], np.array([0]), 0)
    with pytest.raises(ValueError, match="at least one volume"):
        Resamples.of([], np.array([], dtype=np.int64))
