"""Result files: the journal's rows as CSV or Parquet, each file written whole or not at all.

Torch-free.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from fastflow._files import replacing, sync_folder
from fastflow.archive.journal import Journal, Row
from fastflow.errors import OutputFolderError

FORMATS = ("csv", "parquet")
ROWS_PER_FILE = 100_000
# Spreadsheets take text for a formula that begins with one of these.
FORMULA_STARTS = ("=", "+", "-", "@", "\t")
TEXT_COLUMNS = (
    "path",
    "mtime",
    "status",
    "error_code",
    "error_message",
    "label",
    "predicted",
    "argmax",
    "readout",
    "prior",
    "model_hash",
)
_NAME = re.compile(rf"results-(\d{{5,}})\.({'|'.join(FORMATS)})")
# The rows of a Parquet row group are in memory together.
_ROWS_PER_GROUP = 10_000


def columns(names: Sequence[str]) -> list[str]:
    """Names of the columns for a model of these classes."""
    return [
        "path",
        "size",
        "mtime",
        "status",
        "error_code",
        "error_message",
        "label",
        "predicted",
        "argmax",
        "margin",
        "bits_per_dim",
        "typicality",
        "scanner_p",
        *(f"logp_{name}" for name in names),
        *(f"posterior_{name}" for name in names),
        "readout",
        "temperature",
        "prior",
        "model_hash",
        "seconds",
    ]


def cells(row: Row, names: Sequence[str], constant: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a journal's row by column; None where there is nothing to say.

    Args:
        row: of the journal.
        names: K class names.
        constant: ``readout``, ``temperature``, ``prior`` and ``model_hash`` of the run.
    """
    values = dict.fromkeys(columns(names)) | dict(constant)
    # Journals of earlier versions hold the prediction of argmax alone.
    values["argmax"] = row.get("predicted")
    values |= {name: value for name, value in row.items() if name in values}
    if row["mtime_ns"] >= 0:
        with contextlib.suppress(OverflowError, ValueError, OSError):
            # A datetime holds microseconds.
            values["mtime"] = (
                datetime.fromtimestamp(row["mtime_ns"] / 1e9, UTC).isoformat().replace("+00:00", "Z")
            )
    for kind in ("logp", "posterior"):
        values |= {f"{kind}_{name}": value for name, value in zip(names, row.get(kind) or (), strict=False)}
    if row["size"] < 0:
        values["size"] = None
    return values


class _Table(Protocol):
    def write(self, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def close(self) -> None: ...


class _Csv:
    def __init__(self, stream: BinaryIO, names: Sequence[str]) -> None:
        # A file name of another encoding than UTF-8 is no valid Unicode and is written as an escape.
        self.text = io.TextIOWrapper(stream, "utf-8", "backslashreplace", newline="")
        self.writer = csv.writer(self.text, lineterminator="\n")
        self.writer.writerow([safe(name) for name in columns(names)])

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self.writer.writerows([format_cell(value) for value in row.values()] for row in rows)

    def close(self) -> None:
        self.text.flush()
        self.text.detach()


class _Parquet:
    def __init__(self, stream: BinaryIO, names: Sequence[str]) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {name: pyarrow.string() for name in TEXT_COLUMNS} | {"size": pyarrow.int64()}
        self.arrow = pyarrow
        self.schema = pyarrow.schema([(name, kinds.get(name, pyarrow.float64())) for name in columns(names)])
        self.writer = parquet.ParquetWriter(stream, self.schema)

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        group: list[Mapping[str, Any]] = []
        for row in rows:
            group.append({name: _unicode(value) for name, value in row.items()})
            if len(group) == _ROWS_PER_GROUP:
                self._flush(group)
                group = []
        self._flush(group)

    def _flush(self, group: list[Mapping[str, Any]]) -> None:
        if group:
            self.writer.write_table(self.arrow.Table.from_pylist(group, self.schema))

    def close(self) -> None:
        self.writer.close()


def check_format(format: str) -> None:
    """Raise before any work is done.

    Raises:
        ValueError: the format is none of `FORMATS`, or what writes it is not installed.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as error:
            raise ValueError("format 'parquet' needs pyarrow: pip install 'fastflow[parquet]'") from error


@contextlib.contextmanager
def open_table(path: Path, format: str, names: Sequence[str]) -> Iterator[_Table]:
    """A result file under construction, which takes its name when it is whole.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as stream:
        table: _Table = _Csv(stream, names) if format == "csv" else _Parquet(stream, names)
        yield table
        table.close()


@dataclasses.dataclass
class ResultFiles:
    """The result files of a journal: file i holds rows ``i * rows`` to ``(i + 1) * rows - 1``.

    Attributes:
        folder: where ``results-00000.csv`` and so on are written.
        journal: what they are made from.
        names: K class names.
        constant: see `cells`.
        format: one of `FORMATS`.
        rows: of a file.
        done: files that are whole and final.
        start: offset in the journal of the first row that is in none of them.
        waiting: rows from there on.
    """

    folder: Path
    journal: Journal
    names: Sequence[str]
    constant: Mapping[str, Any]
    format: str = "csv"
    rows: int = ROWS_PER_FILE
    done: int = 0
    start: int = 0
    waiting: int = 0

    def path(self, index: int) -> Path:
        """Where a file is."""
        return self.folder / f"results-{index:05d}.{self.format}"

    def add(self, ends: Iterable[int]) -> None:
        """Say at which offsets of the journal new rows end; writes the files that are now complete."""
        for end in ends:
            self.waiting += 1
            if self.waiting == self.rows:
                # A file that has a successor was complete when the successor was begun.
                if not (self.path(self.done).exists() and self.path(self.done + 1).exists()):
                    self._write(end)
                self.start, self.waiting, self.done = end, 0, self.done + 1

    def finish(self) -> list[Path]:
        """Write the last file, which may be shorter, and return all. There is always at least one."""
        if self.waiting or self.done == 0:
            self._write(self.journal.size)
        files = [self.path(i) for i in range(max(1, self.done + (self.waiting > 0)))]
        for path in set(found(self.folder)).difference(files):
            path.unlink()
        sync_folder(self.folder)
        return files

    def _write(self, stop: int) -> None:
        with open_table(self.path(self.done), self.format, self.names) as table:
            table.write(
                cells(row, self.names, self.constant) for _, row in self.journal.read(self.start, stop)
            )


def found(folder: Path) -> list[Path]:
    """Result files in a folder, in order. Files that somebody else named alike are not among them."""
    matches = ((_NAME.fullmatch(path.name), path) for path in folder.glob("results-*"))
    return [path for _, path in sorted((int(match[1]), path) for match, path in matches if match)]


def read_results(folder: str | PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a run's folder as dictionaries; a CSV's values are text.

    Raises:
        OutputFolderError: there is no result file in the folder.
    """
    paths = found(Path(folder))
    if not paths:
        raise OutputFolderError(f"{folder}: there are no results in this folder")
    for path in paths:
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as stream:
                yield from csv.DictReader(stream)
        else:
            from pyarrow import parquet

            with parquet.ParquetFile(path) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()


def format_cell(value: Any) -> str:
    """A value as CSV text: no formula, and ten digits of a number, which is more than a float32 has."""
    if value is None:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else safe(str(value))


def safe(text: str) -> str:
    """Text that no spreadsheet takes for a formula: a leading apostrophe where one would."""
    # The csv module leaves a carriage return unquoted, and readers take it for the end of the row.
    text = text.replace("\r", "\\r")
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def _unicode(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
