"""Folders that commands write into: what may be in one, and whether it can be written."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from fastflow._files import temporary_name
from fastflow._places import (
    Kind,
    check_place,
    check_writable,
    held,
    make_folder,
    names_in,
    telling_what_stays,
    warn_of_low_space,
    without_mark,
)
from fastflow.errors import LowSpaceWarning, OutputFolderError

MAPS = Kind("earlier maps", "maps need a folder of their own")
MARK = without_mark("maps.csv")


def test_what_may_be_in_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert not check_place(out, MAPS, MARK, False)
    out.mkdir()
    # Locks, and what killed runs left, are nobody's.
    for name in (".lock", temporary_name("maps.csv"), ".run.json.abcdefgh"):
        (out / name).touch()
    assert names_in(out) == [] and not check_place(out, MAPS, MARK, False)
    (out / "notes.txt").touch()
    for may_replace in (False, True):
        with pytest.raises(
            OutputFolderError,
            match=r"holds other files, such as 'notes\.txt'; maps need a folder of their own",
        ):
            check_place(out, MAPS, MARK, may_replace)
    (out / "maps.csv").touch()
    with pytest.raises(
        OutputFolderError, match=re.escape("holds earlier maps; replace it (--overwrite) or name another")
    ):
        check_place(out, MAPS, MARK, False)
    assert check_place(out, MAPS, MARK, True)
    with pytest.raises(OutputFolderError, match=r"notes\.txt: must be a folder, it is a file"):
        check_place(out / "notes.txt", MAPS, MARK, True)


def test_a_folder_is_made_and_tried(tmp_path: Path) -> None:
    assert make_folder(tmp_path / "a/b") and not make_folder(tmp_path / "a/b")
    assert list((tmp_path / "a/b").iterdir()) == []
    check_writable(tmp_path / "c/d/e")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


CANNOT = {
    errno.EROFS: "Read-only file system; name another folder",
    errno.EACCES: "Permission denied; name another folder",
    errno.ENOSPC: "No space left on device; free some space or name another folder",
    errno.EDQUOT: "Disk quota exceeded; free some space or name another folder",
}


@pytest.mark.parametrize("number", CANNOT)
@pytest.mark.parametrize("call", ["open", "write"])
@pytest.mark.parametrize("check", [make_folder, check_writable])
def test_a_folder_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str, check: Any
) -> None:
    def fail(*arguments: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=f"cannot write: {CANNOT[number]}: '{tmp_path}/new'") as caught:
        check(tmp_path / "new")
    assert caught.value.errno == number
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("check", [make_folder, check_writable])
def test_files_and_links_are_no_folders(tmp_path: Path, check: Any) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputFolderError, match="file: must be a folder, it is a file"):
        check(tmp_path / "file")
    with pytest.raises(OSError, match=f"cannot write: {tmp_path}/file is a file; name another folder"):
        check(tmp_path / "file/a/b")
    with pytest.raises(OutputFolderError, match="link: must be a folder, it is a link that leads nowhere"):
        check(tmp_path / "link")
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "gone").exists()


State = namedtuple("State", "f_bavail f_frsize f_blocks")


@pytest.mark.parametrize(
    ("state", "needed", "warned"),
    [
        (State(1000, 1000, 10**6), 0, True),
        (State(10**5, 1000, 10**6), 0, False),
        (State(10**5, 1000, 10**6), 10**9, True),
        # Some file systems count no blocks at all.
        (State(0, 1000, 0), 10**9, False),
    ],
)
def test_little_space_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: State, needed: int, warned: bool
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda folder: state)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_low_space(tmp_path, needed)
    assert [warning.category for warning in caught] == [LowSpaceWarning] * warned
    if warned:
        assert f"{tmp_path}: only {state.f_bavail / 1000:.1f} MB are free there" == str(caught[0].message)


def test_a_held_folder_goes_again_where_nothing_was_put_into_it(tmp_path: Path) -> None:
    def fail() -> None:
        with held(tmp_path / "new", lambda: None):
            assert sorted(os.listdir(tmp_path / "new")) == [".lock"]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path / "new", lambda: None, lock=False):
        assert os.listdir(tmp_path / "new") == []
        (tmp_path / "new/file").touch()
    assert os.listdir(tmp_path / "new") == ["file"]


def test_a_folder_is_checked_once_more_under_the_lock(tmp_path: Path) -> None:
    checks = iter([None, OutputFolderError("taken meanwhile")])

    def check() -> None:
        error = next(checks)
        if error is not None:
            raise error

    with pytest.raises(OutputFolderError, match="taken meanwhile"), held(tmp_path / "new", check):
        raise AssertionError("the body must not run")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_says_what_stays(tmp_path: Path) -> None:
    def fail(error: OSError) -> None:
        with telling_what_stays(tmp_path, lambda: "two rows stay"):
            raise error

    with pytest.raises(OSError, match="cannot write: No space left on device; two rows stay: '/a/b'"):
        fail(OSError(errno.ENOSPC, "cannot write: No space left on device", "/a/b"))
    with pytest.raises(OSError, match=f"cannot write: full; two rows stay: '{tmp_path}'"):
        fail(OSError(errno.EDQUOT, "full"))
    with pytest.raises(PermissionError, match=r"^\[Errno 13\] no$"):
        fail(OSError(errno.EACCES, "no"))
