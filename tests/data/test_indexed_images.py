from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastflow.data.indexed_images import IndexedImages, select_rows
from fastflow.data.slices import SliceSet
from fastflow.evaluation.classification import volume_histograms
from fastflow.training.batches import iterate_batches
from fastflow.training.config import TrainConfig
from fastflow.training.metrics import middle_slices

ARRAY = np.random.default_rng(0).integers(0, 256, (9, 1, 3, 4), dtype=np.uint8)


def scattered() -> IndexedImages:
    """The rows of `ARRAY`, which lie in three arrays in another order."""
    order = np.random.default_rng(1).permutation(9)
    parts = [ARRAY[order[:4]], ARRAY[order[4:4]], ARRAY[order[4:]]]
    place = np.argsort(order)
    return IndexedImages(parts, np.where(place < 4, 0, 2), np.where(place < 4, place, place - 4))


KEYS: list[Any] = [
    0,
    np.int64(-1),
    slice(2, 7),
    slice(None, None, -2),
    slice(4, 4),
    [3, 3, 0],
    np.array([8, -2]),
    np.zeros(0, dtype=np.int64),
    np.arange(9) % 2 == 0,
    np.array([[0, 1], [5, 2]]),
    (slice(1, 5), 0),
    (np.array([1, 6]), 0),
    (3, 0, slice(1, 3)),
    (..., 0),
    (slice(None), 0, 2),
    (),
    None,
]


@pytest.mark.parametrize("key", KEYS, ids=repr)
def test_it_is_indexed_like_an_array(key: Any) -> None:
    found = scattered()[key]
    assert type(found) is np.ndarray
    np.testing.assert_array_equal(found, ARRAY[key])
    assert found.shape == ARRAY[key].shape
    assert not found.size or found.flags.writeable


def test_it_stands_where_an_array_does() -> None:
    images = scattered()
    assert (images.shape, images.ndim, images.dtype) == (ARRAY.shape, 4, ARRAY.dtype)
    assert (len(images), images.size, images.nbytes) == (9, ARRAY.size, ARRAY.nbytes)
    np.testing.assert_array_equal(np.asarray(images), ARRAY)
    np.testing.assert_array_equal(np.asarray(images, dtype=np.float32), ARRAY)
    np.testing.assert_array_equal(np.stack(list(images)), ARRAY)
    with pytest.raises(IndexError):
        images[9]
    with pytest.raises(ValueError, match="without a copy"):
        np.array(images, copy=False)


@given(st.lists(st.integers(-9, 8)), st.data())
def test_selections_of_selections(rows: list[int], data: st.DataObject) -> None:
    chosen = scattered().select(np.array(rows, dtype=np.int64))
    np.testing.assert_array_equal(chosen, ARRAY[rows] if rows else ARRAY[:0])
    if rows:
        again = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
        np.testing.assert_array_equal(chosen.select(np.array(again)), ARRAY[rows][again])


def test_rows_of_a_file_stay_on_disk_and_rows_of_an_array_are_one(tmp_path: Path) -> None:
    ARRAY.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", dtype=np.uint8, mode="r", shape=ARRAY.shape)
    rows = np.array([2, 0, 8])
    for images in (mapped, scattered()):
        found = select_rows(images, rows)
        assert isinstance(found, IndexedImages)
        np.testing.assert_array_equal(found, ARRAY[rows])
    assert type(select_rows(ARRAY, rows)) is np.ndarray
    np.testing.assert_array_equal(select_rows(ARRAY, rows), ARRAY[rows])
    assert len(select_rows(mapped, np.arange(9) > 6)) == 2


def test_another_process_maps_the_same_file(tmp_path: Path) -> None:
    many = np.tile(ARRAY, (100, 1, 1, 1))
    many.tofile(tmp_path / "images")
    mapped = np.memmap(tmp_path / "images", dtype=np.uint8, mode="r", shape=many.shape)
    rows = np.arange(5)
    images = IndexedImages((mapped, ARRAY), rows % 2, rows)
    content = pickle.dumps(images)
    assert len(content) < many.nbytes / 5
    np.testing.assert_array_equal(pickle.loads(content), images)
    # A file that was removed is only known to the process that has it open, which then sends the images.
    (tmp_path / "images").unlink()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(images)), images)
    with pytest.raises(FileNotFoundError, match="images"):
        pickle.loads(content)


@pytest.mark.parametrize(
    ("parts", "part", "row", "message"),
    [
        ([], [], [], "one image shape and dtype, got none"),
        ([ARRAY, ARRAY[..., :2]], [0], [0], "one image shape and dtype"),
        ([ARRAY, ARRAY.astype(float)], [0], [0], "one image shape and dtype"),
        ([ARRAY], [0, 0], [0], r"must be \(N,\), got \(2,\) and \(1,\)"),
        ([ARRAY], [1], [0], "name rows of 1 arrays"),
        ([ARRAY], [0], [9], "name rows of 1 arrays"),
        ([ARRAY], [0], [-1], "name rows of 1 arrays"),
    ],
)
def test_what_does_not_fit_is_named(parts: Any, part: Any, row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexedImages(parts, np.array(part), np.array(row))


def test_sets_are_used_without_copies_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    volumes, names = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2]), ("a", "b", "c")
    plain, lazy = (
        SliceSet(images, np.zeros(9, dtype=np.int64), volumes, names, names, ("x",))
        for images in (ARRAY, scattered())
    )
    copied, copy = [], IndexedImages._copy
    monkeypatch.setattr(
        IndexedImages, "_copy", lambda self, part, row: copied.append(np.size(row)) or copy(self, part, row)
    )
    np.testing.assert_array_equal(volume_histograms(lazy), volume_histograms(plain))
    chosen, expected = (data.subset([2, 0]) for data in (lazy, plain))
    middle, labels = middle_slices(chosen)
    config = TrainConfig(batch_size=3, sampler="shuffle")
    batches, same = (
        list(iterate_batches(data, 3, config, torch.Generator().manual_seed(0))) for data in (lazy, plain)
    )
    assert copied == [3, 3, 3] and len(labels) == 2
    for (images, _), (wanted, _) in zip(batches, same, strict=True):
        assert torch.equal(images, wanted)
    np.testing.assert_array_equal(chosen.images, expected.images)
    np.testing.assert_array_equal(middle, middle_slices(expected)[0])
