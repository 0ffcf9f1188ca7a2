"""Files that other programs change while they are read, and names that lead to no file."""

from __future__ import annotations

import gzip
import itertools
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastflow.archive.decode import decode_one
from fastflow.archive.inputs import Item
from fastflow.data import _opening, volume
from fastflow.data._opening import opened, read_png
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_image, load_slices, read_image
from fastflow.data.volume import ERROR_CODES, read_volume
from fastflow.errors import VolumeError
from tests.data.files import nifti, store

# There are many planes, so that reading them one by one takes long.
SHAPE = (8, 6, 300)
# Every voxel is in a slice, and none is scaled, so that an image tells of which file each voxel is.
EVERYTHING = Preprocess((300, 8), "0,1,2,3,4,5", scaling="fixed")
VOXELS = [np.random.default_rng(seed).integers(0, 256, SHAPE).astype(np.uint8) for seed in range(3)]


def errors_of(read: Callable[[], object]) -> VolumeError:
    with pytest.raises(VolumeError) as caught:
        read()
    assert caught.value.code in ERROR_CODES
    return caught.value


# -- changes at a known time ---------------------------------------------------------------------------------


def rewrite(path: Path) -> None:
    """Other bytes of the same number, at another time."""
    content = path.read_bytes()
    path.write_bytes(content[::-1])
    os.utime(path, ns=(10**18, 10**18))


def replace(path: Path) -> None:
    (path.parent / "other").write_bytes(b"other")
    os.replace(path.parent / "other", path)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda path: os.truncate(path, 100), "truncated"),
        (lambda path: os.truncate(path, 10_000), "changed"),
        (rewrite, "changed"),
        (replace, None),
        (os.remove, None),
        (lambda path: path.chmod(0o600), None),
        (lambda path: path.read_bytes(), None),
    ],
)
def test_a_change_between_opening_and_closing(
    tmp_path: Path, change: Callable[[Path], None], code: str | None
) -> None:
    path = store(tmp_path, nifti())
    content = path.read_bytes()

    def read() -> bytes:
        with opened(str(path)) as file:
            start = file.read(100)
            change(path)
            return start + file.read()

    if code is not None:
        error = errors_of(read)
        assert (error.code, error.path) == (code, str(path))
        assert "while it was read" in error.message
    else:
        # The file that was opened is read to its end, whatever its name stands for now.
        assert read() == content


LARGE = Preprocess((600, 60))
READERS: dict[str, Callable[[Path], object]] = {
    "read_volume": read_volume,
    "read_image": lambda path: read_image(str(path), LARGE),
    "load_slices": lambda path: _raise(load_slices([Record(str(path), None, "s")], LARGE, ["a"])[1][0]),
    "decode_one": lambda path: _raise(decode_one(Item(str(path), "a"), LARGE).result),
}


def _raise(error: object) -> None:
    assert isinstance(error, VolumeError)
    raise error


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz", "sub-1_pet.nii"])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_that_is_cut_after_its_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reader: str, name: str
) -> None:
    # The file is larger than what is read at once, compressed or not.
    data = np.random.default_rng(0).integers(0, 255, (60, 40, 600, 2)[: 3 + ("pet" in name)], dtype=np.uint8)
    path = store(tmp_path, nifti(data), name)
    read_header = volume.read_header

    def cut(*args: object, **kwargs: object) -> object:
        header = read_header(*args, **kwargs)
        os.truncate(path, 400)
        return header

    monkeypatch.setattr(volume, "read_header", cut)
    error = errors_of(lambda: READERS[reader](path))
    assert error.code == "truncated"
    assert "to 400 bytes while it was read" in error.message


def test_the_cause_of_an_error_is_a_change(tmp_path: Path) -> None:
    path = store(tmp_path, nifti())

    def read() -> None:
        with opened(str(path)):
            rewrite(path)
            raise VolumeError(str(path), "crc", "the gzip stream is corrupt")

    error = errors_of(read)
    assert error.code == "changed" and isinstance(error.__cause__, VolumeError)


def test_a_file_that_was_written_just_now_waits_for_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store(tmp_path, nifti())
    stamp = path.stat().st_mtime_ns
    clock = itertools.count(stamp - 2)
    slept: list[float] = []
    monkeypatch.setattr(_opening, "_CLOCK_STEP_NS", 10_000_000)
    monkeypatch.setattr(_opening, "_clock", lambda: next(clock))
    monkeypatch.setattr(_opening.time, "sleep", slept.append)
    with opened(str(path)) as file:
        assert file.read() == path.read_bytes()
    # The clock stands before the stamp twice, and on it once.
    assert len(slept) == 3
    os.utime(path, ns=(2 * stamp, 2 * stamp))
    with opened(str(path)):
        # A time in the far future, as a copied file may have it, is not waited for.
        assert len(slept) == 3
    monkeypatch.setattr(_opening.time, "sleep", lambda seconds: rewrite(path))
    clock = itertools.count(2 * stamp)
    assert errors_of(lambda: read_volume(path)).code == "changed"


def test_a_png_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(VOXELS[0][:, :, 0]).save(path)
    content = path.read_bytes()
    read = _opening.read_up_to
    taken: list[int] = []

    def count(stream: _opening.Readable, size: int) -> bytes:
        taken.append(size)
        return read(stream, size)

    monkeypatch.setattr(_opening, "read_up_to", count)
    image = load_image(str(path), EVERYTHING)
    assert sum(taken) == len(content) and image.shape == (1, 1, 300, 8)

    def change(stream: _opening.Readable, size: int) -> bytes:
        rewrite(path)
        return content[:size]

    monkeypatch.setattr(_opening, "read_up_to", change)
    assert errors_of(lambda: load_image(str(path), EVERYTHING)).code == "changed"
    monkeypatch.undo()
    path.write_bytes(content)
    monkeypatch.setattr(_opening, "MAX_PNG_BYTES", len(content) - 1)
    assert errors_of(lambda: read_png(str(path))).code == "too_large"


