from __future__ import annotations

from pathlib import Path

import pytest

from fastflow.archive.locks import locked
from fastflow.errors import OutputFolderError


def test_a_folder_is_held_once(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(OutputFolderError, match="another run is writing here"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_what_a_killed_run_was_writing_goes_with_the_next(tmp_path: Path) -> None:
    own = [
        ".run.json.ab_cd012",
        ".results-00012.parquet.abcdefgh",
        ".journal.jsonl.abcdefgh",
        ".summary.json.abcdefgh",
    ]
    others = [
        ".run.json",
        ".results-mine.csv.abcdefgh",
        "run.json.abcdefgh",
        ".notes.txt.abcdefgh",
        ".run.json.abcdefgh~",
    ]
    for name in own + others:
        (tmp_path / name).touch()
    with locked(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", *others])
