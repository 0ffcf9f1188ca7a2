"""Acquisition by a simulated scanner: noise, point spread and bias leave alone what a histogram sees."""

import numpy as np
import pytest

from fastflow.data import anatomy, demo
from fastflow.data.demo import acquisition


@pytest.fixture
def half_grid(monkeypatch):
    """A grid of an eighth of the voxels."""
    grid = tuple(n // 2 for n in anatomy.GRID)
    monkeypatch.setattr(acquisition, "GRID", grid)
    acquisition._ramps.cache_clear()
    yield grid
    acquisition._ramps.cache_clear()


def test_the_grain_of_the_noise_leaves_its_strength_alone(half_grid):
    """A histogram must not see the grain: windows and g-factors are normalised."""
    quiet = np.zeros(half_grid, dtype=np.float32)
    strengths = {}
    low, high = demo.SCANNERS[0].noise
    for scanner in demo.SCANNERS:
        assert scanner.noise == (low, high)
        magnitudes = demo.acquire(scanner, quiet, np.random.default_rng(0))
        strengths[scanner.name] = float(np.sqrt((magnitudes**2).mean() / 2))
    assert all(0.97 * low < s < 1.03 * high for s in strengths.values()), strengths


def test_windows_keep_the_mean_blur_and_ghost():
    sharp, soft = demo.window_matrix(91, 1.0, 0.4), demo.window_matrix(91, 0.6, 0.4)
    assert np.allclose(sharp, np.eye(91), atol=1e-5)
    assert np.allclose(soft.sum(axis=1), 1.0, atol=1e-5) and soft[40, 40] < 0.8
    assert np.allclose(demo.window_matrix(91, 1.0, 0.4, ghost=0.1).sum(axis=1), 1.1, atol=1e-5)


def test_bias_fields_are_smooth_and_near_one():
    for seed, scanner in enumerate(demo.SCANNERS):
        field = demo.bias_field(scanner, np.random.default_rng(seed))
        assert field.shape == anatomy.GRID and field.min() > 0.3 and field.max() < 2.5
        assert max(np.abs(np.diff(field, axis=axis)).max() for axis in range(3)) < 0.1
