"""Damaged files of every format: each gives images or a named error, and nothing else."""

from __future__ import annotations

import gzip
import io
import itertools
import resource
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fastflow.data import _gzip
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import LoadedImage, read_image
from fastflow.data.volume import ERROR_CODES, FLAG_CODES
from fastflow.errors import VolumeError

SIZE = (8, 10)
PREPROCESS = (Preprocess(SIZE), Preprocess(SIZE, "center+-1"), Preprocess(SIZE, "0,2", scaling="fixed"))
MIB = 1 << 20
# Sizes, types, offsets and codes that provoke, in fields of 2 and 4 bytes.
ODD = [0, 1, -1, 2, 3, 4, 7, 8, 16, 64, 512, 768, 255, 32767, -32768, 1 << 24, -(1 << 31), (1 << 31) - 1]


def nifti(
    dtype: str, shape: tuple[int, ...] = (6, 5, 4), model: type = nib.Nifti1Header, **fields: object
) -> bytes:
    """A single-file NIfTI in either byte order."""
    header = model(endianness=dtype[0])
    header.set_data_dtype(np.dtype(dtype).newbyteorder("="))
    header.set_data_shape(shape)
    header.set_sform(np.diag([2.0, 2.0, 2.0, 1.0]), code=1)
    header.set_qform(np.diag([2.0, 2.0, 2.0, 1.0]), code=1)
    header["vox_offset"] = header.sizeof_hdr + 4
    for name, value in fields.items():
        header[name] = value
    return header.binaryblock + b"\0" * 4 + voxels(shape).astype(dtype).tobytes()


def voxels(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape)


def mgh() -> bytes:
    return nib.MGHImage(voxels((6, 5, 4)).astype(np.float32), np.diag([2.0, 2.0, 2.0, 1.0])).to_bytes()


