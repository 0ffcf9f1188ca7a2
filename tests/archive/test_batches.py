from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fastflow.archive.batches import ScoredInput, Timings, score_batches, slices_per_volume, slots_of, timed
from fastflow.archive.decode import Decoded
from fastflow.archive.inputs import Item
from fastflow.data.preprocess import Preprocess
from fastflow.errors import VolumeError
from tests.archive.quick import MatrixScorer

PREPROCESS = Preprocess((16, 16), "center+-1", (2.0, 2.0, 2.0), (14, 9, 15))


class Noted(MatrixScorer):
    def __init__(self, needs_full_batches: bool = True) -> None:
        self.needs_full_batches = needs_full_batches
        self.seen: list[np.ndarray] = []

    def score(self, images: np.ndarray) -> np.ndarray:
        self.seen.append(images)
        return super().score(images)


def decoded(name: str, seed: int | None = None) -> Decoded:
    """An input with random slices; one that cannot be read without a seed."""
    item = Item(name, name)
    if seed is None:
        return Decoded(item, 7, 8, VolumeError(name, "crc", "is damaged"), seconds=0.5)
    count = slots_of(item, slices_per_volume(PREPROCESS))
    images = np.random.default_rng(seed).integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)
    return Decoded(item, 7, 8, images, (("code", "doubt"),), 0.5)


def score(inputs: list[Decoded], batch_size: int, scorer: Noted) -> tuple[list[list[ScoredInput]], Timings]:
    timings = Timings()
    return list(score_batches(scorer, inputs, PREPROCESS, batch_size, timings)), timings


def test_slices_of_an_input_stay_together_and_batches_are_full() -> None:
    inputs = [
        decoded("a.nii", 0),
        decoded("b.PNG", 1),
        decoded("c.nii"),
        decoded("d.nii", 2),
        decoded("e.nii", 3),
    ]
    scorer = Noted()
    batches, timings = score(inputs, 7, scorer)
    assert [[one.item.name for one in batch] for batch in batches] == [
        ["a.nii", "b.PNG", "c.nii"],
        ["d.nii", "e.nii"],
    ]
    assert [len(images) for images in scorer.seen] == [7, 7]
    # The places of a file that cannot be read, and those that are left over, stay empty.
    assert not scorer.seen[0][4:].any() and not scorer.seen[1][6:].any()
    for one, given in zip((one for batch in batches for one in batch), inputs, strict=True):
        assert (one.item, one.size, one.mtime_ns, one.flags) == (given.item, 7, 8, given.flags)
        if isinstance(given.result, VolumeError):
            assert one.result is given.result
            assert one.seconds == 0.5
        else:
            assert (one.result == MatrixScorer().score(given.result)).all()
            assert one.seconds > 0.5
    assert timings.scoring > 0 == timings.reading


def test_images_that_depend_on_no_other_need_no_full_batch() -> None:
    scorer = Noted(needs_full_batches=False)
    score([decoded("a.nii", 0), decoded("b.nii", 1), decoded("c.png", 2)], 16, scorer)
    assert [len(images) for images in scorer.seen] == [7]


def test_an_input_of_more_slices_than_a_batch_is_a_batch() -> None:
    scorer = Noted()
    batches, _ = score([decoded("a.nii", 0), decoded("b.nii", 1)], 2, scorer)
    assert [len(batch) for batch in batches] == [1, 1]
    assert [len(images) for images in scorer.seen] == [3, 3]


def test_nothing_is_scored_where_nothing_could_be_read() -> None:
    scorer = Noted()
    (batch,), _ = score([decoded("a.nii"), decoded("b.nii")], 16, scorer)
    assert [one.result.code for one in batch if isinstance(one.result, VolumeError)] == ["crc", "crc"]
    assert scorer.seen == []


def test_waiting_and_reading_are_timed() -> None:
    def inputs() -> Iterator[Decoded]:
        yield decoded("a.nii", 0)
        yield decoded("b.nii")

    timings = Timings()
    assert [one.item.name for one in timed(inputs(), timings)] == ["a.nii", "b.nii"]
    assert timings.reading == pytest.approx(1.0)
    assert timings.waiting > 0
