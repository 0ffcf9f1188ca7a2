from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastflow._locks import locked_beside
from fastflow.archive.locks import is_temporary, locked
from fastflow.errors import OutputFolderError


def failing(number: int) -> Any:
    def call(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("hold", [locked, locked_beside])
def test_a_folder_is_held_once(tmp_path: Path, hold: Any) -> None:
    place = tmp_path / "out"
    with (
        hold(place),
        pytest.raises(OutputFolderError, match=f"out: another run is writing here .process {os.getpid()} on"),
        hold(place),
    ):
        pass
    with hold(place):
        pass
    # The lock goes with its holder.
    assert not list(tmp_path.rglob(".*lock"))


def test_a_place_is_held_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    for hold in (locked, locked_beside):
        with (
            hold(tmp_path / "out"),
            pytest.raises(OutputFolderError, match="another run is writing here"),
            hold(tmp_path / "link"),
        ):
            pass


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES])
def test_a_lock_that_is_held_is_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    (tmp_path / ".lock").write_text("process 7 on elsewhere\n")
    monkeypatch.setattr(fcntl, "flock", failing(number))
    with (
        pytest.raises(OutputFolderError, match=r"another run is writing here \(process 7 on elsewhere\)"),
        locked(tmp_path),
    ):
        pass
    assert (tmp_path / ".lock").read_text() == "process 7 on elsewhere\n"


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSYS, "this file system has no locks (Function not implemented)"),
        (errno.EOPNOTSUPP, "this file system has no locks (Operation not supported)"),
        (errno.ENOLCK, "this file system has no locks (No locks available)"),
        (errno.EINVAL, "this file system has no locks (Invalid argument)"),
        (errno.EIO, "no lock can be taken (Input/output error)"),
    ],
)
@pytest.mark.parametrize("hold", [locked, locked_beside])
def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, cause: str, hold: Any
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    place = tmp_path / "out"
    with pytest.raises(OutputFolderError) as caught, hold(place):
        pass
    assert str(caught.value).startswith(f"{place}: {cause}; --no-lock goes on without one, but see to it")
    assert not list(tmp_path.rglob(".*lock"))
    with hold(place, False):
        assert not list(tmp_path.rglob(".*lock"))


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_cannot_be_written_is_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "open", failing(number))
    with (
        pytest.raises(OSError, match=f"cannot write: {os.strerror(number)}; .*'{tmp_path}'"),
        locked(tmp_path),
    ):
        pass


def test_files_are_no_folders(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(OutputFolderError, match="file: must be a folder, it is a file"),
        locked(tmp_path / "file"),
    ):
        pass
    with pytest.raises(OSError, match="/file is a file; name another folder"), locked(tmp_path / "file/out"):
        pass


def test_a_lock_file_that_only_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".lock").write_text("process 7 on elsewhere\n")
    original = os.open

    def guarded(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_ACCMODE == os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, flags, *mode)

    monkeypatch.setattr(os, "open", guarded)
    with locked(tmp_path), pytest.raises(OutputFolderError, match="another run"), locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


def test_a_lock_on_a_file_that_is_gone_is_taken_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not calls:
            # The process that held the lock ends just now, and a third one comes.
            (tmp_path / ".lock").unlink()
            (tmp_path / ".lock").touch()
        calls.append(how)
        original(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(OutputFolderError, match="another run"), locked(tmp_path):
        pass
    assert len(calls) == 3


def test_the_lock_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with locked(tmp_path):
            assert stat.S_IMODE((tmp_path / ".lock").stat().st_mode) == 0o664
    finally:
        os.umask(before)


# The parent is killed, and a child of it lives on.
OUTLIVED = """
import os, subprocess, sys, time
from fastflow._locks import locked
with locked(sys.argv[1]):
    if sys.argv[2] == "fork":
        if os.fork() == 0:
            print(os.getpid(), flush=True)
            time.sleep(60)
            os._exit(0)
    else:
        waiting = [sys.executable, "-c", "import time; time.sleep(60)"]
        print(subprocess.Popen(waiting, close_fds=False).pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["fork", "program"])
def test_no_child_keeps_the_lock_of_a_process_that_died(tmp_path: Path, how: str) -> None:
    command = [sys.executable, "-c", OUTLIVED, str(tmp_path), how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        try:
            with pytest.raises(OutputFolderError, match="another run is writing here"), locked(tmp_path):
                pass
            process.kill()
            process.wait()
            with locked(tmp_path):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_fork_inside_gives_nothing_back(tmp_path: Path) -> None:
    child = None
    try:
        with locked(tmp_path):
            child = os.fork()
            if child == 0:
                raise KeyError
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert (tmp_path / ".lock").exists()
            with pytest.raises(OutputFolderError, match="another run"), locked(tmp_path):
                pass
    finally:
        # The forked process has left the block, and must not go on with the tests.
        if child == 0:
            os._exit(0)


def test_what_a_killed_run_was_writing_goes_with_the_next(tmp_path: Path) -> None:
    own = [
        ".run.json.ab_cd012",
        ".results-00012.parquet.abcdefgh",
        ".journal.jsonl.abcdefgh",
        ".summary.json.abcdefgh",
        ".config.json.0123abcd.fastflow-tmp",
        ".scan 1.png.0123abcd.fastflow-tmp",
    ]
    others = [
        ".run.json",
        ".results-mine.csv.abcdefgh",
        "run.json.abcdefgh",
        ".notes.txt.abcdefgh",
        ".run.json.abcdefgh~",
        "scan.png.0123abcd.fastflow-tmp",
    ]
    for name in own + others:
        (tmp_path / name).touch()
    assert all(map(is_temporary, own)) and not any(map(is_temporary, others))
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", *others])
