"""Objectives and units."""

import math

import pytest
import torch

from fastflow import FlowConfig, MagicFlow
from fastflow.training import objective


def gaussian_flow(x, y):
    """A flow that scales by exp(-y): its density is normal with standard deviation exp(y)."""
    scale = (-y.to(x.dtype)).exp()
    return x.flatten(1) * scale[:, None], -y.to(x.dtype) * x[0].numel()


def test_bits_per_dim_of_a_uniform_grey_level():
    """A density that gives each of the 256 grey levels the same mass costs 8 bits."""
    dims = 10
    log_prob = torch.tensor([dims * math.log(1 / 256 / objective.GREY_LEVEL)])
    assert objective.bits_per_dim(log_prob, dims).item() == pytest.approx(8.0)


def test_dequantise_stays_within_a_grey_level():
    x = torch.zeros(2, 1, 50, 50)
    noisy = objective.dequantize(x, torch.Generator().manual_seed(0))
    assert noisy.abs().max() <= objective.GREY_LEVEL / 2
    assert abs(float(noisy.mean())) < 1e-4 and float(noisy.std()) == pytest.approx(
        objective.GREY_LEVEL / 12**0.5, rel=0.05
    )


def test_losses_add_what_they_say():
    x, y = torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    every = torch.stack(
        [objective.log_prob(gaussian_flow, x, torch.full_like(y, k)) for k in range(3)], dim=1
    )
    right = every[torch.arange(6), y]
    plain, lp = objective.likelihood_loss(gaussian_flow, x, y)
    assert torch.allclose(lp, right) and torch.allclose(plain, objective.bits_per_dim(right, 4).mean())

    wrong = (y + 1) % 3
    pair, lp, logistic = objective.pairwise_loss(gaussian_flow, x, y, wrong, weight=0.5, temperature=2.0)
    margin = (right - every[torch.arange(6), wrong]) / 2.0
    assert torch.allclose(lp, right)
    assert torch.allclose(logistic, torch.log1p(torch.exp(-margin)))
    assert torch.allclose(pair, plain + 0.5 * logistic.mean())

    hybrid, lp = objective.hybrid_loss(gaussian_flow, x, y, 3, weight=0.5, temperature=2.0)
    assert torch.allclose(lp, right)
    assert torch.allclose(
        hybrid, plain - 0.5 * torch.log_softmax(every / 2.0, dim=1)[torch.arange(6), y].mean()
    )


def test_some_rivals_bound_the_cross_entropy_over_all_labels():
    """All K - 1 rivals in any order make the cross-entropy, fewer of them less, one the logistic loss."""
    x, y = torch.randn(6, 1, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 2])
    others = torch.stack([(y + k) % 4 for k in (3, 1, 2)], dim=1)
    full, lp = objective.hybrid_loss(gaussian_flow, x, y, 4, weight=0.5, temperature=2.0)
    found, again, logistic = objective.rivals_loss(gaussian_flow, x, y, others, 0.5, 2.0)
    assert torch.allclose(found, full) and torch.allclose(again, lp) and logistic.shape == (6, 3)
    some, _, _ = objective.rivals_loss(gaussian_flow, x, y, others[:, :2], 0.5, 2.0)
    one, _, one_logistic = objective.rivals_loss(gaussian_flow, x, y, others[:, :1], 0.5, 2.0)
    pair, _, pair_logistic = objective.pairwise_loss(gaussian_flow, x, y, others[:, 0], 0.5, 2.0)
    assert one < some < full and torch.allclose(one, pair)
    assert torch.allclose(one_logistic[:, 0], pair_logistic) and torch.allclose(one_logistic, logistic[:, :1])


def test_several_negatives_are_different_and_each_pair_is_taken_in():
    y = torch.arange(4).repeat(100)
    negatives = objective.HardNegatives(4)
    wrong = negatives.draw(y, torch.Generator().manual_seed(0), 2)
    assert wrong.shape == (400, 2) and (wrong != y[:, None]).all() and (wrong[:, 0] != wrong[:, 1]).all()
    every = negatives.draw(y, torch.Generator().manual_seed(0), 3)
    assert torch.equal(
        every.sort(dim=1).values[:4], torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    )
    negatives.update(y, every, every.double())
    expected = torch.where(torch.eye(4) > 0, 0.0, 0.9 + 0.1 * torch.arange(4.0))
    assert torch.allclose(negatives.losses, expected)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"count must lie between 1 and K - 1 = 3, got {count}"):
            negatives.draw(y, None, count)


def test_negatives_that_are_all_easy_can_be_drawn():
    negatives = objective.HardNegatives(3)
    negatives.losses.zero_()
    y = torch.arange(3).repeat(50)
    wrong = negatives.draw(y, torch.Generator().manual_seed(0))
    assert (wrong != y).all() and set(wrong[y == 1].tolist()) == {0, 2}


def test_hard_negatives_are_wrong_cover_the_rest_and_follow_the_losses():
    y = torch.arange(4).repeat(500)
    negatives = objective.HardNegatives(4)
    wrong = negatives.draw(y, torch.Generator().manual_seed(0))
    assert (wrong != y).all() and set(wrong[y == 2].tolist()) == {0, 1, 3}
    for _ in range(60):
        negatives.update(y, wrong, torch.where((y == 2) & (wrong == 3), 2.0, 0.01))
    again = negatives.draw(y, torch.Generator().manual_seed(0))
    assert float((again[y == 2] == 3).float().mean()) > 0.85
    assert set(again[y == 2].tolist()) == {0, 1, 3}
    assert abs(float(negatives.losses[2, 3]) - 2.0) < 0.01 and (negatives.losses.diagonal() == 0).all()


def test_objectives_take_a_real_flow():
    config = FlowConfig.tiny(3, dropout=0.0)
    model = MagicFlow(config).double()
    x, y = torch.rand(4, 1, 16, 16, dtype=torch.float64) * 2 - 1, torch.tensor([0, 1, 2, 0])
    model.initialize(x)
    loss, lp = objective.hybrid_loss(model, x, y, 3, 1.0, 1.0)
    assert torch.allclose(lp, model.log_prob(x, y))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_the_old_name_still_works():
    with pytest.warns(DeprecationWarning, match="HardNegatives"):
        assert objective.Rivals is objective.HardNegatives
    with pytest.raises(AttributeError, match="Nothing"):
        _ = objective.Nothing
