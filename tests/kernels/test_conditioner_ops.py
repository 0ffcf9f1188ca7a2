"""Ops of the conditioners: definition against torch's modules, gradients, what they refuse."""

import pytest
import torch
from torch.nn import functional as F

from fastflow import kernels


def rand(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("channels", "groups", "size"), [(8, 8, (3, 5)), (8, 4, (1, 1)), (6, 1, (4, 4)), (64, 8, (7, 7))])
def test_norm_film_act_is_groupnorm_film_gelu(channels, groups, size, residual):
    x, extra = rand(3, channels, *size), rand(3, channels, *size, seed=1)
    weight, bias, gamma, beta = (
        rand(channels, seed=2),
        rand(channels, seed=3),
        rand(4, channels, seed=4),
        rand(4, channels, seed=5),
    )
    rows = torch.tensor([2, 0, 2])
    want = F.group_norm(x, groups, weight, bias) if size != (1, 1) or channels != groups else None
    want = gamma[rows][:, :, None, None] * want + beta[rows][:, :, None, None]
    want = F.gelu(want + extra if residual else want)
    got = kernels.norm_film_act(x, groups, gamma * weight, gamma * bias + beta, rows, extra if residual else None)
    assert torch.allclose(got, want, atol=1e-12)


def test_one_element_groups_normalise_to_zero():
    x = rand(1, 3, 1, 1)
    got = kernels.norm_film_act(x, 3, torch.ones(1, 3).double(), torch.full((1, 3), 2.0).double(), torch.tensor([0]))
    assert torch.allclose(got, F.gelu(torch.full_like(x, 2.0)))


def test_variance_survives_a_large_mean():
    x = (1000 + rand(2, 8, 16, 16)).float()
    got = kernels.norm_film_act(x, 8, torch.ones(1, 8), torch.zeros(1, 8), torch.zeros(2, dtype=torch.int64))
    want = kernels.norm_film_act(
        x.double(), 8, torch.ones(1, 8).double(), torch.zeros(1, 8).double(), torch.zeros(2, dtype=torch.int64)
    )
    assert (got - want).abs().max() < 2e-3


@pytest.mark.parametrize("op", ["norm", "plain"])
def test_film_gradients(op):
    rows = torch.tensor([1, 0, 1])
    values = [rand(3, 4, 3, 3), rand(2, 4, seed=1), rand(2, 4, seed=2), rand(3, 4, 3, 3, seed=3)]
    values = [v.requires_grad_() for v in values]
    if op == "norm":
        assert torch.autograd.gradcheck(lambda x, g, b, r: kernels.norm_film_act(x, 2, g, b, rows, r), values)
    else:
        assert torch.autograd.gradcheck(lambda x, g, b, r: kernels.film_act(x, g, b, rows, r), values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"groups": 3}, "groups"),
        ({"gamma": torch.ones(2, 5)}, "gamma"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "rows"),
        ({"residual": torch.zeros(2, 4, 3, 2)}, "residual"),
        ({"x": torch.zeros(4, 3, 3)}, "x must be"),
    ],
)
def test_norm_film_act_refuses(change, words):
    good = {"x": torch.zeros(2, 4, 3, 3), "groups": 2, "gamma": torch.ones(2, 4), "beta": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=words):
        kernels.norm_film_act(**{**good, "rows": torch.zeros(2, dtype=torch.int64), **change})
