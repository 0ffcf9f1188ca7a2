from __future__ import annotations

import csv
import dataclasses
import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastflow import MagicFlow
from fastflow.archive import sample as module
from fastflow.archive.locks import locked
from fastflow.archive.sample import draw, sample
from fastflow.errors import OutputFolderError


def test_files_hold_the_same_images(model_folder: Path, tmp_path: Path) -> None:
    files = sample(model_folder, tmp_path / "s", count=3, temperature=0.5, seed=4)
    names = {f"{name}-{i}.png" for name in ("flat", "striped") for i in (1, 2, 3)}
    assert {file.name for file in files} == {"grid.png", "samples.npz", "samples.csv", *names}
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


@pytest.fixture
def ages(model_folder: Path, tmp_path: Path) -> Path:
    """A model with classes whose names differ in characters that no file name can have."""
    model = MagicFlow.load(model_folder)
    model.config = dataclasses.replace(model.config, class_names=("<65", ">65"))
    model.save(tmp_path / "ages")
    return tmp_path / "ages"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_classes_with_similar_names_have_files_of_their_own(ages: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    files = sample(ages, out, count=2, temperature=0.5, seed=3)
    assert table(out) == [
        {"file": file, "class": name, "number": number, "seed": "3", "temperature": "0.5"}
        for file, name, number in (
            ("_65-1.png", "<65", "1"),
            ("_65-2.png", "<65", "2"),
            ("_65_2-1.png", ">65", "1"),
            ("_65_2-2.png", ">65", "2"),
        )
    ]
    assert {file.name for file in files} == {file.name for file in out.iterdir()}
    with np.load(out / "samples.npz") as stored:
        for row, image in zip(table(out), stored["images"], strict=True):
            with Image.open(out / row["file"]) as picture:
                assert np.asarray(picture).tolist() == image[0].tolist()


def test_only_earlier_samples_are_replaced(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "s"
    sample(model_folder, out, count=3)
    with pytest.raises(
        OutputFolderError, match=r"holds earlier samples; replace them \(--overwrite\) or name"
    ):
        sample(model_folder, out, count=1)
    (out / "notes.txt").write_text("mine")
    files = sample(model_folder, out, ["flat"], count=1, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"notes.txt", *(file.name for file in files)}
    (out / "flat-2.png").write_text("mine")
    with pytest.raises(OutputFolderError, match=r"holds other files, such as 'flat-2\.png', which would be"):
        sample(model_folder, out, count=2, overwrite=True)
    assert (out / "flat-1.png").exists() and (out / "flat-2.png").read_text() == "mine"
    (out / "samples.csv").unlink()
    for overwrite in (False, True):
        with pytest.raises(
            OutputFolderError, match=r"holds other files, such as 'flat-1\.png'; samples need"
        ):
            sample(model_folder, out, count=1, overwrite=overwrite)


def test_a_folder_in_use_is_told_before_anything_is_drawn(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("nothing may be drawn")

    monkeypatch.setattr(module, "draw", never)
    with locked(tmp_path / "s"), pytest.raises(OutputFolderError, match="another run is writing here"):
        sample(model_folder, tmp_path / "s")
    monkeypatch.setattr(fcntl, "flock", unknown_call)
    with pytest.raises(
        OutputFolderError, match=r"this file system has no locks \(Function not implemented\)"
    ):
        sample(model_folder, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    monkeypatch.setattr(module, "draw", draw)
    assert len(sample(model_folder, tmp_path / "t", count=1, lock=False)) == 5


def unknown_call(*arguments: Any) -> Any:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