def png() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(voxels((6, 7)).astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


# Name, content before compression, bytes of the header.
SOURCES: list[tuple[str, bytes, int]] = [
    ("a.nii", nifti("<i2"), 348),
    ("b.nii", nifti(">f4", scl_slope=-0.5, scl_inter=40), 348),
    ("c.nii", nifti("<f8", model=nib.Nifti2Header), 540),
    ("d_pet.nii", nifti("<u2", (6, 5, 4, 3)), 348),
    ("a.nii.gz", nifti("<f4"), 348),
    ("b.nii.gz", nifti(">i4", model=nib.Nifti2Header, scl_slope=2), 540),
    ("c_pet.nii.gz", nifti("<i2", (6, 5, 4, 3)), 348),
    ("a.mgh", mgh(), 90),
    ("a.mgz", mgh(), 90),
    ("a.png", png(), 41),
]


def flip(rng: np.random.Generator, content: bytearray, start: int, stop: int) -> None:
    for at in rng.integers(start, max(start + 1, min(stop, len(content))), rng.integers(1, 5)):
        content[at] ^= 1 << int(rng.integers(8))


def overwrite(rng: np.random.Generator, content: bytearray, start: int, stop: int) -> None:
    for at in rng.integers(start, max(start + 1, min(stop, len(content) - 8)), rng.integers(1, 4)):
        width = int(rng.choice([1, 2, 4, 8]))
        if rng.random() < 0.5:
            content[at : at + width] = rng.bytes(width)
        else:
            value = ODD[rng.integers(len(ODD))] % (1 << 8 * width)
            content[at : at + width] = value.to_bytes(width, "little" if rng.random() < 0.5 else "big")


def cut(rng: np.random.Generator, content: bytearray, start: int, stop: int) -> None:
    del content[int(rng.integers(len(content))) :]


def insert(rng: np.random.Generator, content: bytearray, start: int, stop: int) -> None:
    at = int(rng.integers(start, len(content) + 1))
    content[at:at] = rng.bytes(int(rng.integers(1, 40)))


def remove(rng: np.random.Generator, content: bytearray, start: int, stop: int) -> None:
    at = int(rng.integers(start, len(content)))
    del content[at : at + int(rng.integers(1, 40))]


MUTATIONS: list[Callable[[np.random.Generator, bytearray, int, int], None]] = [
    flip,
    overwrite,
    cut,
    insert,
    remove,
]


def damaged(rng: np.random.Generator, name: str, content: bytes, header: int) -> bytes:
    """Damage to the header (most often), the voxels or, of compressed files, the stream or its trailer."""
    change = MUTATIONS[rng.choice(len(MUTATIONS), p=[0.25, 0.45, 0.1, 0.1, 0.1])]
    changed = bytearray(content)
    packed = name.endswith("z")
    if packed and rng.random() < 0.4:
        changed = bytearray(gzip.compress(content, 1, mtime=0))
        change(rng, changed, 0 if rng.random() < 0.7 else len(changed) - 8, len(changed))
        return bytes(changed)
    if rng.random() < 0.8:
        change(rng, changed, 0, header)
    else:
        change(rng, changed, min(header, len(changed) - 1), len(changed))
    return gzip.compress(bytes(changed), 1, mtime=0) if packed else bytes(changed)


def outcome(path: Path, preprocess: Preprocess) -> str:
    """The error's code, or "read" or the flags of sound images; any other exception fails the test."""
    try:
        loaded = read_image(str(path), preprocess)
    except VolumeError as error:
        refused = error
    else:
        return _sound(path, preprocess, loaded)
    assert refused.code in ERROR_CODES and refused.path == str(path)
    return refused.code


def _sound(path: Path, preprocess: Preprocess, loaded: LoadedImage) -> str:
    assert loaded.images.dtype == np.uint8
    count = 1 if path.suffix == ".png" else {"center": 1, "center+-1": 3, "0,2": 2}[preprocess.slices]
    assert loaded.images.shape == (count, 1, *SIZE)
    assert {flag.code for flag in loaded.flags} <= set(FLAG_CODES)
    return "+".join(flag.code for flag in loaded.flags) or "read"


def fuzz(folder: Path, count: int, seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    outcomes: Counter[str] = Counter()
    for number, (name, content, header) in zip(range(count), itertools.cycle(SOURCES), strict=False):
        path = folder / name
        path.write_bytes(damaged(rng, name, content, header))
        start = time.perf_counter()
        outcomes[outcome(path, PREPROCESS[number // len(SOURCES) % len(PREPROCESS)])] += 1
        assert time.perf_counter() - start < 5
    return outcomes


def test_sources_are_read(tmp_path: Path) -> None:
    for name, content, _ in SOURCES:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("z") else content)
        assert [outcome(tmp_path / name, preprocess) for preprocess in PREPROCESS] == ["read"] * len(
            PREPROCESS
        )


def test_damaged_files(tmp_path: Path) -> None:
    assert fuzz(tmp_path, 900, seed=1).total() == 900


def test_damaged_files_cost_little_memory(tmp_path: Path) -> None:
    test_sources_are_read(tmp_path)
    tracemalloc.start()
    try:
        for seed in range(15):
            before = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            fuzz(tmp_path, len(SOURCES), seed)
            assert tracemalloc.get_traced_memory()[1] - before < 4 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_many_damaged_files(tmp_path: Path) -> None:
    fuzz(tmp_path, 100, seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz(tmp_path, 20_000, seed=3)
    assert outcomes.total() >= 20_000
    # The damage reaches most of what can be wrong with a file that exists.
    assert len(set(outcomes) & set(ERROR_CODES)) >= 14, outcomes
    assert outcomes["read"] > 1_000, outcomes
    # getrusage counts in bytes on macOS and in kilobytes elsewhere.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024 * (
        1024 if sys.platform == "darwin" else 1
    )


def test_isal_and_zlib_judge_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    packed = [source for source in SOURCES if source[0].endswith("z")]
    files = []
    for number, (name, content, header) in zip(range(180), itertools.cycle(packed), strict=False):
        path = tmp_path / f"{number}{name}"
        path.write_bytes(damaged(rng, name, content, header))
        files.append(path)
    fast = [outcome(path, PREPROCESS[0]) for path in files]
    monkeypatch.setattr(_gzip, "GzipFile", gzip.GzipFile)
    plain = [outcome(path, PREPROCESS[0]) for path in files]
    unlike = [pair for pair in zip(fast, plain, strict=True) if pair[0] != pair[1]]
    # Both refuse it; one may see that a stream is corrupt before it gives out the header, or the byte too
    # many, for which the other refuses it.
    assert all({"crc", "truncated"} & set(pair) and set(pair) <= set(ERROR_CODES) for pair in unlike), unlike
    assert len(unlike) < 0.1 * len(files)
