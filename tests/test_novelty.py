"""Known scanners: the fit, its p-values and its document."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from fastflow.novelty import (
    KEY,
    HeldOutVolumes,
    KnownScanners,
    check_reject_below,
    known_scanners,
    scanner_flags,
    volume_features,
)

CLASSES, FEATURES = 3, 10
MEANS = np.random.default_rng(1).normal(0.0, 5.0, (CLASSES, FEATURES))


def volumes(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (V, K, F) and labels; under another label than its own, a volume is far away."""
    labels = np.arange(count) % CLASSES
    features = rng.normal(50.0, 1.0, (count, CLASSES, FEATURES))
    features[np.arange(count), labels] = MEANS[labels] + rng.normal(0.0, 1.0, (count, FEATURES))
    return features, labels


def held_out(rng: np.random.Generator, count: int) -> HeldOutVolumes:
    features, labels = volumes(rng, count)
    return HeldOutVolumes(features, labels, labels, [f"sub-{i}" for i in range(count)])


def fitted(validation: int = 60, training: int = 120, slices: str = "center") -> KnownScanners:
    rng = np.random.default_rng(0)
    features, labels = volumes(rng, training)
    own = features[np.arange(training), labels]
    known = KnownScanners.fit(own, labels, held_out(rng, validation), slices)
    assert known is not None
    return known


def test_features_are_means_over_the_slices() -> None:
    rng = np.random.default_rng(0)
    correlations, grain = rng.normal(size=(4, 3, 2, 2)), rng.normal(size=(4, 6))
    found = volume_features(correlations, grain)
    assert found.shape == (3, 10)
    wanted = np.concatenate([correlations[:, 1].mean(axis=0).reshape(-1), grain.mean(axis=0)])
    np.testing.assert_allclose(found[1], wanted)
    np.testing.assert_array_equal(volume_features(correlations[:, 1], grain), found[1])


def test_p_values_of_known_scanners_are_even_and_those_of_another_are_small() -> None:
    known = fitted(200, 300)
    features, labels = volumes(np.random.default_rng(7), 600)
    p = np.array([known.p_value(known.score(f[k], int(k))) for f, k in zip(features, labels, strict=True)])
    for limit in (0.05, 0.2, 0.5):
        assert np.mean(p < limit) == pytest.approx(limit, abs=0.08)
    moved = [known.p_value(known.score(f[k] + 3.0, int(k))) for f, k in zip(features, labels, strict=True)]
    assert max(moved) < 0.05


def test_a_validation_subject_is_scored_without_itself() -> None:
    """One subject that lies far off widens the covariance of the others' fits, and not of its own."""
    rng = np.random.default_rng(0)
    features, labels = volumes(rng, 30)
    mine = held_out(rng, 12)
    mine.features[3, mine.labels[3]] += 100.0
    known = KnownScanners.fit(features[np.arange(30), labels], labels, mine, None)
    assert known is not None
    whole = known.score(mine.features[3, mine.labels[3]], int(mine.labels[3]))
    assert known.validation[-1] > 5.0 * whole
    # The volumes of a subject stay together: two that lie off alike do not vouch for each other.
    mine.features[4, mine.labels[4]] += 100.0
    apart = KnownScanners.fit(features[np.arange(30), labels], labels, mine, None)
    mine.subjects[4] = mine.subjects[3]  # type: ignore[index]
    together = KnownScanners.fit(features[np.arange(30), labels], labels, mine, None)
    assert apart is not None and together is not None
    assert together.validation[-1] > 2.0 * apart.validation[-1]


def test_p_values_count_validation_volumes() -> None:
    known = KnownScanners("center", np.zeros((1, 2)), np.eye(2), (1.0, 2.0, 2.0, 3.0))
    assert known.score(np.array([3.0, 4.0]), 0) == 5.0
    assert [known.p_value(score) for score in (0.5, 2.0, 2.5, 9.0)] == [1.0, 0.8, 0.4, 0.2]
    assert known.least_p == 0.2


