"""The Gaussian read-out as numbers: its densities, its checks, its form as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.decision import posterior
from fastflow.errors import ReadoutError
from fastflow.readout import GaussianReadout, chosen_readout, contrasts, gaps, readout_of


def a_readout(classes: int = 4, seed: int = 0, **changes) -> GaussianReadout:
    random = np.random.default_rng(seed)
    root = random.normal(size=(classes - 1, classes + 3))
    values = {
        "class_names": tuple(f"class {k}" for k in range(classes)),
        "means": random.normal(size=(classes, classes - 1)),
        "covariance": root @ root.T,
        "temperature": 1.5,
        "slices": "center",
        "slice_counts": (3, 5),
        "shrinkage": 0.1,
        "volumes": tuple(range(classes)),
    }
    return GaussianReadout(**(values | changes))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9))
def test_contrasts_are_an_orthonormal_basis_of_the_differences(classes):
    basis = contrasts(classes)
    np.testing.assert_allclose(basis @ basis.T, np.eye(classes - 1), atol=1e-14)
    np.testing.assert_allclose(basis.sum(axis=1), 0.0, atol=1e-14)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.integers(0, 99))
def test_log_odds_are_those_of_gaussian_densities(classes, seed):
    from scipy.stats import multivariate_normal

    readout = a_readout(classes, seed)
    log_probs = np.random.default_rng(seed + 1).normal(size=(5, classes))
    found = readout.discriminants(log_probs)
    want = np.stack(
        [
            np.atleast_1d(multivariate_normal(mean, readout.covariance).logpdf(gaps(log_probs)))
            for mean in readout.means
        ],
        axis=1,
    )
    scale = 1e-9 * np.abs(want).max()
    np.testing.assert_allclose(found - found[:, :1], want - want[:, :1], atol=scale, rtol=1e-8)


def test_a_common_part_of_tens_of_thousands_of_nats_changes_no_log_odds():
    readout, random = a_readout(), np.random.default_rng(1)
    # Multiples of 2^-20 have exact sums with the common part.
    log_probs = np.round(random.normal(size=(6, 4)) * 2**20) / 2**20
    found, moved = readout.discriminants(log_probs), readout.discriminants(log_probs - 3e4)
    np.testing.assert_allclose(
        np.diff(found, axis=1), np.diff(moved, axis=1), atol=1e-9 * np.abs(found).max()
    )


def test_it_agrees_with_linear_discriminant_analysis():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    from fastflow.training.readout_fit import VolumeScores, gaussian_of

    random = np.random.default_rng(3)
    labels = np.repeat(np.arange(3), 20)
    log_probs = random.normal(size=(60, 3)) @ random.normal(size=(3, 3)) + 2 * np.eye(3)[labels]
    volumes = VolumeScores(log_probs, np.ones(60), labels, np.arange(60))
    readout = gaussian_of(volumes, ("a", "b", "c"), 0.0)
    lda = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3)
    lda.fit(gaps(log_probs), labels)
    # scikit-learn divides by 60 where 57 are free.
    discriminants = readout.discriminants(log_probs) * 60 / 57
    np.testing.assert_allclose(posterior(discriminants), lda.predict_proba(gaps(log_probs)), atol=1e-9)


def test_json_round_trip_is_exact():
    readout = a_readout()
    document = json.loads(json.dumps(readout.to_dict()))
    again = GaussianReadout.from_dict(document)
    assert again.to_dict() == readout.to_dict()
    log_probs = np.random.default_rng(2).normal(size=(3, 4))
    assert np.array_equal(again.discriminants(log_probs), readout.discriminants(log_probs))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("a",)}, "class_names must be at least 2"),
        ({"means": np.zeros((4, 4))}, r"means must have shape \(4, 3\), got \(4, 4\)"),
        ({"means": np.full((4, 3), np.nan)}, "means must be finite"),
        ({"covariance": np.eye(4)}, r"covariance must have shape \(3, 3\)"),
        ({"covariance": -np.eye(3)}, "positive definite"),
        ({"covariance": np.eye(3) + np.eye(3, k=1)}, "symmetric"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"slice_counts": (3, 2)}, "slice_counts"),
    ],
)
def test_bad_numbers_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        a_readout(**changes)


def test_other_numbers_of_labels_are_refused():
    with pytest.raises(ValueError, match="4 classes"):
        a_readout().discriminants(np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "update fastflow"),
        ({"kind": "forest"}, "update fastflow"),
        ({"means": [[1.0]]}, "damaged.*fit it again"),
        ({"covariance": None}, "damaged"),
        ({"slice_counts": 3}, "damaged"),
        ({"temperature": "warm"}, "damaged"),
    ],
)
def test_damaged_documents_are_told(change, message):
    with pytest.raises(ReadoutError, match=message):
        GaussianReadout.from_dict(a_readout().to_dict() | change)
    missing = a_readout().to_dict()
    del missing[next(iter(change))]
    with pytest.raises(ReadoutError, match="damaged"):
        GaussianReadout.from_dict(missing)


def test_readout_of_metadata_belongs_to_its_classes():
    readout = a_readout()
    metadata = {"readout": readout.to_dict()}
    found = readout_of(metadata, readout.class_names)
    assert found is not None and found.to_dict() == readout.to_dict()
    assert readout_of({}, readout.class_names) is None
    with pytest.raises(ReadoutError, match=r"belongs to the classes class 0.*fit it again"):
        readout_of(metadata, ["x", "y", "z", "w"])


def test_the_readout_of_a_run_is_there_and_of_its_slices():
    readout = a_readout()
    metadata, names = {"readout": readout.to_dict()}, readout.class_names
    assert chosen_readout("argmax", {"readout": "damaged"}, names, "center") is None
    for slices in ("center", None):
        found = chosen_readout("gaussian", metadata, names, slices)
        assert found is not None and found.to_dict() == readout.to_dict()
    with pytest.raises(ReadoutError, match="fitted to slices 'center', not to '3,4'"):
        chosen_readout("gaussian", metadata, names, "3,4")
    with pytest.raises(ReadoutError, match=r"no read-out \(too few\); fit one with `fastflow calibrate"):
        chosen_readout("gaussian", {"calibration": {"no_readout": "too few"}}, names, "center")
    with pytest.raises(ValueError, match="readout must be one of argmax, gaussian, got 'svm'"):
        chosen_readout("svm", metadata, names, "center")


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(0, 99))
def test_no_error_of_a_nat_changes_log_odds_by_more_than_the_gain(classes, seed):
    readout, random = a_readout(classes, seed), np.random.default_rng(seed)
    log_probs = random.normal(size=classes)
    worst = 0.0
    for signs in np.indices((2,) * classes).reshape(classes, -1).T:
        moved = readout.discriminants(log_probs + signs) - readout.discriminants(log_probs)
        worst = max(worst, float(np.ptp(moved)) / readout.temperature)
    assert worst == pytest.approx(readout.gain)