def test_a_stream_that_gives_few_bytes_at_once() -> None:
    class Slow:
        content = b"voxels of a volume"

        def read(self, size: int, /) -> bytes:
            block, self.content = self.content[: min(size, 3)], self.content[min(size, 3) :]
            return block

    slow = Slow()
    assert _opening.read_up_to(slow, 10) == b"voxels of "
    assert _opening.read_up_to(slow, 100) == b"a volume"


# -- names that lead to no file ------------------------------------------------------------------------------


def test_links_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "gone.nii").symlink_to("subject-7.nii")
    (tmp_path / "annexed.nii.gz").symlink_to("../.git/annex/objects/Xx/1z/MD5E-s34--01/MD5E-s34--01")
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    (tmp_path / "annexed.png").symlink_to("../.git/annex/objects/Xx/1z/MD5E-s34--02/MD5E-s34--02")
    (tmp_path / "gone.dcm").symlink_to("subject-8.dcm")
    expected = {
        "gone.nii": "is a link to a file that does not exist",
        "annexed.nii.gz": "'git annex get' or 'datalad get'",
        "annexed.png": "'git annex get' or 'datalad get'",
        "disk/a/scan.nii": "lies below a link to a folder that does not exist",
        "none.nii": "there is no such file",
        "gone.dcm": "is a link to a file that does not exist",
        "none": "there is no such file",
    }
    for name, words in expected.items():
        error = errors_of(lambda name=name: load_image(str(tmp_path / name), EVERYTHING))
        assert error.code == "missing" and words in error.message
        # Results can be asked for without names, so messages hold none.
        assert "subject" not in error.message and str(tmp_path) not in error.message


def test_a_file_that_goes_between_two_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_opening, "check_file", lambda name: 1)
    assert errors_of(lambda: read_volume(tmp_path / "none.nii")).code == "missing"


# -- another process that writes -----------------------------------------------------------------------------

# Each content is written by one call, as a file that rests half-written cannot be told from a whole one.
WRITER = """
import os, random, sys, time
path, *contents = sys.argv[1:]
contents = [open(name, "rb").read() for name in contents]
rng = random.Random(0)
parent = os.getppid()
while os.getppid() == parent:
    content, kind = rng.choice(contents), rng.randrange(5)
    if kind == 4:
        with open(path + ".new", "wb") as file:
            file.write(content)
        os.replace(path + ".new", path)
    else:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
        if kind == 1:
            os.ftruncate(file, rng.randrange(len(content)))
        os.pwrite(file, content, 0)
        os.ftruncate(file, len(content))
        if kind == 2:
            os.ftruncate(file, rng.randrange(len(content)))
        if kind == 3:
            os.pwrite(file, rng.randbytes(rng.randrange(3000)), len(content))
        os.close(file)
    time.sleep(rng.choice([0, 0, 1e-4, 3e-4, 1e-3, 2e-2]))
"""


@pytest.fixture
def rewritten(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A file of the name asked for, which a process writes again and again with `VOXELS`."""
    path = tmp_path / request.param
    sources = []
    for number, voxels in enumerate(VOXELS):
        content = nifti(voxels)
        sources.append(tmp_path / f"{number}")
        sources[-1].write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    path.write_bytes(sources[0].read_bytes())
    monkeypatch.setattr(_opening, "_CLOCK_STEP_NS", 10_000_000)
    # Planes are read one by one, which leaves the other process time in between.
    monkeypatch.setattr(volume, "_CHUNK_BYTES", 1)
    with subprocess.Popen([sys.executable, "-c", WRITER, path, *sources]) as writer:
        yield path
        writer.kill()


def read_while_it_is_written(path: Path, seconds: float) -> Counter[str]:
    """How often each outcome came in `seconds`, or in longer if not all of them have come by then."""
    whole = [voxels[:, :, ::-1].transpose(1, 2, 0)[:, None] for voxels in VOXELS]
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    while (left := start + seconds - time.monotonic()) > 0 or (not outcomes["whole"] and left > -20):
        result = decode_one(Item(str(path), "a"), EVERYTHING).result
        if isinstance(result, VolumeError):
            assert result.code in ERROR_CODES and result.code != "unreadable", result
            outcomes[result.code] += 1
        else:
            assert any(np.array_equal(result, images) for images in whole), "parts of several files"
            outcomes["whole"] += 1
        time.sleep(random.random() * 1e-3)
    assert outcomes["whole"] and len(outcomes) > 1, outcomes
    return outcomes


@pytest.mark.parametrize("rewritten", ["scan.nii", "scan.nii.gz"], indirect=True)
def test_a_file_that_is_written_while_it_is_read(rewritten: Path) -> None:
    read_while_it_is_written(rewritten, 0.8)


@pytest.mark.slow
@pytest.mark.parametrize("rewritten", ["scan.nii", "scan.nii.gz"], indirect=True)
def test_a_file_that_is_written_while_it_is_read_for_long(rewritten: Path) -> None:
    outcomes = read_while_it_is_written(rewritten, 20)
    assert {"whole", "changed", "truncated"} <= set(outcomes), outcomes
