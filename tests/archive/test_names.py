"""Names of result files, and the tables that say which is whose."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastflow._places import Kind
from fastflow.archive.names import (
    MAX_STEM_BYTES,
    clean_stem,
    files_in_table,
    replace_files,
    stem_of,
    unique_names,
    write_table,
)
from fastflow.errors import OutputFolderError

KIND = Kind("earlier maps", "maps need a folder of their own")


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        (["scan", "scan", "scan-2"], ["scan", "scan-3", "scan-2"]),
        (["scan-2", "scan", "scan"], ["scan-2", "scan", "scan-3"]),
        (["scan", "scan", "scan-2", "scan-2"], ["scan", "scan-3", "scan-2", "scan-2-2"]),
        (["A", "a"], ["A", "a-2"]),
        (["a", "A", "a-2"], ["a", "A-3", "a-2"]),
        (["\u00e9", "e\u0301"], ["\u00e9", "e\u0301-2"]),
        (["stra\u00dfe", "STRASSE"], ["stra\u00dfe", "STRASSE-2"]),
        ([], []),
    ],
)
def test_a_number_is_no_other_ones_name(wanted: list[str], names: list[str]) -> None:
    assert unique_names(wanted) == names


def test_the_mark_before_a_number_can_be_chosen() -> None:
    assert unique_names(["_65", "_65", "_65_2"], "_") == ["_65", "_65_3", "_65_2"]


@given(
    st.lists(st.sampled_from(["a", "A", "a-2", "A-2", "a-3", "a-2-2", "b", "\u00e9", "e\u0301"]), max_size=9)
)
@example(["a", "a", "A-2", "a-2", "a-3"])
def test_names_are_unique_for_every_file_system(wanted: list[str]) -> None:
    names = unique_names(wanted)
    assert len({unicodedata.normalize("NFC", name).lower() for name in names}) == len(wanted)
    assert names == unique_names(wanted)
    folded = [unicodedata.normalize("NFC", name).lower() for name in wanted]
    for name, want, key in zip(names, wanted, folded, strict=True):
        assert name == want or (folded.count(key) > 1 and name.startswith(f"{want}-"))


@pytest.mark.parametrize(
    ("path", "stem"),
    [
        ("a/sub-001_T1w.nii.gz", "sub-001_T1w"),
        ("a/SCAN.NII.GZ", "SCAN"),
        ("1.2.840.113.nii.gz", "1.2.840.113"),
        ("slice.png", "slice"),
        ("scan 1.nii", "scan 1"),
        (".nii.gz", "input"),
        ("a/.hidden.nii", "_hidden"),
        ("-rf.nii", "_rf"),
        ("=1+1.nii", "_1+1"),
        ("what?.nii", "what_"),
        ("new\nline.nii", "new_line"),
        ("bad\udcff.nii", "bad_"),
        ("CON.nii", "_CON"),
        ("nul.x.nii", "_nul.x"),
        ("console.nii", "console"),
        ("e\u0301.nii", "\u00e9"),
    ],
)
def test_stems_of_inputs(path: str, stem: str) -> None:
    assert stem_of(path) == stem


@given(st.text(max_size=300))
@example("")
@example("...")
@example("\u00e9" * 200)
@example("x" * 179 + "\u00e9")
def test_a_clean_stem_is_a_file_name_everywhere(text: str) -> None:
    stem = clean_stem(text)
    assert 0 < len(stem.encode()) <= MAX_STEM_BYTES + 1
    assert not set(stem) & set('<>:"/\\|?*\0\n\r\t')
    assert stem[0] not in ".-+=@" and stem[-1] not in ". "
    assert clean_stem(stem) == stem


def test_a_table_gives_its_names_back(tmp_path: Path) -> None:
    rows = [{"file": "a-1.png", "class": "<65"}, {"file": "b,1.png", "class": "=x"}, {"class": "none"}]
    write_table(tmp_path / "t.csv", ("file", "class"), rows)
    assert (tmp_path / "t.csv").read_text() == 'file,class\na-1.png,<65\n"b,1.png",\'=x\n,none\n'
    assert files_in_table(tmp_path / "t.csv", "file") == ["a-1.png", "b,1.png"]
    assert files_in_table(tmp_path / "gone.csv", "file") == []


def test_a_table_names_no_file_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("file\n../a.png\n/etc/passwd\n..\nfine.png\n")
    assert files_in_table(tmp_path / "t.csv", "file") == ["fine.png"]


@pytest.mark.parametrize("content", [b"other\nx\n", b"file\n\xff\xfe\n"])
def test_a_table_that_is_none_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(OutputFolderError, match=r"t\.csv cannot be read .* which files may be replaced"):
        files_in_table(tmp_path / "t.csv", "file")


def test_only_own_files_are_replaced(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "mine.txt", "c.png"):
        (tmp_path / name).touch()
    for wanted in ("c.png", "C.png"):
        with pytest.raises(
            OutputFolderError, match=r"holds other files, such as 'c\.png', which would be repl"
        ):
            replace_files(tmp_path, ["a.png", "b.png"], ["a.png", wanted], KIND)
    assert len(list(tmp_path.iterdir())) == 4
    replace_files(tmp_path, ["a.png", "b.png", "gone.png"], ["a.png", "d.png"], KIND)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.png", "mine.txt"]
