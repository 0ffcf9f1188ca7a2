from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow.data.grain import GRAIN_NUMBERS, grain_numbers


def heads(count: int = 3, strength: float = 10.0, seed: int = 0) -> np.ndarray:
    """(count, 50, 44) bright rectangles with white grain on a background with weaker grain."""
    rng = np.random.default_rng(seed)
    pixels = np.abs(rng.normal(0, 4, (count, 50, 44)))
    pixels[:, 10:40, 8:36] = 120 + strength * rng.normal(size=(count, 30, 28))
    return pixels.clip(0, 255).astype(np.uint8)


def numbers(pixels: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip(GRAIN_NUMBERS, grain_numbers(pixels).T, strict=True))


def test_stronger_grain_has_a_larger_residual() -> None:
    weak, strong = numbers(heads(strength=4.0)), numbers(heads(strength=12.0))
    assert (strong["variance"] > 4 * weak["variance"]).all()
    assert (strong["deviation"] > 2 * weak["deviation"]).all()
    assert weak["mean"] == pytest.approx(strong["mean"], rel=0.05)


def test_grain_that_is_smooth_along_one_axis_is_correlated_along_it() -> None:
    rng = np.random.default_rng(0)
    grain = gaussian_filter(rng.normal(size=(3, 50, 44)), (0, 0, 1.0))
    pixels = (120 + 10 * grain / grain.std()).astype(np.uint8)
    across, down = numbers(pixels)["across"], numbers(pixels)["down"]
    assert (across > down + 0.3).all()
    turned = numbers(pixels.transpose(0, 2, 1))
    np.testing.assert_allclose(turned["down"], across, rtol=1e-12)
    np.testing.assert_allclose(turned["across"], down, rtol=1e-12)


def test_black_padding_changes_nothing() -> None:
    pixels = heads()
    pixels[:, :12] = pixels[:, -12:] = 0
    pixels[:, :, :12] = pixels[:, :, -12:] = 0
    padded = np.pad(pixels, ((0, 0), (3, 5), (20, 7)))
    np.testing.assert_allclose(grain_numbers(padded), grain_numbers(pixels), rtol=1e-12)


def test_smoothing_is_that_of_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = heads()
    ours = grain_numbers(pixels)
    monkeypatch.setattr("fastflow.data.grain._smooth", gaussian_filter)
    np.testing.assert_allclose(grain_numbers(pixels), ours, rtol=1e-9)


def test_slices_without_a_head_or_of_one_pixel_give_finite_numbers() -> None:
    assert (grain_numbers(np.zeros((2, 8, 8), dtype=np.uint8)) == 0).all()
    assert np.isfinite(grain_numbers(np.full((1, 1, 1), 200, dtype=np.uint8))).all()
    assert grain_numbers(np.zeros((0, 8, 8), dtype=np.uint8)).shape == (0, 6)


def test_neither_scipy_nor_torch_is_imported() -> None:
    code = "import sys, fastflow.data.grain; assert not {'scipy', 'torch', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
