"""Means over samples and ranks."""

import math

import numpy as np
import pytest
import torch

from fastflow.training.metrics import SampleMean, evaluate_labels


class Ranks:
    """The part of Fabric that a mean needs, with one other rank, of sum and count `other`."""

    device = torch.device("cpu")

    def __init__(self, other=None):
        self.world_size, self.other = (1 if other is None else 2), other

    def all_reduce(self, data, reduce_op):
        assert reduce_op == "sum" and data.dtype == torch.float64
        return data + torch.tensor(self.other, dtype=torch.float64)


def test_a_mean_weighs_samples_and_not_batches():
    mean = SampleMean(Ranks())
    mean.update(torch.tensor([1.0, 2.0, 3.0]))
    mean.update(torch.tensor([10.0]))
    assert mean.compute() == 4.0


def test_ranks_with_unequal_numbers_of_samples():
    mean = SampleMean(Ranks(other=(9.0, 1)))
    mean.update(torch.tensor([True, False, True]))
    assert mean.compute() == (2 + 9) / 4


def test_small_numbers_do_not_drown():
    mean = SampleMean(Ranks())
    mean.update(torch.tensor([2.0**25]))
    for _ in range(4):
        mean.update(torch.tensor([1.0]))
    assert mean.compute() == (2.0**25 + 4) / 5


@pytest.mark.parametrize("other", [None, (0.0, 0)])
def test_no_sample_has_no_mean(other):
    assert math.isnan(SampleMean(Ranks(other)).compute())


class Scores:
    """A model whose log-likelihoods are the first pixels of an image, as 8-bit grey levels."""

    def __init__(self, scale):
        self.scale = scale

    def log_prob_all(self, x):
        return ((x.flatten(1)[:, :3] + 1) * 127.5).round() * self.scale


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_figures_of_labels_balance_classes_and_forgive_the_scale(scale):
    scores = np.array([[9, 0, 0], [9, 0, 0], [5, 4, 0], [0, 9, 0]], np.uint8)
    images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.array([0, 0, 1, 1])
    images[:, 0] = np.pad(scores, ((0, 0), (0, 1))).reshape(4, 2, 2)
    found = evaluate_labels(Scores(scale), images, labels, Ranks())
    assert found["accuracy"] == 0.75 and found["balanced_accuracy"] == 0.75
    once = evaluate_labels(Scores(1.0), images, labels, Ranks())
    assert found["nll"] == pytest.approx(once["nll"], rel=1e-4) and 0.1 < found["nll"] < np.log(3)
    few = evaluate_labels(Scores(scale), images[1:], labels[1:], Ranks())
    assert few["accuracy"] == pytest.approx(2 / 3) and few["balanced_accuracy"] == 0.75


def test_likelihoods_that_are_not_finite_have_no_nll():
    images = np.zeros((2, 1, 2, 2), np.uint8)
    found = evaluate_labels(Scores(float("nan")), images, np.array([0, 1]), Ranks())
    assert math.isnan(found["nll"])
