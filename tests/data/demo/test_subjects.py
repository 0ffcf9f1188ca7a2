"""Subjects of the demo archive: deformed without folds, mixed, never of the unseen head."""

import numpy as np
import pytest

from fastflow.data import anatomy, demo
from fastflow.data.demo import subjects


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_subjects_are_diffeomorphic_and_never_of_the_unseen_head(seed):
    subject = demo.draw_subject(np.random.default_rng(seed), demo.TRAINING_HEADS)
    assert demo.UNSEEN_HEAD not in subject.heads and abs(sum(subject.weights) - 1) < 1e-6
    for displacement in subject.displacements:
        assert displacement.shape == (3, *anatomy.GRID)
        assert anatomy.jacobian_determinant(displacement).min() > 0
        # Millimetres: heads stay where a registered head is.
        assert 2 * np.abs(displacement).mean() > 0.2 and 2 * np.abs(displacement).max() < 25


def test_subjects_mix_two_heads_about_as_often_as_stated(monkeypatch):
    # Only the heads are looked at: deformations take most of the time.
    monkeypatch.setattr(anatomy, "exponentiate", lambda velocity: velocity)
    monkeypatch.setattr(anatomy, "warp", lambda image, displacement: image)
    monkeypatch.setattr(subjects, "_to_fine", lambda displacement: displacement)
    drawn = [demo.draw_subject(np.random.default_rng(seed), demo.TRAINING_HEADS) for seed in range(12)]
    assert 3 <= sum(len(subject.heads) == 2 for subject in drawn) <= 12
    assert {head for subject in drawn for head in subject.heads} == set(demo.TRAINING_HEADS)
