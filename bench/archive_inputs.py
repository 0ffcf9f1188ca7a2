"""Volumes and models for the benchmarks of archives: the shipped heads with noise, on grids of any size."""

from __future__ import annotations

import functools
import gzip
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage

from bench.measuring import randomize
from fastflow import FlowConfig, MagicFlow
from fastflow.data import anatomy
from fastflow.data.preprocess import Preprocess, to_unit_range
from fastflow.data.slices import load_image

CLASSES = 7
# Volumes of an archive that differ; the others are copies of them.
DISTINCT = 16
# Voxels as scanners store them, after a resampling to float, and after everything but the brain was removed.
KINDS = ("int16", "float32", "float32 brain")


@functools.cache
def head(name: str, mm: int) -> tuple[np.ndarray, np.ndarray]:
    """(intensities, where there is brain) of a shipped head on a grid of `mm` millimetres."""
    found = anatomy.load_head(name)
    brain = found.fractions[:3].sum(axis=0)
    if mm == 2:
        return found.t1, brain > 0.5
    return tuple(ndimage.zoom(values, 2.0 / mm, order=1) for values in (found.t1, brain.astype(np.float32)))


def make_volume(mm: int, kind: str, seed: int) -> nib.Nifti1Image:
    """A head with noise, on a grid of `mm` millimetres, its voxels one of `KINDS`."""
    rng = np.random.default_rng((mm, seed))
    ideal, brain = head(anatomy.HEADS[seed % len(anatomy.HEADS)], mm)
    # The noise is Rician, a fiftieth of white matter's signal.
    real, imaginary = (3.4 * rng.standard_normal(ideal.shape, dtype=np.float32) for _ in range(2))
    voxels = np.hypot(ideal * rng.uniform(0.9, 1.1) + real, imaginary).astype(np.float32)
    voxels *= np.float32(rng.uniform(3.0, 5.0))
    if kind == "float32 brain":
        voxels[brain <= 0.5] = 0.0
    stored = np.rint(voxels).astype(np.int16) if kind == "int16" else voxels
    return nib.Nifti1Image(stored, np.diag([mm, mm, mm, 1.0]))


def write_durably(path: Path, content: bytes) -> None:
    """Write a file through to the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        # Pages that are not on the disk yet cannot be dropped from the cache.
        os.fsync(stream.fileno())


def write_archive(folder: Path, mm: int, count: int, distinct: int = DISTINCT) -> list[str]:
    """Write compressed int16 volumes; their paths."""
    paths = [folder / f"sub-{i:05d}_T1w.nii.gz" for i in range(count)]
    for i, path in enumerate(paths):
        if i < distinct:
            write_durably(path, gzip.compress(make_volume(mm, "int16", i).to_bytes(), 6, mtime=0))
        else:
            write_durably(path, paths[i % distinct].read_bytes())
    return [str(path) for path in paths]


def preprocess_for(mm: int) -> Preprocess:
    """The centre slice, padded to the next multiple of 8."""
    shape = head(anatomy.HEADS[0], mm)[0].shape
    return Preprocess((-(-shape[2] // 8) * 8, -(-shape[0] // 8) * 8), "center", (mm, mm, mm), shape)


def write_model(folder: Path, mm: int, paths: Sequence[str], **changes: Any) -> MagicFlow:
    """Save the demo preset with random weights, initialised on an archive; `changes` go to its config."""
    torch.manual_seed(0)
    preprocess = preprocess_for(mm)
    model = MagicFlow(FlowConfig.demo(CLASSES, input_shape=(1, *preprocess.size), **changes))
    randomize(model)
    images = np.concatenate([load_image(path, preprocess) for path in paths[:4]])
    model.initialize(torch.from_numpy(to_unit_range(images)))
    model.metadata["preprocess"] = preprocess.to_dict()
    # The temperature is that of a trained model, so that posteriors do not all round to 0 and 1.
    model.temperature = 100.0
    model.eval().save(folder)
    return model


def write_volume(folder: Path, mm: int, kind: str, ending: str) -> str:
    """Write one volume of a kind; its path."""
    path = folder / f"{mm}mm_{kind.replace(' ', '_')}{ending}"
    content = make_volume(mm, kind, 0).to_bytes()
    write_durably(path, gzip.compress(content, 6, mtime=0) if ending.endswith("z") else content)
    return str(path)
