from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastflow.data.preprocess import Preprocess, pad_evenly, slice_indices, to_uint8, to_unit_range
from fastflow.data.volume import Volume
from fastflow.errors import VolumeError


def volume(data: np.ndarray, spacing: tuple[float, float, float] = (2.0, 2.0, 2.0)) -> Volume:
    return Volume(data.astype(np.float32), spacing, np.diag([*spacing, 1.0]), "scan.nii.gz")


def ramp(shape: tuple[int, int, int] = (6, 9, 5)) -> np.ndarray:
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


# -- settings ------------------------------------------------------------------------------------------------


@st.composite
def settings_of_preprocess(draw: st.DrawFn) -> Preprocess:
    whole, positive = st.integers(1, 300), st.floats(0.1, 10)
    return Preprocess(
        draw(st.tuples(whole, whole)),
        draw(st.sampled_from(["center", "center+-4", "center+-8:2", "3", "7,1,30"])),
        draw(st.none() | st.tuples(positive, positive, positive)),
        draw(st.none() | st.tuples(whole, whole, whole)),
        draw(st.sampled_from(["percentile", "fixed"])),
    )


@given(settings_of_preprocess())
def test_json_round_trip(preprocess: Preprocess) -> None:
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess


def test_numpy_numbers_become_json() -> None:
    shape, spacing = np.array([91, 109, 91]), np.array([2, 2, 2], dtype=np.float32)
    preprocess = Preprocess((np.int64(48), np.int64(48)), spacing=tuple(spacing), grid=tuple(shape))
    assert json.loads(json.dumps(preprocess.to_dict()))["grid"] == [91, 109, 91]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size", None),
        ("size", 48),
        ("size", (48,)),
        ("size", (48, 0)),
        ("size", (48.5, 48)),
        ("size", ("48", "48")),
        ("size", (True, 48)),
        ("spacing", (1, 1)),
        ("spacing", (1, 1, -1)),
        ("spacing", (1, 1, math.nan)),
        ("spacing", (1, 1, math.inf)),
        ("grid", (91, 109, 91, 1)),
        ("grid", (91, 109, 0.5)),
        ("slices", "centre"),
        ("slices", "center+-"),
        ("slices", "center+-4:0"),
        ("slices", "1,,2"),
        ("slices", "-1"),
        ("slices", ""),
        ("slices", 3),
        ("scaling", "max"),
    ],
)
def test_bad_field_is_named(field: str, value: Any) -> None:
    fields = {"size": (48, 48), field: value}
    with pytest.raises(ValueError, match=rf"^{field} must be .*got {re.escape(repr(value))}$"):
        Preprocess(**fields)


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"unknown field.*\['padding', 'zoom'\]"):
        Preprocess.from_dict({"size": [48, 48], "zoom": 2, "padding": 1})
    with pytest.raises(ValueError, match="no field 'size'"):
        Preprocess.from_dict({"slices": "center"})


# -- which slices --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "length", "expected"),
    [
        ("center", 109, [54]),
        ("center", 10, [5]),
        ("center", 1, [0]),
        ("center+-0", 9, [4]),
        ("center+-2", 9, [2, 3, 4, 5, 6]),
        ("center+-4", 9, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ("center+-4:2", 9, [0, 2, 4, 6, 8]),
        ("center+-5:3", 9, [1, 4, 7]),
        ("center+-2:7", 9, [4]),
        ("7,0,3", 9, [7, 0, 3]),
    ],
)
def test_slice_indices(spec: str, length: int, expected: list[int]) -> None:
    assert slice_indices(spec, length) == expected


@pytest.mark.parametrize(
    ("spec", "length", "index"),
    [("center+-5", 9, -1), ("center+-4", 8, 8), ("0,9,1", 9, 9), ("center+-99999999999", 9, -99999999995)],
)
def test_slice_outside_the_axis(spec: str, length: int, index: int) -> None:
    with pytest.raises(ValueError, match=rf"index {index} of an axis of {length}"):
        slice_indices(spec, length)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 120))
