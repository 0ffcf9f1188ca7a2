from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.evaluation.decisions import (
    MAX_POINTS,
    DecidedVolumes,
    ScoredVolumes,
    evaluate_decisions,
    figures_of_part,
    roc_curves,
)
from fastflow.evaluation.metrics import logs_of

NAMES = ("a", "b", "c")


def decided(name: str, predictions: list[int], values: dict[str, np.ndarray] | None = None) -> DecidedVolumes:
    return DecidedVolumes(name, logs_of(np.eye(3)[predictions] * 0.7 + 0.1), values or {})


def volumes(labels: list[int], subjects: list[str] | None = None) -> ScoredVolumes:
    return ScoredVolumes(np.array(labels), subjects or [f"s{i}" for i in range(len(labels))], NAMES)


def test_rows_stand_beside_each_other_and_differences_are_paired() -> None:
    labels = [0, 0, 0, 0, 1, 1, 1, 1]
    first = decided("argmax", [0, 0, 0, 1, 1, 1, 1, 0], {"bits_per_dim": np.arange(8.0)})
    same, better = decided("same", [0, 0, 0, 1, 1, 1, 1, 0]), decided("better", labels)
    got = evaluate_decisions(volumes(labels), [first, same, better], 200)
    json.dumps(got, allow_nan=False)
    assert list(got["decisions"]) == ["argmax", "same", "better"]
    accuracy = got["decisions"]["argmax"]["figures"]["accuracy"]
    assert accuracy["value"] == 0.75 and accuracy["low"] < 0.75 < accuracy["high"] <= 1.0
    assert got["decisions"]["argmax"]["figures"]["bits_per_dim"]["value"] == 3.5
    assert "bits_per_dim" not in got["decisions"]["better"]["figures"]
    # Each interval alone is wide; on the same resamples, equal decisions do not differ at all.
    assert got["differences"]["same"]["accuracy"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    better_by = got["differences"]["better"]["accuracy"]
    assert better_by["value"] == 0.25 and better_by["low"] >= 0.0
    assert got["decisions"]["argmax"]["confusion"] == [[3, 1, 0], [1, 3, 0], [0, 0, 0]]
    assert got["decisions"]["argmax"]["classes"]["c"]["recall"] == {"value": None, "low": None, "high": None}
    assert got["absent"] == ["c"]


def test_volumes_of_one_subject_make_intervals_wider() -> None:
    labels, predictions = [0] * 24, [0, 0, 0, 1, 1, 1] * 4
    apart = evaluate_decisions(volumes(labels), [decided("argmax", predictions)], 300)
    subjects = [f"s{i // 3}" for i in range(24)]
    together = evaluate_decisions(volumes(labels, subjects), [decided("argmax", predictions)], 300)
    widths = [
        one["decisions"]["argmax"]["figures"]["accuracy"]["high"]
        - one["decisions"]["argmax"]["figures"]["accuracy"]["low"]
        for one in (apart, together)
    ]
    assert widths[1] > 1.3 * widths[0]
    assert (together["volumes"], together["subjects"]) == (24, 8)


def test_a_class_of_one_subject_is_named() -> None:
    got = evaluate_decisions(
        volumes([0, 0, 1, 1], ["x", "y", "z", "z"]), [decided("argmax", [0, 0, 1, 1])], 10
    )
    assert got["one_subject"] == ["b"]
    assert got["classes"]["b"] == {"volumes": 2, "subjects": 1}


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(1, 5)), min_size=2, max_size=30))
def test_the_area_under_a_curve_is_the_auc(rows: list[tuple[int, int]]) -> None:
    labels = np.array([label for label, _ in rows])
    probabilities = np.array([[weight / 6, 1 - weight / 6] for _, weight in rows])
    scored = ScoredVolumes(labels, [str(i) for i in range(len(rows))], ("a", "b"))
    roc = roc_curves(scored, logs_of(probabilities))
    if len(np.unique(labels)) < 2:
        assert roc == {"classes": {}, "macro": None}
        return
    decision = DecidedVolumes("argmax", logs_of(probabilities))
    areas = evaluate_decisions(scored, [decision], 2)["decisions"]["argmax"]["classes"]
    for name, curve in roc["classes"].items():
        assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(
            areas[name]["auc"]["value"], abs=1e-4
        )


def test_curves_of_many_volumes_stay_short() -> None:
    rng = np.random.default_rng(0)
    scored = ScoredVolumes(rng.integers(0, 3, 3000), ["x"] * 3000, NAMES)
    roc = roc_curves(scored, logs_of(rng.dirichlet(np.ones(3), 3000)))
    assert all(len(curve["fpr"]) <= MAX_POINTS for curve in roc["classes"].values())
    assert roc["macro"]["fpr"][0] == roc["macro"]["tpr"][0] == 0.0


def test_a_part_counts_alone() -> None:
    labels = [0, 0, 1, 1]
    decision = decided("argmax", [0, 1, 1, 1])
    part = figures_of_part(volumes(labels), decision, np.array([True, True, False, False]), 20)
    assert (part["volumes"], part["accuracy"]["value"]) == (2, 0.5)
    empty = figures_of_part(volumes(labels), decision, np.zeros(4, dtype=bool), 20)
    assert empty["accuracy"] == {"value": None, "low": None, "high": None}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="same N > 0 volumes, got 2 and 1"):
        volumes([0, 1], ["x"])
    with pytest.raises(ValueError, match="'argmax' must be"):
        DecidedVolumes("argmax", np.array([[np.nan, 0.0]]))
    with pytest.raises(ValueError, match="bits of 'x' must have a value for each volume"):
        DecidedVolumes("x", np.zeros((2, 3)), {"bits": np.zeros(3)})
    with pytest.raises(ValueError, match="about the 2 volumes"):
        evaluate_decisions(volumes([0, 1]), [decided("argmax", [0])])
