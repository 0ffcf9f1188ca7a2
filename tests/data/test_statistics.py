from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastflow.data.anatomy import HEADS, load_head
from fastflow.data.preprocess import coronal_slices
from fastflow.data.statistics import CELLS, MEASURED, STATISTICS, blank_slice, measure


def numbers(pixels: np.ndarray, negative: float | None = None) -> dict[str, float]:
    """The numbers of one slice by name."""
    return dict(zip(MEASURED, measure(pixels[None], negative)[0].tolist(), strict=False))


# -- blank slices --------------------------------------------------------------------------------------------


@given(
    st.integers(0, 255),
    st.integers(8, 60),
    st.integers(8, 60),
    st.integers(0, 200),
    st.integers(-255, 255),
)
def test_a_slice_is_blank_below_a_share_of_other_pixels(
    level: int, rows: int, columns: int, others: int, step: int
) -> None:
    other = level + step
    if not 0 <= other <= 255:
        return
    pixels = np.full((rows, columns), level, dtype=np.uint8)
    others = min(others, rows * columns // 3)
    pixels.reshape(-1)[:others] = other
    differ = others if abs(step) > 2 else 0
    expected = differ < max(4, 0.005 * rows * columns)
    assert (blank_slice(pixels[None]) is not None) == expected


def test_a_blank_slice_is_named_by_its_place() -> None:
    shown = np.arange(100, dtype=np.uint8).reshape(10, 10)
    dot = np.zeros((10, 10), dtype=np.uint8)
    dot[3, 4] = 255
    assert blank_slice(np.stack([shown, shown])) is None
    assert blank_slice(np.stack([shown, dot, dot])) == (
        1,
        "1 of its 100 pixels differs from grey level 0 by more than 2",
    )


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_slices_are_blank_with_rounding_errors_too(level: int, noise: int) -> None:
    pixels = level + np.random.default_rng(0).integers(-noise, noise + 1, (1, 91, 91))
    assert blank_slice(pixels.clip(0, 255).astype(np.uint8)) is not None


def test_the_last_slices_of_a_head_that_show_some_of_it_are_not_blank() -> None:
    for name in HEADS:
        planes = coronal_slices(load_head(name).t1, range(109))
        shown = [(plane > 10).sum() for plane in planes]
        for plane, count in zip(planes.clip(0, 255).astype(np.uint8), shown, strict=True):
            assert blank_slice(plane[None]) is None or count < 60


# -- numbers -------------------------------------------------------------------------------------------------


def test_numbers_of_a_slice_by_hand() -> None:
    pixels = np.full((8, 8), 100, dtype=np.uint8)
    pixels[0], pixels[4, 4], pixels[5, 5] = 0, 255, 160
    found = numbers(pixels, 0.25)
    assert found["negative"] == 0.25
    assert (found["black"], found["white"]) == (8 / 64, 1 / 64)
    # Of the 28 pixels around, 8 are black.
    assert found["border"] == 100
    assert [round(found[name]) for name in ("lower_quartile", "median", "upper_quartile")] == [100] * 3
    assert found["grain"] < 0.5
    # Each of two bright pixels, which meet at a corner, is in four of 49 differences.
    assert found["detail"] == pytest.approx((3 * 155 + 3 * 60 + 155 + 60) / 49)
    assert found["coarse_detail"] == pytest.approx((155 + 60) / 4 / 9 * 4)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))))
def test_numbers_are_those_of_each_slice_and_in_their_range(pixels: np.ndarray) -> None:
    found = measure(pixels, None)
    assert found.shape == (len(pixels), len(MEASURED) + CELLS * CELLS)
    for one, row in zip(pixels, found, strict=True):
        np.testing.assert_array_equal(measure(one[None], None)[0], row)
    if min(pixels.shape[1:]) < 4:
        assert np.isnan(found).all()
        return
    assert np.isnan(found[:, 0]).all() and np.isfinite(found[:, 1:]).all()
    for place, name in enumerate(MEASURED[1:], start=1):
        low, high = STATISTICS[name].ends
        assert low <= found[:, place].min() <= found[:, place].max() <= high
    # Cells are means of equal parts, so that their mean is that of the pixels.
    np.testing.assert_allclose(found[:, len(MEASURED) :].mean(axis=1), pixels.mean(axis=(1, 2)), rtol=1e-4)


@given(hnp.arrays(np.uint8, (1, 12, 15)))
def test_quartiles_are_near_those_of_the_pixels(pixels: np.ndarray) -> None:
    found = numbers(pixels[0])
    for name, share in (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75), ("bright", 0.9)):
        low, high = (float(np.quantile(pixels, share, method=way)) for way in ("lower", "higher"))
        assert low - 1 <= found[name] <= high + 1


def test_noise_is_grain_and_edges_are_not() -> None:
    rng = np.random.default_rng(0)
    edges = np.zeros((64, 64), dtype=np.uint8)
    edges[16:48, 16:48] = 200
    assert numbers(edges)["grain"] < 0.5
    noisy = numbers((edges * 0.5 + 60 + rng.normal(0, 10, edges.shape)).clip(0, 255).astype(np.uint8))
    # The median of the absolute value of four summed normal values.
    assert noisy["grain"] == pytest.approx(0.6745 * 2 * 10, rel=0.1)
