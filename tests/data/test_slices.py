# Over budget: the tests of decoding share the builders of scans.
from __future__ import annotations

import dataclasses
import gzip
import importlib
import itertools
import os
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastflow.data import _gzip, _intensity, volume
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess, pad_evenly
from fastflow.data.slices import SliceSet, coronal_slices, iterate_images, load_image, load_slices, read_image
from fastflow.data.volume import ERROR_CODES, read_volume
from fastflow.errors import VolumeError

NAMES = ("old", "young")
PREPROCESS = Preprocess((8, 10), "center+-1")
GREY = (np.arange(42, dtype=np.uint8) * 6).reshape(6, 7)


def scan(folder: Path, number: int) -> Path:
    """A volume whose voxels tell which one it is."""
    data = np.random.default_rng(number).integers(0, 1000, (6, 9, 5)).astype(np.int16)
    path = folder / f"sub-{number:02}_T1w.nii.gz"
    nib.save(nib.Nifti1Image(data, np.diag([2.0, 2.0, 2.0, 1.0])), path)
    return path


def records(paths: list[Path]) -> list[Record]:
    return [Record(str(path), NAMES[i % 2], path.name.split("_")[0]) for i, path in enumerate(paths)]


def slice_set(volumes: list[int], labels: list[int], count: int) -> SliceSet:
    """A set whose images are filled with the number of the slice."""
    images = np.broadcast_to(
        np.arange(len(volumes), dtype=np.uint8)[:, None, None, None], (len(volumes), 1, 2, 3)
    )
    names = tuple(f"sub-{i}" for i in range(count))
    return SliceSet(
        images, np.array(labels), np.array(volumes), tuple(f"{n}.nii" for n in names), names, NAMES
    )


# -- orientation ---------------------------------------------------------------------------------------------


