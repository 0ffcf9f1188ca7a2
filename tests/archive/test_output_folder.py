from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from fastflow.archive.classify import classify
from fastflow.errors import OutputFolderError

pytestmark = pytest.mark.usefixtures("loaded_once")


def test_files_follow_the_umask(few_scans: Path, model_folder: Path, tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        classify([few_scans], model_folder, tmp_path / "r")
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "r").iterdir()} == {"0o664"}


def test_a_file_system_without_locks(
    few_scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        OutputFolderError, match=r"this file system has no locks \(Function not implemented\)"
    ):
        classify([few_scans], model_folder, tmp_path / "r")
    assert not (tmp_path / "r").exists()
    assert classify([few_scans], model_folder, tmp_path / "r", lock=False).total == 6
    assert classify([few_scans], model_folder, tmp_path / "r", lock=False, resume=True).new == 0


def test_a_new_folder_that_another_run_takes_first_is_left_to_it(
    few_scans: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def beaten(folder: Path, enabled: bool) -> Any:
        classify_files(folder)
        raise OutputFolderError("another run is writing here")

    def classify_files(folder: Path) -> None:
        for name in (".lock", "run.json", "journal.jsonl"):
            (folder / name).write_text("theirs")

    monkeypatch.setattr("fastflow.archive.classify.locked", beaten)
    with pytest.raises(OutputFolderError, match="another run is writing here"):
        classify([few_scans], model_folder, tmp_path / "r")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [".lock", "journal.jsonl", "run.json"]
