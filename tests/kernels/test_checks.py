"""Checks of arguments whose values are looked at once, and of those whose changes nobody counts."""

from __future__ import annotations

import pytest
import torch

from fastflow import kernels
from fastflow.kernels import checks

X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
TABLE = torch.ones(4, 3)


def looks(monkeypatch, index, calls):
    """How often the values of `index` are looked at in so many calls."""
    count, aminmax = [], torch.aminmax

    def look(x, **options):
        count.append(x)
        return aminmax(x, **options)

    monkeypatch.setattr(torch, "aminmax", look)
    for _ in range(calls):
        kernels.norm_film_act(X, 3, TABLE, TABLE, index)
    monkeypatch.undo()
    return len(count)


def test_values_are_looked_at_once_and_again_after_a_change(monkeypatch):
    index = torch.tensor([3, 0])
    assert looks(monkeypatch, index, 3) == 1
    index[1] = 2
    assert looks(monkeypatch, index, 3) == 1
    index[0] = 4
    with pytest.raises(ValueError, match=r"label_index must lie from 0 to 3, .* got 4"):
        looks(monkeypatch, index, 1)


def test_an_index_without_a_counter_is_looked_at_each_time(monkeypatch):
    with torch.inference_mode():
        index = torch.tensor([3, 0])
        assert looks(monkeypatch, index, 3) == 3
        index[0] = 4
        with pytest.raises(ValueError, match="got 4"):
            looks(monkeypatch, index, 1)


def test_a_declared_index_without_a_counter_is_a_copy(monkeypatch):
    with torch.inference_mode():
        index = torch.tensor([3, 0])
        declared = checks.mark_label_index(index, 4)
        assert declared is not index and not declared.is_inference()
        index[0] = 4
        assert declared.tolist() == [3, 0] and looks(monkeypatch, declared, 2) == 0
        declared[0] = -1
        with pytest.raises(ValueError, match="got -1"):
            looks(monkeypatch, declared, 1)
    index = torch.tensor([3, 0])
    assert checks.mark_label_index(index, 4) is index and checks.counted(index) is index