def test_coronal_slices_are_as_one_looks_at_them() -> None:
    data = np.zeros((4, 5, 3), dtype=np.uint8)
    data[0] += 1  # left
    data[:, 3] += 2  # towards the front
    data[:, :, 2] += 4  # top
    left_out, front = coronal_slices(data, [0, 3])
    assert left_out.shape == (3, 4)
    np.testing.assert_array_equal(left_out, [[5, 4, 4, 4], [1, 0, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(front, left_out + 2)


@given(st.tuples(*[st.integers(1, 6)] * 3), st.data())
def test_every_voxel_of_a_slice(shape: tuple[int, int, int], data: st.DataObject) -> None:
    voxels = np.arange(np.prod(shape)).reshape(shape)
    indices = data.draw(st.lists(st.integers(0, shape[1] - 1), min_size=1, max_size=4))
    slices = coronal_slices(voxels, indices)
    assert slices.shape == (len(indices), shape[2], shape[0])
    for n, y in enumerate(indices):
        for row in range(shape[2]):
            np.testing.assert_array_equal(slices[n, row], voxels[:, y, shape[2] - 1 - row])


# -- sets ----------------------------------------------------------------------------------------------------


def test_subset_keeps_the_order_asked_for() -> None:
    whole = slice_set([0, 0, 1, 2, 2], [1, 1, -1, 0, 0], 4)
    part = whole.subset([2, 3, 0])
    assert part.images[:, 0, 0, 0].tolist() == [3, 4, 0, 1]
    assert part.labels.tolist() == [0, 0, 1, 1]
    assert part.volumes.tolist() == [0, 0, 2, 2]
    assert part.paths == ("sub-2.nii", "sub-3.nii", "sub-0.nii")
    assert part.subjects == ("sub-2", "sub-3", "sub-0")
    assert part.class_names == NAMES
    assert part.volume_labels.tolist() == [0, -1, 1]
    assert whole.subset(np.array([0, 1, 2, 3])).images.tolist() == whole.images.tolist()


def test_empty_subset() -> None:
    part = slice_set([0, 1], [0, 1], 2).subset([])
    assert len(part) == 0
    assert part.images.shape == (0, 1, 2, 3)
    assert part.volume_labels.shape == (0,)


@pytest.mark.parametrize("volumes", [[0, 0], [2], [-1]])
def test_subset_of_what_is_not_there(volumes: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^volumes must be different numbers from 0 to 1, got"):
        slice_set([0, 1], [0, 1], 2).subset(volumes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", np.zeros((2, 3, 4), dtype=np.uint8)),
        ("images", np.zeros((2, 3, 2, 3), dtype=np.uint8)),
        ("images", np.zeros((2, 1, 2, 3), dtype=np.float32)),
        ("labels", np.array([0])),
        ("labels", np.array([0, -2])),
        ("labels", np.array([0.0, 1.0])),
        ("volumes", np.array([0, 2])),
        ("volumes", np.array([-1, 0])),
        ("volumes", np.array([[0], [1]])),
        ("subjects", ("sub-0",)),
    ],
)
def test_inconsistent_set(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(slice_set([0, 1], [0, 1], 2), **{field: value})


# -- PNG -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_png_is_padded_and_otherwise_left_alone(tmp_path: Path, mode: str) -> None:
    Image.fromarray(GREY).convert(mode).save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"), PREPROCESS)
    assert image.shape == (1, 1, 8, 10) and image.dtype == np.uint8
    np.testing.assert_array_equal(image[0, 0, 1:7, 1:8], GREY)
    assert image.sum(dtype=int) == GREY.sum(dtype=int)


def _code(path: Path) -> str:
    with pytest.raises(VolumeError) as caught:
        load_image(str(path), PREPROCESS)
    assert caught.value.code in ERROR_CODES
    assert caught.value.path == str(path)
    return caught.value.code


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "I;16"])
def test_png_that_is_not_8_bit_grey(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(GREY.astype(np.uint16)) if mode == "I;16" else Image.fromarray(GREY).convert(mode)
    image.save(tmp_path / "a.png")
    assert _code(tmp_path / "a.png") == "image"


def test_coloured_png(tmp_path: Path) -> None:
    pixels = np.stack([GREY] * 3, axis=-1)
    pixels[3, 3, 1] ^= 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert _code(tmp_path / "a.png") == "image"


def test_png_files_that_cannot_be_used(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((9, 10), dtype=np.uint8)).save(tmp_path / "high.png")
    Image.fromarray(GREY).save(tmp_path / "photo.png", format="JPEG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    expected = {
        "high": "size",
        "photo": "wrong_kind",
        "empty": "empty",
        "text": "wrong_kind",
        "folder": "not_a_file",
        "none": "missing",
    }
    assert {name: _code(tmp_path / f"{name}.png") for name in expected} == expected
    assert _code(tmp_path / "pipe.png") == "not_a_file"


def test_huge_png_is_refused_unread(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    for side, code in ((5_000, "size"), (1 << 30, "image")):
        header = b"IHDR" + struct.pack(">II", side, side) + content[24:29]
        (tmp_path / "a.png").write_bytes(
            content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
        )
        tracemalloc.start()
        assert _code(tmp_path / "a.png") == code
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@settings(max_examples=70, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_damaged_png_is_noticed(tmp_path: Path, where: float, bit: int, cut: bool) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(GREY).save(path)
    content = bytearray(path.read_bytes())
    position = int(where * len(content))
    if cut:
        del content[position:]
    else:
        content[position] ^= 1 << bit
    path.write_bytes(content)
    try:
        image = load_image(str(path), PREPROCESS)
    except VolumeError as error:
        code = error.code
    else:
        # Nothing that is left can have changed a pixel.
        np.testing.assert_array_equal(image[0, 0, 1:7, 1:8], GREY)
        return
    assert code in ERROR_CODES


# -- streams -------------------------------------------------------------------------------------------------

AFFINE = np.diag([2.0, 2.0, 2.0, 1.0])
AXES = [
    (order, flips)
    for order in itertools.permutations(range(3))
    for flips in itertools.product((1, -1), repeat=3)
]
FORMATS = ("scan.nii", "scan.nii.gz", "scan.mgz", "scan.mgh")
# Two formats for each orientation: axes are treated alike in all of them.
AXES_IN_FORMATS = [
    (order, flips, FORMATS[(number + number // 8 + shift) % 4])
    for number, (order, flips) in enumerate(AXES)
    for shift in (0, 1)
]
DTYPES = ("u1", "i1", "<i2", ">u2", "i4", ">u4", "<i8", ">u8", "<f4", ">f4", "<f8", ">f8")
SCALINGS = ((1, 0), (0, 0), (0.37, -20.0), (-0.5, 60.0), (-2, 0), (1e-30, 0), (3, 1e6), (2.0, -255.0))
# Files with and without compression by turns.
STORED = [
    (dtype, scaling, FORMATS[(i + j) % 2])
    for i, dtype in enumerate(DTYPES)
    for j, scaling in enumerate(SCALINGS)
]
WIDE = Preprocess((16, 16), "center+-1")


def whole(path: Path, preprocess: Preprocess) -> np.ndarray:
    return preprocess(read_volume(path))


@pytest.mark.parametrize(("order", "flips", "name"), AXES_IN_FORMATS)
def test_slices_of_all_orientations_as_nibabel_does(
    tmp_path: Path, order: tuple[int, ...], flips: tuple[int, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks of few planes, the last one smaller.
    monkeypatch.setattr(volume, "_CHUNK_BYTES", 200)
    affine = np.eye(4)
    affine[:3, :3] = np.diag([2.0, 2.0, 2.0])[:, order] * flips
    affine[:3, 3] = (-5, 6, 7)
    data = np.random.default_rng(0).integers(0, 256, (6, 7, 9)).astype(np.int16)
    image = (nib.MGHImage if "mg" in name else nib.Nifti1Image)(data, affine)
    nib.save(image, tmp_path / name)
    canonical = np.asarray(nib.as_closest_canonical(image).dataobj)
    fixed = Preprocess((9, 9), "center+-2", scaling="fixed")
    loaded = read_image(str(tmp_path / name), fixed)
    centre = canonical.shape[1] // 2
    expected = coronal_slices(canonical, range(centre - 2, centre + 3))
    np.testing.assert_array_equal(loaded.images[:, 0], pad_evenly(expected.astype(np.uint8), (9, 9)))
    assert loaded.flags == ()
    np.testing.assert_array_equal(
        read_image(str(tmp_path / name), PREPROCESS_9).images, whole(tmp_path / name, PREPROCESS_9)
    )


PREPROCESS_9 = Preprocess((9, 9), "3,1,1,5")


@pytest.mark.parametrize(("dtype", "scaling", "name"), STORED)
def test_streamed_percentile_is_that_of_the_whole_volume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, scaling: tuple[float, float], name: str
) -> None:
    monkeypatch.setattr(volume, "_CHUNK_BYTES", 1500)
    monkeypatch.setattr(_intensity, "_MAX_PENDING", 40)
    rng = np.random.default_rng(int(1000 * abs(scaling[0])) % 97)
    data = (rng.gamma(2.0, 18.0, (14, 15, 13)) * (rng.random((14, 15, 13)) < 0.7)).clip(0, 127)
    if dtype[-2] != "u":
        data[:, :2] *= -1
    content = store_nifti(data.astype(dtype), scaling)
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith("z") else content)
    try:
        expected = whole(tmp_path / name, WIDE)
    except VolumeError as error:
        code = error.code
        with pytest.raises(VolumeError, match=rf"\[{code}\]"):
            read_image(str(tmp_path / name), WIDE)
        # Other intercepts than 0 can make all voxels of the slices black, or all white.
        assert code == "constant" or (code == "blank" and scaling[1] != 0) or scaling[0] < 0
        return
    loaded = read_image(str(tmp_path / name), WIDE)
    np.testing.assert_array_equal(loaded.images, expected)
    values = read_volume(tmp_path / name).data.astype(np.float64)
    assert loaded.negative == (values < 0).mean()
    top = np.percentile(values[values > 0], 99.9)
    plain = np.clip(np.rint(coronal_slices(values, [6, 7, 8]) * (255.0 / top)), 0, 255)
    assert np.abs(expected[:, 0, 1:14, 1:15] - plain).max() <= 1


def store_nifti(data: np.ndarray, scaling: tuple[float, float] = (1, 0)) -> bytes:
    header = nib.Nifti1Header(endianness=">" if data.dtype.byteorder == ">" else "<")
    header.set_data_dtype(data.dtype.newbyteorder("="))
    header.set_data_shape(data.shape)
    header.set_sform(AFFINE, code=1)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = *scaling, 352
    return header.binaryblock + bytes(4) + data.tobytes(order="F")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_a_single_voxel_that_is_not_finite(tmp_path: Path, name: str) -> None:
    for value, dtype in ((np.nan, "<f4"), (np.inf, "<f8"), (-np.inf, ">f4"), (1e300, "<f8")):
        data = np.random.default_rng(0).random((6, 9, 5)).astype(dtype)
        data[0, 0, -1] = value
        content = store_nifti(data)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("z") else content)
        for scaling in ("percentile", "fixed"):
            preprocess = Preprocess((8, 10), scaling=scaling)
            with pytest.raises(VolumeError, match=r"1 voxels are NaN or infinite \[non_finite\]"):
                read_image(str(tmp_path / name), preprocess)


def test_integers_that_scale_beyond_float32(tmp_path: Path) -> None:
    data = np.zeros((6, 9, 5), dtype=np.int16)
    data[1] = 5
    (tmp_path / "scan.nii").write_bytes(store_nifti(data, (3e38, 0)))
    with pytest.raises(VolumeError, match=r"45 voxels are NaN or infinite"):
        read_image(str(tmp_path / "scan.nii"), WIDE)
    (tmp_path / "scan.nii").write_bytes(store_nifti(data // 5, (3e38, 0)))
    assert read_image(str(tmp_path / "scan.nii"), WIDE).images.max() == 255


@pytest.mark.parametrize("value", [0, 7, -3])
def test_a_constant_volume_has_no_contrast(tmp_path: Path, value: int) -> None:
    for dtype, slope in itertools.product(("<i2", ">f4"), (1.0, -1.0)):
        (tmp_path / "scan.nii").write_bytes(store_nifti(np.full((6, 9, 5), value, dtype=dtype), (slope, 0.0)))
        with pytest.raises(VolumeError, match=r"\[constant\]"):
            read_image(str(tmp_path / "scan.nii"), WIDE)
        fixed = dataclasses.replace(WIDE, scaling="fixed")
        with pytest.raises(VolumeError, match=r"slice 3 along the anterior axis is blank.*\[blank\]"):
            read_image(str(tmp_path / "scan.nii"), fixed)


def test_flags_come_with_images(tmp_path: Path) -> None:
    content = bytearray(store_nifti(np.arange(270, dtype=np.int16).reshape(6, 9, 5)))
    # sform_code
    content[254:256] = bytes(2)
    (tmp_path / "scan.nii").write_bytes(content)
    assert [flag.code for flag in read_image(str(tmp_path / "scan.nii"), WIDE).flags] == ["no_orientation"]


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_streaming_takes_little_memory(tmp_path: Path, name: str) -> None:
    plane = np.random.default_rng(0).integers(0, 1000, (256, 256)).astype("<i2")
    header = nib.Nifti1Header()
    header.set_data_shape((256, 256, 128))
    header.set_data_dtype(np.int16)
    header.set_sform(AFFINE, code=1)
    header["vox_offset"] = 352
    with gzip.open(tmp_path / name, "wb", 1) if name.endswith("z") else open(tmp_path / name, "wb") as stream:
        stream.write(header.binaryblock + bytes(4))
        # Ever brighter: the largest values come last, and every chunk has some.
        for z in range(128):
            stream.write((plane + 4 * z).tobytes())
    preprocess = Preprocess((256, 256))
    tracemalloc.start()
    images = read_image(str(tmp_path / name), preprocess).images
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert images.shape == (1, 1, 256, 256)
    # The volume takes 16 MiB.
    assert peak < 5 << 20


def test_zlib_where_isal_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = scan(tmp_path, 1)
    expected = read_image(str(path), PREPROCESS).images
    monkeypatch.setitem(sys.modules, "isal", None)
    try:
        importlib.reload(_gzip)
        assert _gzip.GzipFile is gzip.GzipFile
        np.testing.assert_array_equal(read_image(str(path), PREPROCESS).images, expected)
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        with pytest.raises(VolumeError, match=r"\[crc\]"):
            read_image(str(path), PREPROCESS)
    finally:
        monkeypatch.undo()
        importlib.reload(_gzip)


def test_what_the_header_rules_out_is_not_read(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 1000, (40, 41, 42)).astype(np.int16)
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(store_nifti(data))[:-20])
    fits = Preprocess((42, 40))
    for changes, code in (
        ({}, "truncated"),
        ({"grid": (40, 41, 43)}, "grid_mismatch"),
        ({"spacing": (1.0, 1.0, 1.0)}, "grid_mismatch"),
        ({"slices": "41"}, "slice_range"),
        ({"size": (41, 40)}, "size"),
    ):
        with pytest.raises(VolumeError, match=rf"\[{code}\]"):
            read_image(str(path), dataclasses.replace(fits, **changes))


# -- many files ----------------------------------------------------------------------------------------------


def test_volumes_and_images_of_different_labels(tmp_path: Path) -> None:
    Image.fromarray(GREY).save(tmp_path / "sub-09_slice.png")
    paths = [scan(tmp_path, 1), tmp_path / "sub-09_slice.png", scan(tmp_path, 2)]
    given = [*records(paths)[:2], Record(str(paths[2]), None, "sub-02")]
    slices, errors = load_slices(given, PREPROCESS, NAMES)
    assert errors == []
    assert slices.images.shape == (7, 1, 8, 10)
    assert slices.labels.tolist() == [0, 0, 0, 1, -1, -1, -1]
    assert slices.volumes.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert slices.volume_labels.tolist() == [0, 1, -1]
    assert slices.paths == tuple(map(str, paths))
    assert slices.subjects == ("sub-01", "sub-09", "sub-02")
    np.testing.assert_array_equal(slices.images[4:], load_image(str(paths[2]), PREPROCESS))


def test_a_bad_file_stops_nothing(tmp_path: Path) -> None:
    paths = [scan(tmp_path, number) for number in range(4)]
    paths[1].write_bytes(paths[1].read_bytes()[:-20])
    paths[2] = tmp_path / "none.nii.gz"
    slices, errors = load_slices(records(paths), PREPROCESS, NAMES)
    assert [(error.path, error.code) for error in errors] == [
        (str(paths[1]), "truncated"),
        (str(paths[2]), "missing"),
    ]
    assert slices.paths == (str(paths[0]), str(paths[3]))
    assert slices.volumes.tolist() == [0, 0, 0, 1, 1, 1]
    assert slices.labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (RuntimeError("a bug"), "unreadable", "RuntimeError: a bug"),
        (MemoryError("none left"), "too_large", "more memory"),
    ],
)
def test_an_exception_that_nobody_expected_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, code: str, message: str
) -> None:
    paths = [scan(tmp_path, number) for number in range(2)]
    decompress = gzip.GzipFile.read

    def read(self: gzip.GzipFile, size: int = -1) -> bytes:
        if self.name.endswith("sub-00_T1w.nii.gz"):
            raise failure
        return decompress(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    slices, errors = load_slices(records(paths), PREPROCESS, NAMES)
    assert [error.code for error in errors] == [code]
    assert message in str(errors[0])
    assert slices.paths == (str(paths[1]),)


@pytest.mark.parametrize("paths", [[], ["a.nii", "b.png"]])
def test_nothing_to_read(paths: list[str]) -> None:
    slices, errors = load_slices([Record(path, "old", path) for path in paths], PREPROCESS, NAMES)
    assert len(slices) == 0
    assert slices.images.shape == (0, 1, 8, 10)
    assert [error.code for error in errors] == ["missing"] * len(paths)


def test_unknown_label_is_named() -> None:
    with pytest.raises(ValueError, match=r"a\.nii has label 'middle', which is none of old, young"):
        load_slices([Record("a.nii", "middle", "a")], PREPROCESS, NAMES)


def test_workers_change_nothing(tmp_path: Path) -> None:
    paths = [scan(tmp_path, number) for number in range(9)]
    paths[3].write_bytes(b"broken")
    paths[7] = tmp_path / "none.png"
    serial_progress: list[int] = []
    parallel_progress: list[int] = []
    serial, serial_errors = load_slices(records(paths), PREPROCESS, NAMES, 1, serial_progress.append)
    parallel, parallel_errors = load_slices(records(paths), PREPROCESS, NAMES, 2, parallel_progress.append)
    for field in ("images", "labels", "volumes"):
        np.testing.assert_array_equal(getattr(parallel, field), getattr(serial, field))
    assert (parallel.paths, parallel.subjects) == (serial.paths, serial.subjects)
    assert [(e.path, e.code, str(e)) for e in parallel_errors] == [
        (e.path, e.code, str(e)) for e in serial_errors
    ]
    assert [e.code for e in serial_errors] == ["wrong_kind", "missing"]
    assert serial_progress == parallel_progress == list(range(1, 10))


def test_images_come_one_by_one(tmp_path: Path) -> None:
    results = iterate_images([str(scan(tmp_path, 1)), "none.nii"], PREPROCESS)
    first = next(results)
    assert isinstance(first, np.ndarray) and first.shape == (3, 1, 8, 10)
    second = next(results)
    assert isinstance(second, VolumeError) and second.code == "missing"
    # A traceback would keep the file's buffers.
    assert second.__traceback__ is None and second.__context__ is None
