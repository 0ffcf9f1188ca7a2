"""Units, voxel sizes, offsets and lengths of NIfTI headers, held against nibabel where both read a file."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflow.data import _header
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import read_image
from fastflow.data.volume import Volume, read_volume
from fastflow.errors import VolumeError
from tests.data.files import AFFINE, DATA, SHAPE, code_of, mgh, nifti, outcome, store

NAMES = ["scan.nii", "scan.nii.gz"]
BYTES = DATA.nbytes
# The spatial part of xyzt_units, and its size in mm; others than those of the standard are taken for mm.
UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001, 5: 1.0}


def message_of(path: Path) -> str:
    error = outcome(path)
    assert isinstance(error, VolumeError)
    return error.message


def by_nibabel(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nib.as_closest_canonical(nib.load(path))


# -- units ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("time", [0, 8, 16, 24, 32])
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("form", ["sform", "qform", "neither"])
def test_lengths_are_read_in_their_unit(
    tmp_path: Path, unit: int, time: int, version: int, form: str
) -> None:
    size = UNITS[unit]
    stored = AFFINE / np.array([[size], [size], [size], [1]])
    fields: dict[str, Any] = {"xyzt_units": unit | time, "pixdim": [1, *np.diag(stored)[:3], 1, 1, 1, 1]}
    fields |= {f"srow_{axis}": row for axis, row in zip("xyz", stored, strict=False)}
    fields |= {f"qoffset_{axis}": row[3] for axis, row in zip("xyz", stored, strict=False)}
    fields |= {"sform_code": int(form == "sform"), "qform_code": int(form == "qform")}
    path = store(tmp_path, nifti(version=version, **fields))
    volume = read_volume(path)
    assert volume.spacing == pytest.approx((2.0, 2.5, 3.0))
    if form != "neither":
        np.testing.assert_allclose(volume.affine, AFFINE, rtol=1e-6)
    # nibabel leaves lengths in the unit of the file.
    expected = np.diag([size, size, size, 1.0]) @ by_nibabel(path).affine
    np.testing.assert_allclose(volume.affine, expected, rtol=1e-6)


def test_small_voxels_in_metres_are_not_singular(tmp_path: Path) -> None:
    rows = {f"srow_{axis}": 1e-5 * np.eye(4)[k] for k, axis in enumerate("xyz")}
    volume = read_volume(store(tmp_path, nifti(xyzt_units=1, **rows)))
    assert volume.spacing == pytest.approx((0.01, 0.01, 0.01))


def test_forms_are_compared_in_millimetres(tmp_path: Path) -> None:
    moved = {"qform_code": 1, "pixdim": [1, 2.0, 2.5, 3.0, 1, 1, 1, 1], "qoffset_x": -9}
    moved |= {"qoffset_y": -6, "qoffset_z": -7}
    # The forms are 4 apart.
    for unit, codes in ((2, ["forms_disagree"]), (3, []), (1, ["forms_disagree"])):
        volume = read_volume(store(tmp_path, nifti(xyzt_units=unit, **moved)))
        assert [flag.code for flag in volume.flags] == codes


@pytest.mark.parametrize(("unit", "words"), [(0, "no unit"), (1, "in metres"), (2, None), (3, "in microns")])
def test_another_grid_is_told_with_the_unit(tmp_path: Path, unit: int, words: str | None) -> None:
    path = store(tmp_path, nifti(xyzt_units=unit))
    with pytest.raises(VolumeError) as caught:
        read_image(str(path), Preprocess((8, 8), spacing=(1.0, 1.0, 1.0)))
    assert caught.value.code == "grid_mismatch"
    assert f"{2 * UNITS[unit]:g} x" in caught.value.message or unit == 1
    assert (words or "1.0, 1.0, 1.0)") in caught.value.message
    assert ("states its lengths" in caught.value.message) == (words is not None)


# -- voxel sizes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
@pytest.mark.parametrize("form", ["sform", "qform", "neither"])
@pytest.mark.parametrize("qfac", [1, -1, 0])
@pytest.mark.parametrize("name", NAMES)
def test_negative_voxel_sizes_as_nibabel_reads_them(
    tmp_path: Path, signs: tuple[int, ...], form: str, qfac: int, name: str
) -> None:
    pixdim = [qfac, *(np.array(signs) * (2.0, 2.5, 3.0)), 0, 0, 0, 0]
    codes = {"sform_code": int(form == "sform"), "qform_code": int(form == "qform")}
    path = store(tmp_path, nifti(pixdim=pixdim, **codes), name)
    volume, expected = read_volume(path), by_nibabel(path)
    np.testing.assert_array_equal(volume.data, expected.get_fdata())
    np.testing.assert_allclose(volume.affine, expected.affine)
    assert volume.spacing == pytest.approx((2.0, 2.5, 3.0))
    doubted = min(signs) < 0 and form != "sform"
    assert [flag.code for flag in volume.flags] == ["no_orientation"] * (form == "neither") + [
        "negative_spacing"
    ] * doubted
    assert not doubted or "pixdim is " in volume.flags[-1].message


# -- offsets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_offset_of_zero_is_the_least(tmp_path: Path, version: int, name: str) -> None:
    volume = read_volume(store(tmp_path, nifti(version=version, vox_offset=0), name))
    np.testing.assert_array_equal(volume.data, DATA)
    assert volume.flags == ()
    # Voxels that follow the header at once would be four bytes fewer.
    content = nifti(version=version, vox_offset=0)
    size = 348 if version == 1 else 540
    assert code_of(store(tmp_path, content[:size] + content[size + 4 :], name)) == "truncated"


@pytest.mark.parametrize(
    ("offset", "words"),
    [
        (1, "vox_offset is 1; voxels begin between byte 352 and"),
        (348, "vox_offset is 348; voxels"),
        (351, "vox_offset is 351; voxels"),
        (-352, "vox_offset is -352; voxels"),
        (np.nan, "vox_offset is nan; voxels"),
        (np.inf, "vox_offset is inf; voxels"),
        (1e30, "vox_offset is 1e+30; voxels"),
        (352.5, "vox_offset is 352.5, which is no whole number"),
    ],
)
@pytest.mark.parametrize("name", NAMES)
def test_offsets_that_cannot_be(tmp_path: Path, offset: float, words: str, name: str) -> None:
    path = store(tmp_path, nifti(vox_offset=offset), name)
    assert code_of(path) == "header"
    assert words in message_of(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("gap", [0, 1, 4, 12, 16, 5000])
def test_voxels_further_on_as_nibabel_reads_them(tmp_path: Path, gap: int, name: str) -> None:
    content = nifti(vox_offset=352 + gap)
    path = store(tmp_path, content[:352] + b"\7" * gap + content[352:], name)
    np.testing.assert_array_equal(read_volume(path).data, DATA)
    np.testing.assert_array_equal(by_nibabel(path).get_fdata(), DATA)


# -- what follows the voxels ---------------------------------------------------------------------------------

SMALL = np.arange(1, 5001, dtype=np.int16).reshape(50, 10, 10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("data", "tail", "code"),
    [
        (DATA, bytes(1), None),
        (DATA, bytes(BYTES - 1), None),
        (DATA, bytes(BYTES), "too_long"),
        (DATA, b"\n", "too_long"),
        (DATA, bytes(50) + b"x", "too_long"),
        (SMALL, bytes(4096), None),
        (SMALL, bytes(4097), "too_long"),
        (SMALL, bytes(4095) + b"x", "too_long"),
        (SMALL, SMALL.tobytes(), "too_long"),
        (SMALL, bytes(1 << 20), "too_long"),
    ],
)
def test_only_the_zeros_of_a_last_block_may_follow(
    tmp_path: Path, data: np.ndarray, tail: bytes, code: str | None, name: str
) -> None:
    path = store(tmp_path, nifti(data, tail=tail), name)
    result = outcome(path, 10_000)
    if code is None:
        assert isinstance(result, Volume)
        np.testing.assert_array_equal(result.data, data)
    else:
        assert isinstance(result, VolumeError) and result.code == code


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "sub-1_pet.nii", "sub-1_pet.nii.gz"])
def test_a_series_that_its_header_hides(tmp_path: Path, name: str) -> None:
    series = np.stack([DATA, DATA + 1, DATA + 2], axis=-1)
    path = store(tmp_path, nifti(series, dim=[3, *SHAPE, 3, 1, 1, 1]), name)
    assert code_of(path) == "too_long"
    assert "dim[0] is 3, but dim[4] is 3" in message_of(path)
    # Dimensions beyond dim[0] mean nothing where the file is as long as the others say.
    np.testing.assert_array_equal(
        read_volume(store(tmp_path, nifti(dim=[3, *SHAPE, 3, 1, 1, 1]), name)).data, DATA
    )


@pytest.mark.parametrize("name", ["scan.mgh", "scan.mgz"])
def test_tags_may_follow_the_voxels_of_mgh(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_header, "MAX_FOOTER_BYTES", 5000)
    np.testing.assert_array_equal(read_volume(store(tmp_path, mgh(tail=b"tag" * 1000), name)).data, DATA)
    assert code_of(store(tmp_path, mgh(tail=b"tag" * 2000), name)) == "too_long"


# -- any header ----------------------------------------------------------------------------------------------

lengths = st.floats(0.25, 8, width=32).flatmap(lambda n: st.sampled_from([n, -n]))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_accepted_is_what_nibabel_reads(tmp_path: Path, data: st.DataObject) -> None:
    draw = data.draw
    version, order, name = (
        draw(st.sampled_from([1, 2])),
        draw(st.sampled_from("<>")),
        draw(st.sampled_from(NAMES)),
    )
    unit = draw(st.sampled_from(list(UNITS)))
    quaternion = draw(st.lists(st.floats(-0.5625, 0.5625, width=32), min_size=3, max_size=3))
    fields: dict[str, Any] = {
        "sform_code": draw(st.sampled_from([0, 0, 1, 2])),
        "qform_code": draw(st.sampled_from([0, 1, 1, 4])),
        "pixdim": [draw(st.sampled_from([-1, 0, 1])), *(draw(lengths) for _ in range(3)), 1, 1, 1, 1],
        "xyzt_units": unit | draw(st.sampled_from([0, 8, 16])),
        "scl_slope": draw(st.sampled_from([0.0, 1.0, -0.5, 2.0, np.nan])),
        "scl_inter": draw(st.sampled_from([0.0, 10.0, -3.5])),
    }
    fields |= {f"quatern_{letter}": n for letter, n in zip("bcd", quaternion, strict=True)}
    fields |= {f"qoffset_{axis}": draw(st.floats(-200, 200, width=32)) for axis in "xyz"}
    gap = draw(st.integers(0, 40))
    header = 352 if version == 1 else 544
    content = nifti(version=version, order=order, vox_offset=header + gap, **fields)
    path = store(tmp_path, content[:header] + bytes(gap) + content[header:], name)
    result = outcome(path)
    if isinstance(result, VolumeError):
        assert result.code == "orientation_conflict"
        return
    expected = by_nibabel(path)
    np.testing.assert_array_equal(result.data, expected.get_fdata(dtype=np.float64).astype(np.float32))
    affine = np.diag([UNITS[unit]] * 3 + [1.0]) @ expected.affine
    np.testing.assert_allclose(result.affine, affine, rtol=1e-5, atol=1e-4 * UNITS[unit])
    np.testing.assert_allclose(result.spacing, nib.affines.voxel_sizes(affine), rtol=1e-5)
