from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from fastflow.data.slices import SliceSet
from fastflow.evaluation.baselines import (
    BINS,
    GrainBaseline,
    HistogramBaseline,
    ThumbnailBaseline,
    volume_grain,
    volume_histograms,
    volume_thumbnails,
)


def make_set(levels: list[int], per_volume: int = 2, seed: int = 0) -> SliceSet:
    """Volume v has noise around levels[v]; its label is 0 below 128."""
    rng = np.random.default_rng(seed)
    volumes = np.repeat(np.arange(len(levels)), per_volume)
    images = (
        rng.normal(np.array(levels)[volumes][:, None, None, None], 6.0, (len(volumes), 1, 8, 8))
        .clip(0, 255)
        .astype(np.uint8)
    )
    labels = (np.array(levels)[volumes] >= 128).astype(np.int64)
    names = tuple(str(v) for v in range(len(levels)))
    return SliceSet(images, labels, volumes, names, names, ("dark", "bright"))


def test_baseline_tells_brightness_but_no_structure() -> None:
    train, test = make_set([60, 70, 80, 180, 190, 200] * 3), make_set([65, 75, 185, 195], seed=1)
    baseline = HistogramBaseline().fit(train)
    assert baseline.predict(test).tolist() == [0, 0, 1, 1]
    rng = np.random.default_rng(2)
    shuffled = rng.permuted(test.images.reshape(len(test), -1), axis=1).reshape(test.images.shape)
    scrambled = SliceSet(shuffled, test.labels, test.volumes, test.paths, test.subjects, test.class_names)
    assert baseline.predict(scrambled).tolist() == baseline.predict(test).tolist()


def test_histograms_share_out_every_pixel() -> None:
    data = make_set([10, 240], per_volume=3)
    histograms = volume_histograms(data)
    assert histograms.shape == (2, BINS)
    np.testing.assert_allclose(histograms.sum(axis=1), 1.0)
    np.testing.assert_allclose(
        histograms[1], np.histogram(data.images[3:], bins=BINS, range=(0, 256))[0] / (3 * 64)
    )


def test_baseline_needs_two_classes() -> None:
    with pytest.raises(ValueError, match="at least two classes"):
        HistogramBaseline().fit(make_set([10, 20]))


def make_grains(smoothing: list[float], seed: int = 0) -> SliceSet:
    """Volumes of two slices with heads of one histogram; label 1 has grain that is smoothed."""
    rng = np.random.default_rng(seed)
    volumes = np.repeat(np.arange(len(smoothing)), 2)
    grain = np.stack([gaussian_filter(rng.normal(size=(40, 40)), smoothing[v]) for v in volumes])
    grain *= 10.0 / grain.std(axis=(1, 2), keepdims=True)
    images = np.zeros((len(volumes), 1, 48, 48), dtype=np.uint8)
    images[:, 0, 4:-4, 4:-4] = (120 + grain).clip(0, 255)
    labels = (np.array(smoothing)[volumes] > 0).astype(np.int64)
    names = tuple(str(v) for v in range(len(smoothing)))
    return SliceSet(images, labels, volumes, names, names, ("fine", "coarse", "unheard"))


def test_grain_is_told_where_a_histogram_sees_nothing() -> None:
    train, test = make_grains([0.0, 1.0] * 8), make_grains([0.0, 1.0] * 8, seed=1)
    labels = test.volume_labels
    assert (GrainBaseline().fit(train).predict(test) == labels).all()
    assert (HistogramBaseline().fit(train).predict(test) == labels).mean() < 0.9


@pytest.mark.parametrize("baseline", [HistogramBaseline, GrainBaseline])
def test_probabilities_are_those_of_the_prediction(baseline: type) -> None:
    data = make_grains([0.0, 0.6] * 8)
    fitted = baseline().fit(data)
    probabilities = fitted.predict_proba(data)
    assert probabilities.shape == (16, 3) and (probabilities[:, 2] == 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0)
    assert (probabilities.argmax(axis=1) == fitted.predict(data)).all()


@pytest.mark.parametrize("baseline", [HistogramBaseline, GrainBaseline])
def test_a_baseline_that_was_not_fitted_says_so(baseline: type) -> None:
    with pytest.raises(ValueError, match="must be fitted"):
        baseline().predict_proba(make_grains([0.0]))


def test_grain_of_a_volume_does_not_depend_on_the_order_of_its_slices() -> None:
    data = make_grains([0.0, 1.0, 0.5])
    order = np.array([5, 0, 2, 4, 1, 3])
    other = SliceSet(
        data.images[order],
        data.labels[order],
        data.volumes[order],
        data.paths,
        data.subjects,
        data.class_names,
    )
    np.testing.assert_allclose(volume_grain(other), volume_grain(data), rtol=1e-12)


def make_shades(sides: list[int], seed: int = 0) -> SliceSet:
    """Volumes of two noisy slices, brighter at the top (0) or at the bottom (1), of one histogram."""
    rng = np.random.default_rng(seed)
    volumes = np.repeat(np.arange(len(sides)), 2)
    ramp = np.linspace(0.0, 30.0, 36)[:, None] + rng.normal(100.0, 12.0, (len(volumes), 1, 36, 24))
    images = np.where(np.array(sides)[volumes][:, None, None, None] == 1, ramp, ramp[:, :, ::-1])
    names = tuple(str(v) for v in range(len(sides)))
    labels = np.array(sides)[volumes]
    return SliceSet(images.clip(0, 255).astype(np.uint8), labels, volumes, names, names, ("top", "bottom"))


def test_thumbnails_tell_shading_that_no_histogram_sees() -> None:
    train, test = make_shades([0, 1] * 12), make_shades([1, 0, 1, 1, 0, 0], seed=1)
    assert ThumbnailBaseline().fit(train).predict(test).tolist() == [1, 0, 1, 1, 0, 0]
    assert HistogramBaseline().fit(train).predict(test).tolist() != [1, 0, 1, 1, 0, 0]


def test_thumbnails_are_means_of_cells() -> None:
    data = make_shades([0, 1])
    blocks = data.images[:, 0].reshape(2, 2, 12, 3, 12, 2).astype(np.float64).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(volume_thumbnails(data), blocks.reshape(2, -1))
    small = make_set([10, 240])
    np.testing.assert_allclose(
        volume_thumbnails(small), small.images[:, 0].reshape(2, 2, 64).astype(float).mean(axis=1)
    )
