"""Faults of gzip streams are told apart."""

from __future__ import annotations

import gzip
import itertools
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflow.data import _gzip
from fastflow.data.volume import read_volume
from fastflow.errors import VolumeError
from tests.data.files import DATA, code_of, nifti, outcome, store

STREAM = gzip.compress(nifti(), mtime=0)


@pytest.fixture(params=["isal", "zlib"])
def either_library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer must not depend on what is installed."""
    if request.param == "zlib":
        monkeypatch.setattr(_gzip, "GzipFile", gzip.GzipFile)


def stored(folder: Path, content: bytes) -> Path:
    (folder / "scan.nii.gz").write_bytes(content)
    return folder / "scan.nii.gz"


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize("garbage", [b"g", b"garbage", b"garbage" * 3, b"\0\0garbage", b"\n", b"\x1f\0"])
def test_garbage_after_a_sound_stream(tmp_path: Path, garbage: bytes) -> None:
    error = outcome(stored(tmp_path, STREAM + garbage))
    assert isinstance(error, VolumeError)
    assert error.code == "too_long"
    kept = len(STREAM) + len(garbage) - len(garbage.lstrip(b"\0"))
    assert f"keep the first {kept} bytes" in error.message and "checksum is right" in error.message
    # The way on that the message names leads to the volume.
    np.testing.assert_array_equal(read_volume(stored(tmp_path, (STREAM + garbage)[:kept])).data, DATA)


@pytest.mark.usefixtures("either_library")
@pytest.mark.parametrize(
    ("code", "content"),
    [
        ("truncated", STREAM[:-1]),
        ("truncated", STREAM[:-9]),
        ("truncated", STREAM[:30]),
        ("truncated", STREAM[:5]),
        ("truncated", STREAM[:1]),
        ("truncated", STREAM + b"\x1f"),
        ("truncated", STREAM + b"\x1f\x8b\x08" + bytes(4)),
        ("crc", STREAM + b"\x1f\x8b\x09" + bytes(20)),
        ("crc", b"\x1f\x8b\x07" + STREAM[3:]),
        ("crc", STREAM[:60] + bytes([STREAM[60] ^ 64]) + STREAM[61:]),
        ("crc", STREAM[:-8] + bytes(4) + STREAM[-4:]),
        ("crc", STREAM[:-4] + bytes(4)),
        # The second part of the voxels was replaced, so nothing is whole.
        ("crc", gzip.compress(nifti()[:400]) + b"garbage" + gzip.compress(nifti()[400:])),
    ],
)
def test_streams_that_break(tmp_path: Path, code: str, content: bytes) -> None:
    assert code_of(stored(tmp_path, content)) == code


@pytest.mark.usefixtures("either_library")
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 400), max_size=4), padding=st.integers(0, 700))
def test_members_and_zeros_between_them_are_one_stream(tmp_path: Path, cuts: set[int], padding: int) -> None:
    content = nifti()
    ends = [0, *sorted(cuts), len(content)]
    members = [gzip.compress(content[a:b]) for a, b in itertools.pairwise(ends)]
    path = stored(tmp_path, bytes(padding).join(members) + bytes(padding))
    np.testing.assert_array_equal(read_volume(path).data, DATA)


def test_the_walk_over_a_stream_holds_one_chunk(tmp_path: Path) -> None:
    packed = gzip.compress(bytes(8 << 20)) + b"garbage"
    (tmp_path / "a.gz").write_bytes(packed)
    with open(tmp_path / "a.gz", "rb", buffering=0) as file:
        tracemalloc.start()
        fault = _gzip.find_fault(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (fault.code, fault.inflated, fault.start) == ("too_long", 8 << 20, bytes(4096))
    assert fault.message.startswith("7 bytes") and peak < 4 << 20


def test_an_error_that_zlib_does_not_see_is_still_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, nifti(), "scan.nii.gz")

    class Broken(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            raise zlib.error("a fault of one library")

    monkeypatch.setattr(_gzip, "GzipFile", Broken)
    assert code_of(path) == "crc"
