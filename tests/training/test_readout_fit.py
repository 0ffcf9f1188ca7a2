"""The fit of the Gaussian read-out: no volume judges itself, and what argmax loses is found again."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.decision import posterior
from fastflow.errors import ReadoutError
from fastflow.training.readout_fit import (
    FOLDS,
    LEAST_TEMPERATURE,
    VolumeScores,
    cross_fitted,
    fit_readout,
    folds_of_groups,
    gaussian_of,
)

NAMES = ("a", "b", "c", "d")


def scores(seed: int, each: int = 30, prefix: str = "s", anatomy: float = 40.0) -> VolumeScores:
    """Volumes whose gaps share a direction of large variance, in which the classes do not differ."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), each)
    counts = random.integers(4, 6, len(labels))
    own = 5.0 * np.eye(4)[labels]
    moved = anatomy * random.normal(size=(len(labels), 1)) * np.array([1.0, -1.0, 1.0, -1.0])
    noise = random.normal(scale=1.0, size=(len(labels), 4))
    # The common part is that of a likelihood of an image.
    each_slice = -3e4 + 500.0 * random.normal(size=(len(labels), 1)) + own + moved + noise
    groups = np.array([f"{prefix}{i}" for i in range(len(labels))])
    return VolumeScores(each_slice * counts[:, None], counts, labels, groups)


def test_readout_discounts_the_direction_in_which_all_volumes_vary():
    held, training, test = scores(0), scores(1, prefix="t"), scores(2, 200)
    fit = fit_readout(held, training, NAMES, "center")
    argmax = (test.log_probs.argmax(axis=1) == test.labels).mean()
    found = posterior(fit.readout.discriminants(test.means), fit.readout.temperature).argmax(axis=1)
    assert argmax < 0.7
    assert (found == test.labels).mean() > 0.85
    assert fit.readout.slices == "center" and fit.readout.slice_counts == (4, 5)
    assert fit.readout.volumes == (60, 60, 60, 60)


def test_temperature_and_figures_are_those_of_held_out_volumes():
    held, training = scores(3), scores(4, prefix="t")
    fit = fit_readout(held, training, NAMES)
    assert fit.probabilities.shape == (len(held), 4)
    np.testing.assert_allclose(fit.probabilities.sum(axis=1), 1.0)
    assert fit.readout.temperature >= LEAST_TEMPERATURE
    assert fit.folds == FOLDS


def test_no_volume_judges_itself():
    # A volume's label is wrong: were it in its own fit, the judgement of it would change with it.
    held = scores(5, 10)
    labels = held.labels.copy()
    labels[0] = 2
    fold = folds_of_groups(held, np.ones(len(held), bool))
    others = fold != fold[0]
    before = gaussian_of(_chosen(held, others), NAMES, 0.1)
    changed = gaussian_of(_chosen(dataclasses.replace(held, labels=labels), others), NAMES, 0.1)
    assert np.array_equal(before.means, changed.means)
    judged = fit_readout(held, None, NAMES).readout
    assert not np.array_equal(judged.means, before.means)


def test_temperature_of_a_fold_comes_from_the_other_folds():
    random = np.random.default_rng(6)
    logits, labels = random.normal(size=(40, 3)) * 5, random.integers(0, 3, 40)
    fold = np.arange(40) % 4
    before = cross_fitted(logits, labels, fold, 0.01)
    changed = labels.copy()
    changed[fold == 1] = (labels[fold == 1] + 1) % 3
    after = cross_fitted(logits, changed, fold, 0.01)
    assert np.array_equal(before[fold == 1], after[fold == 1])
    assert not np.array_equal(before[fold == 0], after[fold == 0])
    assert np.isfinite(cross_fitted(logits, labels, np.zeros(40), 0.01)).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.lists(st.integers(0, 2), min_size=6, max_size=40), st.integers(1, 12))
def test_a_group_is_in_one_fold_and_groups_of_a_class_are_spread(seed, labels, subjects):
    labels = np.array([0, 0, 1, 1, 2, 2, *labels])
    groups = np.array([f"{label}-{i % subjects}" for i, label in enumerate(labels)])
    volumes = VolumeScores(np.zeros((len(labels), 3)), np.ones(len(labels)), labels, groups)
    fold = folds_of_groups(volumes, np.arange(len(labels)) % 2 == 0, seed)
    for name in np.unique(groups):
        assert len(np.unique(fold[groups == name])) == 1
    for label in range(3):
        names = np.unique(groups[labels == label])
        assert len(np.unique(fold[labels == label])) >= min(2, len(names))


def test_same_input_same_bits_and_order_of_seeds():
    held, training = scores(7), scores(8, prefix="t")
    first, second = (fit_readout(held, training, NAMES, seed=1) for _ in range(2))
    assert first.readout.to_dict() == second.readout.to_dict()
    assert np.array_equal(first.probabilities, second.probabilities)


def test_too_little_is_told():
    held = scores(9, 4)
    one = VolumeScores(np.zeros((3, 1)), np.ones(3), np.zeros(3, int), np.arange(3))
    still = VolumeScores(np.zeros((8, 4)), np.ones(8), np.arange(8) % 4, np.arange(8))
    with pytest.raises(ReadoutError, match="at least two classes"):
        fit_readout(one, None, ("a",))
    with pytest.raises(ReadoutError, match="class 'b' has volumes of 1 subjects, at least 2"):
        fit_readout(_chosen(held, np.array([0, 1, 2, 3, 4, 8, 9, 10, 12, 13])), None, NAMES)
    with pytest.raises(ReadoutError, match="class 'c' has volumes of 0 subjects"):
        fit_readout(_chosen(held, held.labels < 2), None, NAMES)
    with pytest.raises(ReadoutError, match="no held-out volume"):
        fit_readout(_chosen(held, np.array([], dtype=int)), held, NAMES)
    with pytest.raises(ReadoutError, match="hardly differ"):
        fit_readout(still, None, NAMES)


@pytest.mark.parametrize("each", [2, 3])
def test_few_volumes_are_enough_for_some_readout(each):
    fit = fit_readout(scores(10, each), None, NAMES)
    assert np.isfinite(fit.probabilities).all()


def test_scores_are_checked():
    with pytest.raises(ValueError, match="must fit"):
        VolumeScores(np.zeros((2, 3)), np.ones(3), np.zeros(2, int), np.arange(2))
    with pytest.raises(ValueError, match="0 to 2"):
        VolumeScores(np.zeros((2, 3)), np.ones(2), np.array([0, 3]), np.arange(2))
    with pytest.raises(ValueError, match="finite"):
        VolumeScores(np.full((2, 3), np.nan), np.ones(2), np.zeros(2, int), np.arange(2))
    with pytest.raises(ValueError, match="at least 1"):
        VolumeScores(np.zeros((2, 3)), np.zeros(2), np.zeros(2, int), np.arange(2))


def _chosen(volumes: VolumeScores, which: np.ndarray) -> VolumeScores:
    return VolumeScores(*(getattr(volumes, field.name)[which] for field in dataclasses.fields(volumes)))
