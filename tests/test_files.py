"""Files and folders that are written whole: their permissions, their temporary names, and errors."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflow._files import (
    clear_leftovers,
    is_temporary,
    replacing_folder,
    shortened,
    temporary_name,
    write_bytes,
    write_text,
)


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def failing(number: int) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return call


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_and_folders_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_bytes(tmp_path / "a/b.txt", b"x")
    assert mode(tmp_path / "a/b.txt") == 0o666 & ~umask
    with replacing_folder(tmp_path / "new") as folder:
        write_bytes(folder / "c.txt", b"x")
    assert mode(tmp_path / "new") == mode(tmp_path / "a") == 0o777 & ~umask
    assert mode(tmp_path / "new/c.txt") == 0o666 & ~umask


@pytest.mark.parametrize("before", [0o600, 0o664, 0o440])
def test_what_is_replaced_keeps_its_permissions(tmp_path: Path, before: int) -> None:
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "a.txt").chmod(before)
    write_text(tmp_path / "a.txt", "new")
    assert (mode(tmp_path / "a.txt"), (tmp_path / "a.txt").read_text()) == (before, "new")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(0o2750)
    with replacing_folder(tmp_path / "folder"):
        pass
    assert mode(tmp_path / "folder") == 0o2750


@pytest.mark.parametrize("name", ["fchmod", "chmod"])
def test_permissions_that_cannot_be_changed_stop_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_text(tmp_path / "a.txt", "old")
    (tmp_path / "a.txt").chmod(0o600)
    monkeypatch.setattr(os, name, failing(errno.EPERM))
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    (tmp_path / "folder").mkdir()
    with replacing_folder(tmp_path / "folder") as folder:
        (folder / "b.txt").touch()
    assert (tmp_path / "folder/b.txt").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_need_not_know_how_to_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_names_the_file_and_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=f"cannot write: {os.strerror(number)}.*a.txt") as caught:
        write_text(tmp_path / "a.txt", "new")
    assert caught.value.errno == number and caught.value.filename == str(tmp_path / "a.txt")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]


def test_names_as_long_as_a_name_may_be(tmp_path: Path) -> None:
    for name in ("x" * 255, "é" * 127):
        write_text(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
        with replacing_folder(tmp_path / "folders" / name) as folder:
            (folder / "file").touch()
        assert (tmp_path / "folders" / name / "file").exists()


@given(st.text(st.characters(exclude_characters="/\0"), max_size=300), st.sampled_from(["tmp", "old"]))
def test_temporary_names_are_known_again(name: str, end: str) -> None:
    temporary = temporary_name(name, end)
    assert is_temporary(temporary) and len(temporary.encode("utf-8", "replace")) <= 255
    assert temporary != temporary_name(name, end)


@pytest.mark.parametrize(
    "name", [".a.txt", ".a.txt.abcdefgh", "a.txt.01234567.fastflow-tmp", ".a.0123456x.fastflow-tmp"]
)
def test_other_names_are_not_temporary(name: str) -> None:
    assert not is_temporary(name)


@given(st.text(max_size=40), st.integers(0, 60))
def test_a_shortened_text_fits_and_is_the_beginning(text: str, size: int) -> None:
    short = shortened(text, size)
    assert text.startswith(short) and len(short.encode("utf-8", "replace")) <= size
    assert short == text or len(text[: len(short) + 1].encode("utf-8", "replace")) > size


def test_a_full_disk_says_what_stays_of_a_folder(tmp_path: Path) -> None:
    def fill() -> None:
        with replacing_folder(tmp_path / "folder"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"No space left on device; nothing is left of it: .*folder'"):
        fill()
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"No space left on device; the earlier folder stays: .*folder'"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_places_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(NotADirectoryError, match=r"cannot write: .*/file is a file; name another folder"),
        replacing_folder(tmp_path / "file/new"),
    ):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_killed_replacement_is_undone_or_cleared(tmp_path: Path) -> None:
    aside, half = tmp_path / temporary_name("out", "old"), tmp_path / temporary_name("out")
    others = [".out.abcdefgh", ".output.01234567.fastflow-tmp", ".out.2.01234567.fastflow-old", "notes"]
    for folder in (aside, half, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    clear_leftovers(tmp_path / "out")
    # The earlier folder comes back where the new one never came.
    assert (tmp_path / "out/file").read_text() == aside.name
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}
    aside.mkdir()
    clear_leftovers(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}
