from __future__ import annotations

import csv
import errno
import io
import resource
import signal
from pathlib import Path
from typing import Any

import pytest

from fastflow.archive.journal import Journal
from fastflow.archive.results import (
    ResultFiles,
    cells,
    check_format,
    columns,
    format_cell,
    found,
    read_results,
    safe,
)
from fastflow.errors import OutputFolderError

NAMES = ("old", "=young")
CONSTANT = {"temperature": 5.0, "prior": "uniform", "model_hash": "abc"}


def row(i: int, **changes: Any) -> dict[str, Any]:
    scores = {
        "logp": [-100.5 - i, -200.0],
        "posterior": [0.75, 0.25],
        "margin": 1.5,
        "bits_per_dim": 4.0,
        "typicality": None,
    }
    known = {
        "path": f"a{i}.nii",
        "size": 7,
        "mtime_ns": 1_700_000_000_123_456_789,
        "status": "ok",
        "label": "old",
        "seconds": 0.5,
    }
    return known | scores | {"predicted": "=young"} | changes


def write(folder: Path, count: int, format: str = "csv", rows: int = 4) -> ResultFiles:
    journal = Journal(folder / "j")
    made = ResultFiles(folder, journal, NAMES, CONSTANT, format, rows)
    for i in range(count):
        made.add(journal.append([(bytes(16), row(i))]))
    return made


@pytest.mark.parametrize("format", ["csv", "parquet"])
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 9])
def test_files_hold_the_journal(tmp_path: Path, format: str, count: int) -> None:
    made = write(tmp_path, count, format)
    assert len(list(tmp_path.glob("results-*"))) == count // 4
    files = made.finish()
    assert [path.name for path in files] == [
        f"results-{i:05d}.{format}" for i in range(max(1, -(-count // 4)))
    ]
    assert sorted(tmp_path.glob("results-*")) == files
    found = list(read_results(tmp_path))
    assert [row["path"] for row in found] == [f"a{i}.nii" for i in range(count)]
    assert all(float(row["logp_old"]) == -100.5 - i for i, row in enumerate(found))
    # Made again, from the journal alone, they are the same.
    content = [path.read_bytes() for path in files]
    for lost in files:
        lost.unlink()
        again = ResultFiles(tmp_path, made.journal, NAMES, CONSTANT, format, 4)
        again.add(made.journal.ends())
        assert again.finish() == files
        assert [path.read_bytes() for path in files] == content


def test_files_that_are_no_longer_needed_go(tmp_path: Path) -> None:
    write(tmp_path, 9).finish()
    journal = Journal.open(tmp_path / "j")
    journal.keep(lambda key, row: row["path"] < "a3")
    for path in tmp_path.glob("results-*"):
        path.unlink()
    (tmp_path / "results-00007.csv").write_text("of another run")
    made = ResultFiles(tmp_path, journal, NAMES, CONSTANT, rows=4)
    made.add(journal.ends())
    assert [path.name for path in made.finish()] == ["results-00000.csv"]
    assert [path.name for path in tmp_path.glob("results-*")] == ["results-00000.csv"]


def test_values_stand_in_their_columns() -> None:
    values = cells(row(0), NAMES, CONSTANT)
    assert list(values) == columns(NAMES)
    assert values["mtime"] == "2023-11-14T22:13:20.123457Z"
    assert (values["logp_old"], values["logp_=young"], values["posterior_=young"]) == (-100.5, -200.0, 0.25)
    assert (values["prior"], values["temperature"], values["model_hash"]) == ("uniform", 5.0, "abc")
    assert (values["error_code"], values["typicality"]) == (None, None)
    error = {
        "path": "x",
        "size": -1,
        "mtime_ns": -1,
        "status": "error",
        "error_code": "missing",
        "label": None,
        "seconds": 0.0,
    }
    values = cells(error, NAMES, CONSTANT)
    assert (values["size"], values["mtime"], values["logp_old"], values["predicted"]) == (
        None,
        None,
        None,
        None,
    )
    # No clock can have shown it, but a file system can.
    assert cells(row(0, mtime_ns=10**25), NAMES, CONSTANT)["mtime"] is None


@pytest.mark.parametrize("name", ["=1+1.nii", "+x.nii", "-x.nii", "@x.nii", "\tx.nii"])
def test_formulas_are_disarmed(tmp_path: Path, name: str) -> None:
    journal = Journal(tmp_path / "j")
    made = ResultFiles(tmp_path, journal, NAMES, CONSTANT)
    made.add(journal.append([(bytes(16), row(0, path=name, label="=label", margin=-1.0))]))
    (path,) = made.finish()
    header, line = csv.reader(io.StringIO(path.read_text(), newline=""))
    values = dict(zip(header, line, strict=True))
    assert values["path"] == f"'{name}"
    assert (values["label"], values["predicted"]) == ("'=label", "'=young")
    # Numbers stay numbers.
    assert (values["margin"], values["logp_=young"]) == ("-1", "-200")


def test_text_and_numbers() -> None:
    assert safe("a\rb") == "a\\rb"
    assert [format_cell(v) for v in (None, 1.0, -30000.123456789, float("inf"), 7, "x")] == [
        "",
        "1",
        "-30000.12346",
        "inf",
        "7",
        "x",
    ]


def test_formats_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="format must be one of csv, parquet, got 'xlsx'"):
        check_format("xlsx")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(
        ValueError, match=r"format 'parquet' needs pyarrow: pip install 'fastflow\[parquet\]'"
    ):
        check_format("parquet")
    check_format("csv")


def test_no_results(tmp_path: Path) -> None:
    with pytest.raises(OutputFolderError, match="there are no results"):
        next(read_results(tmp_path))


def test_only_its_own_names_are_result_files(tmp_path: Path) -> None:
    mine = ["results-mine.csv", "results-00001.csv.bak", "results-1.csv", "results-00001.txt", "results-.csv"]
    for name in [*mine, "results-99999.csv", "results-100000.csv", "results-00002.parquet"]:
        (tmp_path / name).touch()
    assert [path.name for path in found(tmp_path)] == [
        "results-00002.parquet",
        "results-99999.csv",
        "results-100000.csv",
    ]
    write(tmp_path, 1).finish()
    assert sorted(path.name for path in tmp_path.glob("results-*")) == sorted([*mine, "results-00000.csv"])


@pytest.mark.parametrize("format", ["csv", "parquet"])
def test_a_disk_that_is_full_is_named_with_the_file(tmp_path: Path, format: str) -> None:
    made = write(tmp_path, 3, format)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write: File too large: .*results-00000") as caught:
            made.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EFBIG
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
    made.finish()
    assert len(list(read_results(tmp_path))) == 3
