"""Means over samples and ranks."""

import math

import pytest
import torch

from fastflow.training.metrics import SampleMean


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