def test_centred_slices_are_symmetric(reach: int, stride: int, length: int) -> None:
    try:
        indices = slice_indices(f"center+-{reach}:{stride}", length)
    except ValueError:
        used = reach - reach % stride
        assert used > length // 2 or length // 2 + used >= length
        return
    assert len(indices) == 2 * (reach // stride) + 1
    assert indices[len(indices) // 2] == length // 2
    assert set(np.diff(indices)) <= {stride}
    assert 0 <= min(indices) <= max(indices) < length


# -- from a volume to images ---------------------------------------------------------------------------------


def test_slices_are_taken_turned_and_padded() -> None:
    data = ramp((3, 4, 2)) * 10
    images = Preprocess((4, 6), "0,2", scaling="fixed")(volume(data))
    assert images.shape == (2, 1, 4, 6) and images.dtype == np.uint8
    for image, y in zip(images, (0, 2), strict=True):
        expected = np.zeros((4, 6), dtype=np.uint8)
        # Top of the head first, patient's left first.
        expected[1:3, 1:4] = np.minimum(data[:, y, ::-1].T, 255)
        np.testing.assert_array_equal(image[0], expected)


def test_percentile_is_of_the_whole_volumes_positive_voxels() -> None:
    data = np.zeros((20, 11, 20))
    data[:, 1, :] = np.linspace(1, 400, 400).reshape(20, 20)
    data[:10, 5, :] = 200.0
    top = np.percentile(data[data > 0], 99.9)
    image = Preprocess((20, 20))(volume(data))
    assert set(np.unique(image)) == {0, round(200 / top * 255)}
    assert Preprocess((20, 20), "1")(volume(data)).max() == 255


@given(st.floats(1e-6, 1e6))
def test_percentile_scaling_forgets_the_unit(factor: float) -> None:
    data = ramp()
    expected = Preprocess((8, 8))(volume(data)).astype(int)
    assert np.abs(Preprocess((8, 8))(volume(data * factor)) - expected).max() <= 1


def test_negative_values_become_zero() -> None:
    data = ramp()
    data[:4, 4, :] = -5
    image = Preprocess((8, 8))(volume(data))[0, 0]
    assert (image == 0).sum() >= 4 * data.shape[2] and image.max() > 0


def test_one_bright_voxel_does_not_darken_the_rest() -> None:
    data = np.full((20, 20, 20), 100.0)
    data[0] = 0
    data[3, 3, 3] = 1e6
    assert Preprocess((20, 20))(volume(data)).max() == 255
    assert np.median(Preprocess((20, 20))(volume(data))) == 255


@given(
    hnp.arrays(np.float32, (4, 3, 5), elements=st.floats(-(2.0**127), 2.0**127, width=32)),
    st.sampled_from(["percentile", "fixed"]),
)
def test_any_finite_volume_gives_images_or_a_named_error(data: np.ndarray, scaling: str) -> None:
    try:
        images = Preprocess((8, 8), "center+-1", scaling=scaling)(volume(data))
    except VolumeError as error:
        code = error.code
    else:
        assert images.shape == (3, 1, 8, 8) and images.dtype == np.uint8
        return
    assert code in ("constant", "blank")
    if code == "constant":
        assert scaling == "percentile"
        assert data.max() <= 0 or data.min() == data.max()


@pytest.mark.parametrize("value", [0.0, 7.0, -3.0])
def test_constant_volume(value: float) -> None:
    with pytest.raises(VolumeError) as caught:
        Preprocess((8, 8))(volume(np.full((6, 9, 5), value)))
    assert caught.value.code == "constant"
    assert caught.value.path == "scan.nii.gz"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"spacing": (2.0, 2.0, 2.0), "grid": (6, 9, 5)}, None),
        ({"spacing": (2.015, 1.985, 2.0)}, None),
        ({"spacing": (2.0, 2.0, 2.05)}, "grid_mismatch"),
        ({"spacing": (1.0, 1.0, 1.0)}, "grid_mismatch"),
        ({"grid": (9, 6, 5)}, "grid_mismatch"),
        ({"slices": "9"}, "slice_range"),
        ({"slices": "center+-5"}, "slice_range"),
        ({"size": (4, 8)}, "size"),
        ({"size": (8, 5)}, "size"),
        ({"size": (5, 6)}, None),
    ],
)
def test_grid_and_size(changes: dict[str, Any], code: str | None) -> None:
    preprocess = Preprocess(**{"size": (8, 8), **changes})
    if code is None:
        assert preprocess(volume(ramp())).shape[2:] == preprocess.size
        return
    with pytest.raises(VolumeError) as caught:
        preprocess(volume(ramp()))
    assert caught.value.code == code
    assert caught.value.path == "scan.nii.gz"


# -- padding and range ---------------------------------------------------------------------------------------


def test_top_and_left_take_the_floor() -> None:
    padded = pad_evenly(np.ones((2, 3, 4), dtype=np.uint8), (6, 7))
    assert padded.shape == (2, 6, 7) and padded.dtype == np.uint8
    assert padded[:, 1:4, 1:5].min() == 1 and padded.sum() == 2 * 12


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5), st.integers(0, 5))
def test_padding_is_even(height: int, width: int, more_rows: int, more_columns: int) -> None:
    padded = pad_evenly(np.ones((height, width), dtype=np.uint8), (height + more_rows, width + more_columns))
    assert padded.shape == (height + more_rows, width + more_columns)
    rows, columns = np.flatnonzero(padded.any(axis=1)), np.flatnonzero(padded.any(axis=0))
    assert (rows[0], columns[0], len(rows), len(columns)) == (
        more_rows // 2,
        more_columns // 2,
        height,
        width,
    )


@pytest.mark.parametrize("size", [(2, 9), (9, 3)])
def test_larger_than_the_size(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"3 x 4, larger than the model's {size[0]} x {size[1]}"):
        pad_evenly(np.ones((3, 4), dtype=np.uint8), size)


def test_unit_range() -> None:
    values = np.arange(256, dtype=np.uint8)
    unit = to_unit_range(values)
    assert unit.dtype == np.float32
    np.testing.assert_allclose(unit, 2 * values.astype(float) / 255 - 1, atol=2e-7)
    assert (unit[0], unit[255]) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(unit), values)


def test_values_outside_the_unit_range_are_clipped() -> None:
    np.testing.assert_array_equal(
        to_uint8(np.array([-7.0, -1.0, 0.001, 1.0, 1.2, np.inf, -np.inf])), [0, 0, 128, 255, 255, 255, 0]
    )
