"""Slices to compare graphs on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fastflow.export.images import anatomy_slices, load_images

from fastflow.data.preprocess import Preprocess
from fastflow.errors import VolumeError


@pytest.mark.parametrize("shape", [(1, 184, 184), (1, 96, 96), (2, 16, 24), (1, 40, 12)])
def test_packaged_slices_fit_any_model(shape: tuple[int, ...]) -> None:
    slices = anatomy_slices(shape, 8)
    assert slices.shape == (8, *shape) and slices.dtype == np.uint8
    assert (slices.reshape(8, -1).max(axis=1) > 100).all()
    assert len({one.tobytes() for one in slices}) == 8


def test_slices_of_scans_are_spread_over_them(scans: Path, tmp_path: Path) -> None:
    preprocess = Preprocess((16, 16), "center+-1", (2.0, 2.0, 2.0), (14, 9, 15))
    paths = [str(path) for path in sorted(scans.rglob("*.nii.gz"))]
    assert load_images(paths, preprocess, 6).shape == (6, 1, 16, 16)
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no volume")
    said: list[str] = []
    assert len(load_images([str(bad), *paths], preprocess, 100, said.append)) == len(paths)
    assert len(said) == 1 and "bad.nii.gz" in said[0]
    with pytest.raises(VolumeError, match=r"bad\.nii\.gz"):
        load_images([str(bad)], preprocess)
