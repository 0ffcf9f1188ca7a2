from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from fastflow.data.slices import SliceSet
from fastflow.data.statistics import measure
from fastflow.data.training_images import UNLIKE_TRAINING, TrainingImages, training_images, widened

SLICES = "center+-1"


def head(seed: int, size: int = 40) -> np.ndarray:
    """Three slices of a bright oval with a darker inner part, noise everywhere, (3, size, size)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    radius = np.hypot(x / rng.uniform(0.6, 0.7), (y - 0.1) / rng.uniform(0.75, 0.85))
    image = np.where(radius < 1, rng.uniform(150, 180), 0.0) - 70.0 * (radius < 0.5) * (y > 0)
    slices = np.hypot(image + rng.normal(0, 6, (3, size, size)), rng.normal(0, 6, (3, size, size)))
    return np.asarray(slices.clip(0, 255).astype(np.uint8))


def trained(count: int = 40) -> TrainingImages:
    measured = np.concatenate([measure(head(seed), 0.0) for seed in range(count)])
    images = TrainingImages.of(measured, np.repeat(np.arange(count), 3), SLICES)
    assert images is not None
    return images


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    return trained()


def flags(images: TrainingImages, pixels: np.ndarray, negative: float | None = 0.0) -> list[tuple[str, str]]:
    return list(images.flags(measure(pixels, negative), "scan.nii", SLICES))


def test_images_like_those_of_training_are_not_flagged(images: TrainingImages) -> None:
    assert sum(bool(flags(images, head(seed))) for seed in range(1000, 1100)) <= 1


DISTORTED = {
    "inverted": lambda image: 255 - image,
    "offset": lambda image: 128 + image // 2,
    "mask": lambda image: np.where(image > 60, 255, 0),
    "blurred": lambda image: ndimage.gaussian_filter(image.astype(float), (0, 1, 1)),
    "downsampled": lambda image: image[:, ::2, ::2].repeat(2, axis=1).repeat(2, axis=2),
    "rotated": lambda image: np.rot90(image, 1, (1, 2)),
    "upside_down": lambda image: image[:, ::-1],
    "half": lambda image: image * (np.arange(image.shape[2]) >= image.shape[2] // 2),
    "noise": lambda image: image + np.random.default_rng(0).normal(0, 25, image.shape),
    "one_slice_white": lambda image: np.concatenate([image[:2], 255 - image[2:]]),
    "empty": lambda image: np.zeros_like(image),
}


@pytest.mark.parametrize("name", DISTORTED)
def test_images_unlike_those_of_training_are_flagged(images: TrainingImages, name: str) -> None:
    for seed in range(1000, 1010):
        pixels = np.clip(DISTORTED[name](head(seed)), 0, 255).astype(np.uint8)
        assert [code for code, _ in flags(images, pixels)] == [UNLIKE_TRAINING]


def test_a_message_names_number_value_and_range(images: TrainingImages) -> None:
    ((_, message),) = flags(images, head(7), 0.14)
    assert message == "unlike the training images: share of voxels below 0 14 % (training 0 %)"
    ((_, message),) = flags(images, 255 - head(7))
    assert "grey level of the border" in message and message.count("(training") == 3 and " more" in message


def test_a_background_that_is_not_black_in_training_is_none_to_flag() -> None:
    bright = np.concatenate([measure(255 - head(seed), 0.3 + 0.01 * seed) for seed in range(20)])
    images = TrainingImages.of(bright, np.repeat(np.arange(20), 3), SLICES)
    assert images is not None
    assert flags(images, 255 - head(100), 0.4) == []
    assert flags(images, head(100), 0.4) != []
    assert flags(images, 255 - head(100), 0.0) != []


def test_png_files_are_compared_and_other_slices_only_by_their_voxels(images: TrainingImages) -> None:
    good, bad = measure(head(50)[:1], None), measure(255 - head(50)[:1], None)
    assert images.flags(good, "a.png", SLICES) == ()
    assert images.flags(bad, "a.PNG", "center") != ()
    assert images.flags(measure(255 - head(50), 0.0), "a.nii", "center") == ()
    assert images.flags(measure(255 - head(50), 0.2), "a.nii", "center") != ()
    assert images.flags(None, "a.nii", SLICES) == ()


def test_json_and_back(images: TrainingImages) -> None:
    text = json.dumps(images.to_dict())
    assert len(text) < 6000
    again = training_images({"images": json.loads(text)})
    assert again is not None and json.dumps(again.to_dict()) == text
    for pixels in (head(60), 255 - head(60)):
        assert bool(flags(images, pixels)) == bool(flags(again, pixels))
    assert training_images({}) is None and training_images({"images": None}) is None


def test_statistics_that_cannot_be_read_are_named(images: TrainingImages) -> None:
    with pytest.raises(ValueError, match="format 2, this version of fastflow reads format 1"):
        TrainingImages.from_dict(images.to_dict() | {"format": 2})
    for changes in (
        {"ranges": {"border": {}}},
        {"layout": {"mean": [1.0], "patterns": []}},
        {"volumes": None},
    ):
        with pytest.raises(ValueError, match="statistics of the training images are damaged"):
            TrainingImages.from_dict(images.to_dict() | changes)


def test_few_volumes_say_nothing() -> None:
    measured = np.concatenate([measure(head(seed), 0.0) for seed in range(8)])
    volumes = np.repeat(np.arange(8), 3)
    assert TrainingImages.of(measured[:21], volumes[:21], SLICES) is None
    assert TrainingImages.of(measured, volumes, SLICES) is not None


@given(st.floats(-1e3, 1e3), st.floats(0, 1e3), st.integers(1, 1000))
def test_a_range_is_widened_by_less_where_more_volumes_made_it(
    low: float, width: float, volumes: int
) -> None:
    first, last = widened((low, low + width), volumes)
    assert first <= low and last >= low + width
    assert (low - first) == pytest.approx(width * (0.25 + 5 / volumes), abs=1e-9)
    assert widened((low, low + width), volumes + 1)[1] <= last


def test_sets_of_slices_are_put_together(images: TrainingImages) -> None:
    def of(seeds: range, with_measures: bool = True) -> SliceSet:
        slices = np.concatenate([head(seed) for seed in seeds])[:, None]
        count, names = len(slices), tuple(str(seed) for seed in seeds)
        measured = measure(slices[:, 0], 0.0) if with_measures else None
        volumes = np.repeat(np.arange(len(seeds)), 3)
        return SliceSet(slices, np.zeros(count, dtype=np.int64), volumes, names, names, ("a",), measured)

    together = TrainingImages.of_sets([of(range(30)), of(range(30, 40))], SLICES)
    assert together is not None and together.to_dict() == images.to_dict()
    assert TrainingImages.of_sets([of(range(30)), of(range(30, 40), with_measures=False)], SLICES) is None
    chosen = of(range(10)).subset([7, 2])
    assert chosen.measured is not None
    np.testing.assert_array_equal(chosen.measured, measure(chosen.images[:, 0], 0.0))
    whole = of(range(10))
    with pytest.raises(ValueError, match="measured must have 30 rows, got 29"):
        dataclasses.replace(whole, measured=np.zeros((29, 75)))
