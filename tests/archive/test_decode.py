from __future__ import annotations

import dataclasses
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastflow.archive.decode import (
    CHUNKS_PER_WORKER,
    FILES_PER_CHUNK,
    Decoded,
    Pool,
    count_elsewhere,
    decode,
    decode_one,
)
from fastflow.archive.inputs import Inputs, Item
from fastflow.data.preprocess import Preprocess
from fastflow.errors import VolumeError

PREPROCESS = Preprocess((16, 16), "center+-1", (2.0, 2.0, 2.0), (14, 9, 15))


@dataclasses.dataclass(frozen=True)
class Trap(Preprocess):
    """Unpickled in a worker, it kills or holds up whoever reads a certain file."""

    fatal: str = ""
    slow: str = ""

    def locate(self, path, shape, spacing):  # type: ignore[no-untyped-def]
        if path == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        if path == self.slow:
            time.sleep(600)
        return super().locate(path, shape, spacing)


@pytest.fixture(scope="module")
def items(scans: Path) -> list[Item]:
    return [Item(str(path), path.name) for path in sorted(scans.rglob("*.nii.gz"))]


def same(one: Decoded, other: Decoded) -> bool:
    assert not isinstance(one.result, VolumeError)
    assert not isinstance(other.result, VolumeError)
    return one.item == other.item and one.size == other.size and np.array_equal(one.result, other.result)


def test_one_file(items: list[Item], tmp_path: Path) -> None:
    one = decode_one(items[0], PREPROCESS)
    assert isinstance(one.result, np.ndarray)
    assert one.result.shape == (3, 1, 16, 16)
    assert (one.size, one.mtime_ns) == (os.stat(items[0].path).st_size, os.stat(items[0].path).st_mtime_ns)
    assert one.seconds > 0
    gone = decode_one(Item("nowhere.nii", "nowhere.nii"), PREPROCESS)
    assert isinstance(gone.result, VolumeError)
    assert (gone.result.code, gone.size, gone.mtime_ns) == ("missing", -1, -1)
    # An error that is kept keeps nothing else.
    assert gone.result.__traceback__ is None


def test_folders_among_the_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.nii").mkdir()
    one = decode_one(Item(str(tmp_path / "x.nii"), "x.nii"), PREPROCESS)
    assert isinstance(one.result, VolumeError)
    assert one.result.code == "not_a_file"

    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("fastflow.archive.decode.os.scandir", refuse)
    one = decode_one(Item(str(tmp_path / "x.nii"), "x.nii"), PREPROCESS)
    assert isinstance(one.result, VolumeError)
    assert (one.result.code, one.result.message) == (
        "unreadable",
        "the folder cannot be listed: Permission denied",
    )


def test_anything_else_becomes_an_error(items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: str, preprocess: Preprocess) -> None:
        raise ZeroDivisionError("unforeseen")

    monkeypatch.setattr("fastflow.archive.decode.read_image", broken)
    one = decode_one(items[0], PREPROCESS)
    assert isinstance(one.result, VolumeError)
    assert (one.result.code, one.result.message) == ("unreadable", "ZeroDivisionError: unforeseen")


@pytest.mark.parametrize("ahead", [0, 18])
def test_order_and_look_ahead(items: list[Item], ahead: int) -> None:
    taken = 0

    def stream() -> Iterator[Item]:
        nonlocal taken
        for item in items * 2:
            taken += 1
            yield item

    results = decode(stream(), PREPROCESS, 1, ahead)
    bound = max(FILES_PER_CHUNK * CHUNKS_PER_WORKER, ahead) + FILES_PER_CHUNK
    for given, expected in enumerate(items * 2, start=1):
        assert same(next(results), decode_one(expected, PREPROCESS))
        assert taken <= given + bound
    assert next(results, None) is None


def test_a_file_that_kills_its_reader_costs_itself_only(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each file of the chunk gets a process of its own.
    monkeypatch.setattr("fastflow.archive.decode.FILES_PER_CHUNK", 2)
    trap = Trap(**dataclasses.asdict(PREPROCESS), fatal=items[9].path)
    for i, one in enumerate(decode(items, trap, 2)):
        if i == 9:
            assert isinstance(one.result, VolumeError)
            assert (one.result.code, one.size) == ("worker", os.path.getsize(items[9].path))
            assert one.item == items[9]
        else:
            assert same(one, decode_one(items[i], PREPROCESS))
    assert i == len(items) - 1


@pytest.mark.slow
def test_a_file_that_hangs_costs_itself_only(items: list[Item]) -> None:
    trap = Trap(**dataclasses.asdict(PREPROCESS), slow=items[9].path)
    # Long enough for processes to start on a busy machine.
    results = list(decode(items[8:], trap, 1, timeout=20.0))
    assert [one.item for one in results] == items[8:]
    for i, one in enumerate(results, start=8):
        if i == 9:
            assert isinstance(one.result, VolumeError)
            assert (one.result.code, one.result.message) == ("timeout", "could not be read within 20 s")
        else:
            assert same(one, decode_one(items[i], PREPROCESS))


def test_processes_end_with_the_run(items: list[Item]) -> None:
    results = decode(items * 3, PREPROCESS, 2)
    next(results)
    results.close()
    pool = Pool(PREPROCESS, 1, 0, 60.0)
    next(pool.run(iter(items)))
    (process,) = pool.executor._processes.values()
    pool.stop()
    process.join(10)
    assert process.exitcode is not None


def test_readers_that_die_between_two_files_cost_nothing(
    items: list[Item], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastflow.archive.decode.FILES_PER_CHUNK", 1)
    pool = Pool(PREPROCESS, 1, 0, 60.0)
    try:
        results = pool.run(iter(items[:6]))
        first = next(results)
        # Files that were under way are read, so that the next one meets a pool that is broken.
        for _, future in pool.pending:
            future.result(60.0)
        (process,) = pool.executor._processes.values()
        process.kill()
        process.join()
        while not pool.executor._broken:
            time.sleep(0.01)
        for one, item in zip([first, *results], items[:6], strict=True):
            assert same(one, decode_one(item, PREPROCESS))
    finally:
        pool.stop()


def test_counting_in_another_process(scans: Path) -> None:
    assert count_elsewhere(Inputs((str(scans),))) == 20
    with pytest.raises(EOFError):
        count_elsewhere(Inputs(("nowhere.csv",)))


@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become somebody else; for others test_faults has such a file"
)
def test_a_file_that_others_may_not_read(items: list[Item]) -> None:
    # Not below pytest's folder, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        secret = Path(folder) / "secret.nii.gz"
        secret.write_bytes(Path(items[0].path).read_bytes())
        secret.chmod(0)
        (Path(folder) / "closed").mkdir(0o700)
        os.seteuid(65534)
        try:
            found = [
                decode_one(Item(str(path), "x"), PREPROCESS) for path in (secret, Path(folder) / "closed")
            ]
        finally:
            os.seteuid(0)
    for one, message in zip(
        found, ("cannot be read: Permission", "the folder cannot be listed: Permission"), strict=True
    ):
        assert isinstance(one.result, VolumeError)
        assert one.result.code == "unreadable"
        assert message in one.result.message
