from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflow import MagicFlow
from fastflow.archive.sample import draw, sample


def test_files_hold_the_same_images(model_folder: Path, tmp_path: Path) -> None:
    files = sample(model_folder, tmp_path / "s", count=3, temperature=0.5, seed=4)
    names = {f"{name}-{i}.png" for name in ("flat", "striped") for i in (1, 2, 3)}
    assert {file.name for file in files} == {"grid.png", "samples.npz", *names}
    assert {file.name for file in (tmp_path / "s").iterdir()} == {file.name for file in files}
    with np.load(tmp_path / "s/samples.npz") as stored:
        images, labels = stored["images"], stored["labels"]
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    expected = draw(MagicFlow.load(model_folder), [0, 1], 3, 0.5, seed=4)
    assert images.tolist() == expected.reshape(6, 1, 16, 16).tolist()
    with Image.open(tmp_path / "s/striped-2.png") as picture:
        assert np.asarray(picture).tolist() == images[4, 0].tolist()


def test_seed_and_temperature_matter(model_folder: Path) -> None:
    model = MagicFlow.load(model_folder)
    first = draw(model, [1], 2, seed=1)
    assert (draw(model, [1], 2, seed=1) == first).all()
    assert (draw(model, [1], 2, seed=2) != first).any()
    cold = draw(model, [1], 2, temperature=0.0)
    assert (cold[0, 0] == cold[0, 1]).all()


def test_one_label(model_folder: Path, tmp_path: Path) -> None:
    sample(model_folder, tmp_path, ["striped"], count=1)
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored["labels"].tolist() == [1]


def test_bad_arguments_are_named(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label must be one of flat, striped, got 'x'"):
        sample(model_folder, tmp_path, ["x"])
    with pytest.raises(ValueError, match="count at least 1"):
        sample(model_folder, tmp_path, count=0)
    assert not list(tmp_path.iterdir())
