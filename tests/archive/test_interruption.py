"""Nothing is lost: out of disk, or torn anywhere, a run is resumed to the rows of a whole one."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fastflow.archive import journal as journal_module
from fastflow.archive.classify import classify
from fastflow.archive.locks import locked
from fastflow.cli.main import app
from fastflow.errors import JournalError, OutputFolderError
from tests.archive.interrupted import BATCH, FEW, few, rows_of, run

pytestmark = pytest.mark.usefixtures("matrix")


class Stop(BaseException):
    """What no part of the run may catch."""


def stopping(
    monkeypatch: pytest.MonkeyPatch, name: str, at: int, before: Callable[..., None] | None = None
) -> None:
    """Let the `at`-th call of a function of `os` stop the run, after `before` did part of its work."""
    original, calls = getattr(os, name), iter(range(10**9))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == at:
            if before is not None:
                before(original, *arguments)
            raise Stop
        return original(*arguments, **options)

    monkeypatch.setattr(os, name, call)


def half(original: Callable[..., Any], handle: int, block: bytes, at: int) -> None:
    original(handle, bytes(block)[: len(block) // 2], at)


@pytest.mark.parametrize(
    ("name", "at", "before"),
    [
        # The first two calls are of the lock and the first batch.
        ("pwrite", 2, half),
        ("pwrite", 3, half),
        ("fdatasync", 0, None),
        ("fdatasync", 3, None),
        # run.json, the result files, the summary.
        ("replace", 0, None),
        ("replace", 1, None),
        ("replace", 2, None),
        ("replace", 3, None),
        ("replace", 4, None),
    ],
)
def test_stopped_between_any_two_steps(
    small: tuple[Path, list[dict[str, Any]]],
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    at: int,
    before: Any,
) -> None:
    source, whole = small
    with monkeypatch.context() as patched:
        stopping(patched, name, at, before)
        with pytest.raises(Stop):
            classify([source], model_folder, tmp_path / "r", batch_size=BATCH, shard_rows=3)
    # What is there is valid: whole rows of the run, in whole files.
    if (tmp_path / "r").exists() and list((tmp_path / "r").glob("results-*")):
        part = rows_of(tmp_path / "r")
        assert part == whole[: len(part)]
    classify([source], model_folder, tmp_path / "r", batch_size=BATCH, shard_rows=3, resume=True)
    assert rows_of(tmp_path / "r") == whole
    assert not list((tmp_path / "r").glob(".*"))


def test_torn_at_any_byte(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source = few(archive, tmp_path, 4)
    out = tmp_path / "r"
    run(source, model_folder, out)
    content, rows = (out / "journal.jsonl").read_bytes(), rows_of(out)
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    # The last two rows are a batch; each cut costs a second.
    for cut in [
        0,
        1,
        ends[1] - 1,
        *range(ends[1], ends[-1], max(1, (ends[-1] - ends[1]) // 12)),
        ends[-1] - 1,
    ]:
        (out / "journal.jsonl").write_bytes(content[:cut])
        before = sum(end <= cut for end in ends)
        assert run(source, model_folder, out, resume=True).new == len(ends) - before
        assert rows_of(out) == rows


def test_garbage_behind_the_last_line_is_cut_off(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 4), tmp_path / "r"
    run(source, model_folder, out)
    rows, journal = rows_of(out), out / "journal.jsonl"
    for garbage in (b"00000000 {", b"\0" * 300, b"deadbeef 00 {}\n"):
        with journal.open("ab") as stream:
            stream.write(garbage)
        assert run(source, model_folder, out, resume=True).new == 0
        assert rows_of(out) == rows


def test_damage_before_the_end_is_told(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path, 4), tmp_path / "r"
    run(source, model_folder, out)
    content = bytearray((out / "journal.jsonl").read_bytes())
    content[len(content) // 2] ^= 1
    (out / "journal.jsonl").write_bytes(content)
    with pytest.raises(JournalError, match=r"journal\.jsonl: the line at byte \d+ is damaged"):
        run(source, model_folder, out, resume=True)
    arguments = [
        "classify",
        str(source),
        "--model",
        str(model_folder),
        "--out",
        str(out),
        "--resume",
        "--batch-size",
        "6",
    ]
    result = CliRunner().invoke(app, arguments)
    # Its result files have another length.
    assert result.exit_code == 2
    assert "shard_rows was 25 and is now 100000" in result.stderr


@pytest.mark.parametrize("fails", ["journal", "results"])
def test_full_disk(
    archive: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    arguments = [
        "classify",
        str(source),
        "--model",
        str(model_folder),
        "--out",
        str(out),
        "--batch-size",
        "6",
    ]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    pwrite, left = os.pwrite, [2000]

    def limited(handle: int, block: bytes, at: int) -> int:
        """A file system that takes what fits and then nothing more."""
        if left[0] == 0:
            raise full
        taken = pwrite(handle, bytes(block)[: left[0]], at)
        left[0] -= taken
        return taken

    def no_room(handle: int) -> None:
        if b"path,size" in os.pread(handle, 100, 0):
            raise full

    with monkeypatch.context() as patched:
        if fails == "journal":
            patched.setattr(journal_module.os, "pwrite", limited)
        else:
            patched.setattr(os, "fsync", no_room)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.stderr
    assert "Traceback" not in result.output
    lines = (out / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert 0 < len(lines) <= FEW - (fails == "journal")
    assert all(line.endswith(b"\n") for line in lines)
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert again.exit_code == 3, again.output
    classify([source], model_folder, tmp_path / "whole", batch_size=BATCH)
    assert rows_of(out) == rows_of(tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_that_is_really_full(
    archive: Path, model_folder: Path, tmp_path: Path, small_disk: Path
) -> None:
    source, out = few(archive, tmp_path, 20), small_disk / "r"
    with pytest.raises(OSError, match="No space left"):
        run(source, model_folder, out)
    assert 0 < len((out / "journal.jsonl").read_bytes().splitlines()) < 20
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    run(source, model_folder, out, resume=True)
    run(source, model_folder, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_second_run_is_refused(archive: Path, model_folder: Path, tmp_path: Path) -> None:
    source, out = few(archive, tmp_path), tmp_path / "r"
    refused = []

    def second(done: int, total: int | None, errors: int) -> None:
        if not refused:
            for options in ({"resume": True}, {"overwrite": True}):
                with pytest.raises(
                    OutputFolderError, match=f"another run is writing here .process {os.getpid()} on "
                ):
                    run(source, model_folder, out, **options)
            refused.append(done)

    run(source, model_folder, out, progress=second)
    assert refused
    run(source, model_folder, tmp_path / "whole")
    assert rows_of(out) == rows_of(tmp_path / "whole")


def test_a_run_that_ended_before_the_lock_was_taken_is_not_cleared(
    archive: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = few(archive, tmp_path, 2), tmp_path / "r"
    out.mkdir()

    def late(folder: Path, enabled: bool) -> Any:
        monkeypatch.undo()
        run(source, model_folder, out)
        return locked(folder, enabled)

    monkeypatch.setattr("fastflow.archive.classify.locked", late)
    with pytest.raises(OutputFolderError, match="holds an earlier run"):
        run(source, model_folder, out)
    assert len(rows_of(out)) == 2
