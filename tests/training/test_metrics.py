"""Figures of held-out slices."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastflow.training.metrics import evaluate_labels


class Scores:
    """A model whose log-likelihoods are the first pixels of an image, as 8-bit grey levels."""

    device = torch.device("cpu")
    config = SimpleNamespace(num_classes=3)

    def __init__(self, scale):
        self.scale = scale

    def log_prob_all(self, x):
        return ((x.flatten(1)[:, :3] + 1) * 127.5).round() * self.scale


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_figures_of_labels_balance_classes_and_forgive_the_scale(scale):
    scores = np.array([[9, 0, 0], [9, 0, 0], [5, 4, 0], [0, 9, 0]], np.uint8)
    images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 0, 1, 1])
    images[:, 0] = np.pad(scores, ((0, 0), (0, 1))).reshape(4, 2, 2)
    found = evaluate_labels(Scores(scale), images, labels)
    assert found["accuracy"] == 0.75 and found["balanced_accuracy"] == 0.75
    once = evaluate_labels(Scores(1.0), images, labels)
    assert found["nll"] == pytest.approx(once["nll"], rel=1e-4) and 0.1 < found["nll"] < np.log(3)
    few = evaluate_labels(Scores(scale), images[1:], labels[1:])
    assert few["accuracy"] == pytest.approx(2 / 3) and few["balanced_accuracy"] == 0.75


def test_likelihoods_that_are_not_finite_have_no_nll():
    images = np.zeros((2, 1, 2, 2), np.uint8)
    found = evaluate_labels(Scores(float("nan")), images, np.array([0, 1]))
    assert math.isnan(found["nll"])
