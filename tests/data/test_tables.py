from __future__ import annotations

from pathlib import Path

import pytest

from fastflow.data.tables import Table, text_of
from fastflow.errors import ManifestError


def read(path: Path, column: str = "path") -> tuple[list[str], list[tuple[int, list[str]]]]:
    with text_of(path, "") as stream:
        table = Table(path, stream, lambda names: column in names)
        return table.columns, list(table)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".CSV"])
def test_the_separator_is_the_one_that_finds_the_column(tmp_path: Path, separator: str, ending: str) -> None:
    path = tmp_path / f"t{ending}"
    path.write_text(separator.join(["path", "a"]) + "\n" + separator.join(["x.nii", '"1;2,3|4"']) + "\n")
    assert read(path) == (["path", "a"], [(2, ["x.nii", "1;2,3|4"])])


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_as_spreadsheets_write_them(tmp_path: Path, end: str) -> None:
    path = tmp_path / "t.csv"
    lines = ["sep=;", "", " path ; a", 'x.nii; "two', 'lines"', ";", "  ;\t", "y.nii; 1,5"]
    path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
    assert read(path) == (["path", "a"], [(5, ["x.nii", f"two{end}lines"]), (8, ["y.nii", "1,5"])])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "path,a\nx,1\n".encode("utf-16"),
            r"is UTF-16 text \(Excel's 'Unicode text'\): save it as 'CSV UTF-8'",
        ),
        ("path,a\nx,1\n".encode("utf-16-be"), "is UTF-16 text, or no text at all"),
        ("path,a\nx,1\n".encode("utf-32"), "is UTF-32 text"),
        ("path,a\nx,süß\n".encode("latin-1"), "cannot be read: .*save it as 'CSV UTF-8'"),
        (b"PK\x03\x04 and more", "is a workbook"),
        (b"\x1f\x8b and more", "is compressed by gzip"),
        (b"path,a\nx\n", r"line 2: has another number of fields than the header \(1, not 2\)"),
        (b"\n\npath,a\n\nx\n", "line 5: has another number of fields"),
        (b'path,a\nx,"1\n', "line 2: is not CSV"),
        (b'"path,a\n', "line 1: is not CSV"),
    ],
)
def test_files_that_are_no_table_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(ManifestError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


def test_an_empty_file_has_no_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\n\n")
    assert read(tmp_path / "t.csv") == ([], [])
