from __future__ import annotations

import gzip
import itertools
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import read_image
from fastflow.data.volume import FLAG_CODES, Volume, read_volume
from fastflow.errors import FastflowError, VolumeError
from tests.data.files import AFFINE, DATA, SHAPE, code_of, mgh, nifti, outcome, store

MIB = 1 << 20

# The folder is shared by the examples of a test, which overwrite one file.
fuzz = settings(
    max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


# -- what is read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("flips", list(itertools.product((1, -1), repeat=3)))
def test_all_orientations_as_nibabel_does(
    tmp_path: Path, order: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    affine = np.eye(4)
    affine[:3, :3] = np.diag([2.0, 2.5, 3.0])[:, order] * flips
    affine[:3, 3] = (-5, 6, 7)
    image = nib.Nifti1Image(DATA, affine)
    nib.save(image, tmp_path / "scan.nii.gz")
    expected = nib.as_closest_canonical(image)
    volume = read_volume(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(volume.data, expected.get_fdata())
    np.testing.assert_allclose(volume.affine, expected.affine)
    assert volume.spacing == pytest.approx((2.0, 2.5, 3.0))
    assert volume.path == str(tmp_path / "scan.nii.gz")


def test_oblique_affine_as_nibabel_does(tmp_path: Path) -> None:
    angle = 0.3
    turn = np.array(
        [
            [np.cos(angle), -np.sin(angle), 0, 0],
            [np.sin(angle), np.cos(angle), 0, 0],
            [0, 0, 1, 0],
            [0, 0, 0, 1],
        ]
    )
    image = nib.Nifti1Image(DATA, turn @ AFFINE @ np.diag([-1, 1, 1, 1]))
    nib.save(image, tmp_path / "scan.nii")
    expected = nib.as_closest_canonical(image)
    volume = read_volume(tmp_path / "scan.nii")
    np.testing.assert_array_equal(volume.data, expected.get_fdata())
    np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-6)
    assert volume.spacing == pytest.approx((2.0, 2.5, 3.0))


@pytest.mark.parametrize("dtype", ["u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_every_real_type(tmp_path: Path, dtype: str, order: str, version: int, name: str) -> None:
    data = (np.abs(DATA) if dtype[0] == "u" else DATA).astype(dtype)
    volume = read_volume(store(tmp_path, nifti(data, version=version, order=order), name))
    assert volume.data.dtype == np.float32 and volume.data.dtype.isnative
    np.testing.assert_array_equal(volume.data, data.astype(np.float32))
    np.testing.assert_allclose(volume.affine, AFFINE)


@pytest.mark.parametrize(
    ("slope", "inter", "expected"),
    [
        (0.5, 10.0, DATA * 0.5 + 10),
        (-2.0, 0.0, DATA * -2.0),
        (0.0, 10.0, DATA),
        (np.nan, 10.0, DATA),
        (1.0, 0.0, DATA),
    ],
)
def test_slope_and_intercept(tmp_path: Path, slope: float, inter: float, expected: np.ndarray) -> None:
    path = store(tmp_path, nifti(scl_slope=slope, scl_inter=inter))
    np.testing.assert_array_equal(read_volume(path).data, expected.astype(np.float32))
    np.testing.assert_allclose(nib.load(path).get_fdata(), expected)


def test_trailing_single_dimensions_are_dropped(tmp_path: Path) -> None:
    assert read_volume(store(tmp_path, nifti(DATA[..., None, None]))).data.shape == SHAPE


def test_header_extensions_are_skipped(tmp_path: Path) -> None:
    image = nib.Nifti1Image(DATA, AFFINE)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"acquired on a Tuesday" * 50))
    nib.save(image, tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.nii.gz").data, DATA)


def test_quaternion_whose_qfac_is_zero(tmp_path: Path) -> None:
    # The standard reads 0 as 1; files converted from Analyze have it.
    pixdim = [0, 2.0, 2.5, 3.0, 1, 1, 1, 1]
    path = store(
        tmp_path, nifti(sform_code=0, qform_code=1, pixdim=pixdim, qoffset_x=-5, qoffset_y=-6, qoffset_z=-7)
    )
    np.testing.assert_allclose(read_volume(path).affine, AFFINE)


def test_gzip_of_several_members(tmp_path: Path) -> None:
    content = nifti()
    (tmp_path / "scan.nii.gz").write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    np.testing.assert_array_equal(read_volume(tmp_path / "scan.nii.gz").data, DATA)


def test_limit_is_inclusive(tmp_path: Path) -> None:
    path = store(tmp_path, nifti())
    assert read_volume(path, max_voxels=60).data.size == 60
    assert code_of(path, max_voxels=59) == "too_large"


# -- MGH -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scan.mgh", "scan.mgz"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4"])
def test_mgh_as_nibabel_does(tmp_path: Path, dtype: str, name: str) -> None:
    affine = np.array([[0, 0, -2.0, 5], [-2.5, 0, 0, 6], [0, 3.0, 0, -7], [0, 0, 0, 1]])
    path = store(tmp_path, mgh(np.abs(DATA).astype(dtype), affine, tail=b"a tag" * 50), name)
    volume, expected = read_volume(path), nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(volume.data, expected.get_fdata())
    np.testing.assert_allclose(volume.affine, expected.affine)
    assert volume.spacing == pytest.approx(tuple(nib.affines.voxel_sizes(expected.affine)))
    assert volume.flags == ()


def test_mgh_without_an_orientation(tmp_path: Path) -> None:
    path = store(tmp_path, mgh(changes={28: bytes(2)}), "scan.mgz")
    volume, expected = read_volume(path), nib.as_closest_canonical(nib.load(path))
    np.testing.assert_array_equal(volume.data, expected.get_fdata())
    assert [flag.code for flag in volume.flags] == ["no_orientation"]


@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("wrong_kind", lambda: nifti()),
        ("header", lambda: mgh(changes={0: b"\0\0\0\2"})),
        ("truncated", lambda: mgh()[:60]),
        ("truncated", lambda: mgh()[:300]),
        ("dims", lambda: mgh(changes={8: bytes(4)})),
        ("dims", lambda: mgh(changes={8: b"\xff" * 4})),
        ("too_large", lambda: mgh(changes={4: b"\x7f\xff\xff\xff" * 3})),
        ("four_dimensional", lambda: mgh(np.zeros((5, 4, 3, 2), dtype=np.int16))),
        ("dtype", lambda: mgh(changes={20: b"\0\0\0\2"})),
        ("affine", lambda: mgh(changes={30: bytes(4)})),
        ("affine", lambda: mgh(changes={42: b"\x7f\xc0\0\0"})),
        ("non_finite", lambda: mgh(_with(DATA, np.nan).astype(np.float32))),
    ],
)
@pytest.mark.parametrize("name", ["scan.mgh", "scan.mgz"])
def test_bad_mgh(tmp_path: Path, code: str, content: Callable[[], bytes], name: str) -> None:
    assert code_of(store(tmp_path, content(), name)) == code


def test_footer_of_mgh_is_bounded_and_drained(tmp_path: Path) -> None:
    path = store(tmp_path, mgh(tail=bytes(MIB)), "scan.mgz")
    np.testing.assert_array_equal(read_volume(path).data, DATA)
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    assert code_of(path) == "crc"
    assert code_of(store(tmp_path, mgh(tail=bytes(17 * MIB)), "scan.mgz")) == "too_long"


# -- frames --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sub-1_pet.nii.gz", "sub-1_pet.nii", "pet/sub-1.nii", "sub-1_pet.mgz"])
@pytest.mark.parametrize("frames", [2, 3, 4])
def test_pet_becomes_its_median_frame(
    tmp_path: Path, name: str, frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflow.data.volume._CHUNK_BYTES", 80)
    (tmp_path / "pet").mkdir()
    data = np.random.default_rng(0).integers(0, 500, (*SHAPE, frames)).astype(np.int16)
    content = mgh(data) if name.endswith("mgz") else nifti(data, scl_slope=0.5, order=">")
    expected = np.median(data.astype(np.float32) * (1 if name.endswith("mgz") else 0.5), axis=3)
    path = store(tmp_path, content, name)
    np.testing.assert_array_equal(read_volume(path).data, expected)
    assert code_of(path, max_voxels=60 * frames - 1) == "too_large"
    preprocess = Preprocess((8, 8), "center+-1")
    loaded = read_image(str(path), preprocess)
    np.testing.assert_array_equal(loaded.images, preprocess(read_volume(path)))


def test_pet_with_a_bad_frame(tmp_path: Path) -> None:
    data = np.ones((*SHAPE, 5), dtype=np.float32)
    data[1, 1, 1, 2] = np.inf
    assert code_of(store(tmp_path, nifti(data), "sub-1_pet.nii")) == "non_finite"
    assert code_of(store(tmp_path, nifti(data[..., None, :]), "sub-1_pet.nii")) == "dims"
    assert code_of(store(tmp_path, nifti(data)[:-1], "sub-1_pet.nii.gz")) == "truncated"
    many = nifti(np.zeros((1, 1, 1, 1001), dtype=np.int8))
    assert code_of(store(tmp_path, many, "sub-1_pet.nii"), max_voxels=2000) == "too_large"
    assert code_of(store(tmp_path, nifti(dim=[4, 9, 9, 1, 10, 1, 1, 1]), "sub-1_pet.nii.gz")) == "truncated"


@pytest.mark.parametrize("name", ["pet_T1w.nii", "sub-pet/scan.nii", "sub_pet_T1w.nii", "petted/scan.nii"])
def test_what_is_not_pet(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    assert code_of(store(tmp_path, nifti(np.zeros((5, 4, 3, 2), dtype=np.int16)), name)) == "four_dimensional"


# -- doubts --------------------------------------------------------------------------------------------------


def turned(degrees: float) -> dict[str, Any]:
    """sform of axes turned about the vertical one."""
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return {
        "srow_x": [2 * cosine, -2.5 * sine, 0, 0],
        "srow_y": [2 * sine, 2.5 * cosine, 0, 0],
        "srow_z": [0, 0, 3, 0],
    }


SPACED = {
    "qform_code": 1,
    "pixdim": [1, 2.0, 2.5, 3.0, 1, 1, 1, 1],
    "qoffset_x": -5,
    "qoffset_y": -6,
    "qoffset_z": -7,
}


@pytest.mark.parametrize(
    ("codes", "fields"),
    [
        ([], {}),
        ([], turned(14)),
        (["oblique"], turned(16)),
        (["no_orientation"], {"sform_code": 0, **SPACED, "qform_code": 0}),
        (["orientation_code"], {"sform_code": 6}),
        (["orientation_code"], {"sform_code": -1}),
        (["orientation_code"], {"qform_code": 9, "sform_code": 0, "pixdim": SPACED["pixdim"]}),
        ([], SPACED),
        ([], {**SPACED, "qoffset_x": -6.9}),
        (["forms_disagree"], {**SPACED, "qoffset_x": -7.1}),
        (["forms_disagree"], {**SPACED, "pixdim": [1, 2.0, 2.5, 5.0, 1, 1, 1, 1]}),
        (["forms_disagree"], {**SPACED, "quatern_b": 5.0}),
        (["forms_disagree"], {**SPACED, "pixdim": [1, 0, 2.5, 5.0, 1, 1, 1, 1]}),
        (["oblique", "orientation_code", "forms_disagree"], {**SPACED, **turned(30), "qform_code": 7}),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_doubts_are_flags(tmp_path: Path, codes: list[str], fields: dict[str, Any], version: int) -> None:
    volume = read_volume(store(tmp_path, nifti(version=version, **fields)))
    assert [flag.code for flag in volume.flags] == codes
    assert all(flag.code in FLAG_CODES and flag.message for flag in volume.flags)
    assert pickle.loads(pickle.dumps(volume.flags)) == volume.flags


# -- what is refused -----------------------------------------------------------------------------------------


def _with(data: np.ndarray, value: float) -> np.ndarray:
    changed = data.astype(np.float64)
    changed[2, 1, 1] = value
    return changed


SINGULAR = {"srow_x": [0, 0, 0, 1], "srow_y": [0, 2, 0, 0], "srow_z": [0, 0, 2, 0]}
BAD: dict[str, tuple[str, Callable[[], bytes]]] = {
    "empty": ("empty", lambda: b""),
    "text": ("wrong_kind", lambda: b"this is a letter, not a scan" * 100),
    "three bytes": ("header", lambda: b"\x5c\x01\x00"),
    "detached header": ("wrong_kind", lambda: nifti(magic=b"ni1")),
    "header only": ("truncated", lambda: nifti()[:352]),
    "part of the header": ("truncated", lambda: nifti()[:200]),
    "NIfTI-2, part of the header": ("truncated", lambda: nifti(version=2)[:400]),
    "one byte short": ("truncated", lambda: nifti()[:-1]),
    "no dimension": ("dims", lambda: nifti(dim=[0, 5, 4, 3, 1, 1, 1, 1])),
    "two dimensions": ("dims", lambda: nifti(dim=[2, 5, 4, 3, 1, 1, 1, 1])),
    "zero dimension": ("dims", lambda: nifti(dim=[3, 5, 0, 3, 1, 1, 1, 1])),
    "negative dimensions": ("dims", lambda: nifti(dim=[3, -5, -4, 3, 1, 1, 1, 1])),
    "time series": ("four_dimensional", lambda: nifti(np.zeros((5, 4, 3, 2), dtype=np.int16))),
    "MGH named NIfTI": ("wrong_kind", lambda: nib.MGHImage(DATA, AFFINE).to_bytes()),
    "large plane": ("too_large", lambda: nifti(dim=[3, 4096, 2048, 1, 1, 1, 1, 1])),
    "largest dimensions": ("too_large", lambda: nifti(dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])),
    "other axes by the qform": ("orientation_conflict", lambda: nifti(qform_code=1, quatern_b=np.sqrt(0.5))),
    "vector field": ("dims", lambda: nifti(np.zeros((5, 4, 3, 1, 3), dtype=np.int16))),
    "RGB": ("dtype", lambda: nifti(datatype=128)),
    "complex": ("dtype", lambda: nifti(DATA.astype(np.complex64))),
    "unknown type": ("dtype", lambda: nifti(datatype=999)),
    "too large": ("too_large", lambda: nifti(dim=[3, 5000, 5000, 5000, 1, 1, 1, 1])),
    "overflowing size": (
        "too_large",
        lambda: nifti(version=2, dim=[3, 1 << 40, 1 << 40, 1 << 40, 1, 1, 1, 1]),
    ),
    "offset inside the header": ("header", lambda: nifti(vox_offset=100)),
    "negative offset": ("header", lambda: nifti(vox_offset=-352)),
    "offset not finite": ("header", lambda: nifti(vox_offset=np.nan)),
    "offset not whole": ("header", lambda: nifti(vox_offset=352.5)),
    "offset far away": ("header", lambda: nifti(vox_offset=1e30)),
    "offset after the voxels": ("truncated", lambda: nifti(vox_offset=10_000)),
    "singular affine": ("affine", lambda: nifti(**SINGULAR)),
    "affine not finite": ("affine", lambda: nifti(srow_x=[np.nan, 0, 0, 0])),
    "impossible quaternion": ("affine", lambda: nifti(sform_code=0, qform_code=1, quatern_b=5.0)),
    "NaN": ("non_finite", lambda: nifti(_with(DATA, np.nan))),
    "infinity": ("non_finite", lambda: nifti(_with(DATA, -np.inf))),
    "beyond float32": ("non_finite", lambda: nifti(_with(DATA, 1e300))),
    "scaled beyond float32": ("non_finite", lambda: nifti(scl_slope=3e38)),
}


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
@pytest.mark.parametrize("case", BAD)
def test_bad_content(tmp_path: Path, case: str, name: str) -> None:
    code, make = BAD[case]
    if case == "empty":
        (tmp_path / name).touch()
    else:
        store(tmp_path, make(), name)
    assert code_of(tmp_path / name) == code


def test_bad_paths(tmp_path: Path) -> None:
    (tmp_path / "folder.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii.gz")
    assert code_of(tmp_path / "folder.nii") == "not_a_file"
    assert code_of(tmp_path / "pipe.nii.gz") == "not_a_file"
    assert code_of(tmp_path / "none.nii") == "missing"
    assert code_of(store(tmp_path, b"text", "notes.txt")) == "unsupported_format"
    assert code_of(tmp_path / "a\0b.nii") == "unreadable"
    assert code_of(tmp_path / ("x" * 300 + ".nii")) == "unreadable"
    assert code_of(store(tmp_path, b"", "scan.nii") / "inside.nii") == "unreadable"


@pytest.mark.parametrize("back", range(1, 9))
def test_every_trailer_byte_counts(tmp_path: Path, back: int) -> None:
    path = store(tmp_path, nifti(), "scan.nii.gz")
    content = bytearray(path.read_bytes())
    content[-back] ^= 1
    path.write_bytes(content)
    assert code_of(path) == "crc"


def test_bomb_is_not_inflated(tmp_path: Path) -> None:
    path = store(tmp_path, nifti(tail=bytes(32 * MIB)), "scan.nii.gz")
    assert path.stat().st_size < MIB
    tracemalloc.start()
    code = code_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == "too_long"
    assert peak < 4 * MIB


def test_bomb_is_not_inflated_into_slices_either(tmp_path: Path) -> None:
    """512 MiB of zeros in half a MiB: not even the resident memory of a process of its own may notice."""
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(nifti()) + 16 * gzip.compress(bytes(32 * MIB)))
    assert path.stat().st_size < MIB
    script = (
        "import resource, sys, time\n"
        "from fastflow.data.preprocess import Preprocess\n"
        "from fastflow.data.slices import read_image\n"
        "from fastflow.errors import VolumeError\n"
        "before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()\n"
        "try:\n    read_image(sys.argv[1], Preprocess((8, 8)))\n"
        "except VolumeError as error:\n    code = error.code\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(code, after - before, time.perf_counter() - start)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    ).stdout.split()
    unit = 1 if sys.platform == "darwin" else 1024
    assert told[0] == "too_long" and int(told[1]) * unit < 8 * MIB and float(told[2]) < 1


def test_zeros_that_pad_a_gzip_file_are_no_voxels(tmp_path: Path) -> None:
    path = store(tmp_path, nifti(), "scan.nii.gz")
    path.write_bytes(path.read_bytes() + bytes(512))
    np.testing.assert_array_equal(read_volume(path).data, DATA)


def test_promise_that_the_stream_does_not_keep(tmp_path: Path) -> None:
    content = nifti(dim=[3, 400, 400, 400, 1, 1, 1, 1])
    assert code_of(store(tmp_path, content, "scan.nii.gz"), max_voxels=512**3) == "truncated"
    tracemalloc.start()
    code = code_of(store(tmp_path, content, "scan.nii"), max_voxels=512**3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code == "truncated"
    assert peak < 4 * MIB


def test_error_says_what_and_where_and_survives_pickling(tmp_path: Path) -> None:
    error = outcome(store(tmp_path, nifti(dim=[3, 50, 50, 50, 1, 1, 1, 1])))
    assert isinstance(error, FastflowError) and isinstance(error, ValueError)
    assert "125000" in str(error) and "1000" in str(error) and str(tmp_path) in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.path, again.code, str(again)) == (
        VolumeError,
        error.path,
        error.code,
        str(error),
    )


# -- anything ------------------------------------------------------------------------------------------------


@fuzz
@given(where=st.floats(0, 1, exclude_max=True), name=st.sampled_from(["scan.nii", "scan.nii.gz"]))
def test_truncated_anywhere(tmp_path: Path, where: float, name: str) -> None:
    path = store(tmp_path, nifti(), name)
    content = path.read_bytes()
    path.write_bytes(content[: int(where * len(content))])
    # One byte is not enough to tell gzip from anything else.
    assert code_of(path) in ("empty", "header", "truncated") or path.stat().st_size == 1


@fuzz
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_flipped_bit_of_a_gzip_stream_changes_voxels(tmp_path: Path, where: float, bit: int) -> None:
    path = store(tmp_path, nifti(), "scan.nii.gz")
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    path.write_bytes(content)
    result = outcome(path)
    # A flip in the stream's date or operating system is harmless.
    if isinstance(result, Volume):
        np.testing.assert_array_equal(result.data, DATA)
        np.testing.assert_allclose(result.affine, AFFINE)


@fuzz
@given(
    changes=st.dictionaries(st.integers(0, 539), st.integers(0, 255), min_size=1, max_size=8),
    version=st.sampled_from([1, 2]),
    order=st.sampled_from("<>"),
    name=st.sampled_from(["scan.nii", "scan.nii.gz"]),
)
def test_changed_header_bytes(
    tmp_path: Path, changes: dict[int, int], version: int, order: str, name: str
) -> None:
    content = bytearray(nifti(version=version, order=order))
    for position, value in changes.items():
        content[position % (348 if version == 1 else 540)] = value
    _read_within_limits(store(tmp_path, bytes(content), name))


@fuzz
@given(st.data())
def test_arbitrary_header(tmp_path: Path, data: st.DataObject) -> None:
    version, order = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from("<>"))
    model = {1: nib.Nifti1Header, 2: nib.Nifti2Header}[version](endianness=order)
    fields: dict[str, Any] = {}
    names = ["pixdim", "srow_x", "srow_y", "srow_z", "quatern_b", "scl_slope", "scl_inter"]
    for name in data.draw(st.sets(st.sampled_from(names))):
        item = model.structarr[name]
        floats = st.floats(width=item.dtype.itemsize * 8)
        fields[name] = data.draw(
            st.lists(floats, min_size=item.size, max_size=item.size) if item.size > 1 else floats
        )
    if data.draw(st.booleans()):
        fields["sform_code"], fields["qform_code"] = data.draw(
            st.sampled_from([(0, 0), (0, 1), (1, 0), (5, 5)])
        )
    _read_within_limits(store(tmp_path, nifti(version=version, order=order, **fields)))


def _read_within_limits(path: Path) -> None:
    tracemalloc.start()
    try:
        outcome(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB


def test_warnings_do_not_leak(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    outcome(store(tmp_path, nifti(version=2, srow_x=[1e200, 0, 0, 0])))
    outcome(store(tmp_path, nifti(_with(DATA, 1e300))))
    assert [str(w.message) for w in recwarn] == []