def test_constant_features_and_classes_of_one_volume_do_no_harm() -> None:
    rng = np.random.default_rng(0)
    features, labels = volumes(rng, 31)
    labels[:] = np.minimum(np.arange(31), 1)
    labels[-1] = 2
    features[..., 0] = 0.0
    mine = held_out(rng, 12)
    mine.features[..., 0] = 0.0
    known = KnownScanners.fit(features[:, 0], labels, mine, None)
    assert known is not None and np.isfinite(known.validation).all()
    moved = np.zeros(FEATURES)
    moved[0] = 1.0
    assert known.score(known.means[0] + moved, 0) == pytest.approx(0.0)


def test_too_few_volumes_give_no_fit() -> None:
    rng = np.random.default_rng(0)
    features, labels = volumes(rng, 30)
    own = features[np.arange(30), labels]
    assert KnownScanners.fit(own, labels, held_out(rng, 7), None) is None
    few = held_out(rng, 9)
    few.labels[few.labels == 2] = 0
    assert KnownScanners.fit(own[labels < 2], labels[labels < 2], few, None) is None


def test_volumes_are_judged_under_their_likeliest_label() -> None:
    known = KnownScanners("center", np.array([[0.0] * 8, [9.0] * 8]), np.eye(8), tuple(range(1, 21)))
    correlations, grain = np.full((2, 2, 1, 2), 9.0), np.full((2, 6), 9.0)
    log_probs = np.array([[-5.0, -4.0], [-5.0, -5.5]])
    assert known.p_of_volume(log_probs, correlations, grain) == 1.0
    assert known.p_of_volume(log_probs[:, ::-1], correlations, grain) == pytest.approx(1 / 21)
    assert known.p_of_volume(log_probs, None, grain) is None
    assert known.p_of_volume(log_probs, correlations, None) is None
    assert known.p_of_volume(log_probs, correlations * np.nan, grain) is None
    with pytest.raises(ValueError, match="10 features"):
        known.p_of_volume(log_probs, np.zeros((2, 2, 2, 2)), grain)


def test_documents_hold_the_fit() -> None:
    known = fitted()
    again = known_scanners({KEY: json.loads(json.dumps(known.to_dict()))})
    assert again is not None and again.slices == "center"
    np.testing.assert_allclose(again.means, known.means, rtol=1e-6)
    np.testing.assert_allclose(again.validation, known.validation, rtol=1e-6)
    assert again.to_dict() == known.to_dict()
    assert known_scanners({}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "format 2"),
        ({"grain": ["variance"]}, "grain"),
        ({"means": [[1.0]]}, "damaged"),
        ({"means": "no"}, "damaged"),
        ({"validation": []}, "damaged"),
        ({"validation": [float("nan")]}, "not finite"),
        ({"slices": KeyError}, "damaged"),
    ],
)
def test_documents_that_are_damaged(changes: dict[str, Any], message: str) -> None:
    document = fitted().to_dict() | changes
    kept = {key: value for key, value in document.items() if value is not KeyError}
    with pytest.raises(ValueError, match=message):
        KnownScanners.from_dict(kept)


def test_limits_that_could_flag_nothing_are_refused() -> None:
    known = fitted(60)
    check_reject_below(None, None, "center")
    check_reject_below(0.05, known, "center")
    for limit, model, slices, message in (
        (0.0, known, "center", r"\(0, 1\]"),
        (float("nan"), known, "center", r"\(0, 1\]"),
        (0.05, None, "center", "knows its scanners"),
        (0.05, known, "center+-2", "slices of training"),
        (0.01, known, "center", "least p-value of 60"),
    ):
        with pytest.raises(ValueError, match=message):
            check_reject_below(limit, model, slices)


def test_flags() -> None:
    assert scanner_flags(0.01, 0.05) == (
        ("unknown_scanner", "unlike the scanners of training, p-value 0.01"),
    )
    for p_value, limit in ((0.05, 0.05), (None, 0.05), (0.01, None)):
        assert scanner_flags(p_value, limit) == ()
