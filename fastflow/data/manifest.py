"""Manifests: lists of files with their labels, subjects and splits.

A manifest is CSV or TSV with the columns ``path,label,subject,split``, or JSON lines with the same keys; all
but ``path`` may be missing or empty, and `fastflow.data.words` knows their other names. Relative paths are
relative to the manifest's folder.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import json
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

from fastflow._files import write_bytes
from fastflow.data.endings import ending_of
from fastflow.data.folders import index_folder
from fastflow.data.records import Record, class_names, split_by_subject, subject_of
from fastflow.data.tables import SEPARATORS, Table, text_of
from fastflow.data.walk import find_files, walk_files
from fastflow.data.words import NO_LABELS, SPLIT_NAMES, class_name, column_name, find_columns, split_name
from fastflow.errors import ManifestError

# Names that moved to files of their own stay importable from here.
__all__ = [
    "COLUMNS",
    "MANIFESTS",
    "SPLITS",
    "Record",
    "class_names",
    "find_files",
    "index_folder",
    "is_manifest",
    "iterate_manifest",
    "read_manifest",
    "split_by_subject",
    "subject_of",
    "walk_files",
    "write_manifest",
]

COLUMNS = ("path", "label", "subject", "split")
MANIFESTS = (".csv", ".tsv", ".jsonl")
SPLITS = (*SPLIT_NAMES, "validation")
ENDINGS_OF_A_MANIFEST = "a manifest ends in .csv, .tsv or .jsonl"


def is_manifest(path: str | PathLike[str]) -> bool:
    """Whether a file's name is that of a manifest; case does not matter."""
    return os.fspath(path).lower().endswith(MANIFESTS)


def read_manifest(path: str | PathLike[str], label: str | None = None) -> list[Record]:
    """Read a ``.csv``, ``.tsv`` or ``.jsonl`` manifest.

    Args:
        path: of the manifest.
        label: the column that holds the class; any of the names of `label` when None.

    Raises:
        ManifestError: the manifest is missing, empty, malformed, lacks a column or names a file twice; the
            message gives the line.
    """
    records: list[Record] = []
    seen: dict[str, int] = {}
    for line, record in numbered_records(path, label):
        # Another spelling of a path names the same file.
        name = os.path.abspath(record.path)
        if name in seen:
            raise ManifestError(f"{path}, line {line}: {record.path} stands in line {seen[name]} already")
        seen[name] = line
        records.append(record)
    if not records:
        raise ManifestError(f"{path}: the manifest has no entries")
    return records


def iterate_manifest(path: str | PathLike[str]) -> Iterator[Record]:
    """The entries of a manifest one after the other, however long it is.

    A file may be named twice, and a manifest may be empty.

    Raises:
        ManifestError: the manifest is missing, malformed or lacks a column; the message gives the line.
    """
    for _, record in numbered_records(path):
        yield record


def numbered_records(
    path: str | PathLike[str], label: str | None = None, header: Callable[[Sequence[str]], None] | None = None
) -> Iterator[tuple[int, Record]]:
    """(line, entry) of a manifest, as `iterate_manifest` gives them.

    Args:
        path: of the manifest.
        label: see `read_manifest`; `NO_LABELS` leaves them out.
        header: called with the names of the columns of the first row.

    Raises:
        ManifestError: see `iterate_manifest`.
    """
    path = Path(path)
    if not is_manifest(path):
        raise ManifestError(f"{path}: {ENDINGS_OF_A_MANIFEST}")
    wanted = None if label == NO_LABELS else label
    is_json = path.suffix.lower() == ".jsonl"
    rows = _json_rows if is_json else _table_rows
    # Lines end as the format says: universal newlines would change a quoted field.
    with text_of(path, "\n" if is_json else "") as stream:
        for line, row in rows(path, stream, wanted, header or (lambda names: None)):
            record = _record(path, line, row)
            yield line, dataclasses.replace(record, label=None) if label == NO_LABELS else record


Header = Callable[[Sequence[str]], None]


def _table_rows(
    path: Path, stream: TextIO, label: str | None, header: Header
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    table = Table(path, stream, lambda names: any(column_name(name) == "path" for name in names))
    columns = _columns(path, table.line, tuple(table.columns), label)
    if "path" not in columns:
        there = (
            f"the line has {', '.join(map(repr, table.columns))}" if table.columns else "the file is empty"
        )
        if any(map(ending_of, table.columns)):
            there += ", which names a file: write the names of the columns above it"
        elif path.name.endswith(("participants.tsv", "sessions.tsv", "scans.tsv")):
            there += ": a table of BIDS is no manifest, give the dataset's folder"
        raise ManifestError(
            f"{path}, line {table.line}: no column 'path'; columns are {', '.join(COLUMNS)}; {there}"
        )
    header(table.columns)
    for line, cells in table:
        yield line, {name: cells[i] for name, i in columns.items()}


class _Object(list[tuple[str, Any]]):
    """The pairs of a JSON object, in which a key may stand twice."""


def _json_rows(
    path: Path, stream: TextIO, label: str | None, header: Header
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    is_first = True
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content, object_pairs_hook=_Object)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{path}, line {line}: is not JSON: {error}") from error
        if not isinstance(row, _Object):
            raise ManifestError(
                f"{path}, line {line}: must be a JSON object, got {type(row).__name__}; "
                "write one object a line"
            )
        keys = tuple(key for key, _ in row)
        if is_first:
            header(keys)
            is_first = False
        yield line, {name: row[i][1] for name, i in _columns(path, line, keys, label).items()}


def _columns(path: Path, line: int, names: tuple[str, ...], label: str | None) -> dict[str, int]:
    try:
        return _find_columns(names, label)
    except ValueError as error:
        raise ManifestError(f"{path}, line {line}: {error}") from None


_find_columns = functools.lru_cache(maxsize=256)(find_columns)


def _record(path: Path, line: int, row: Mapping[str, Any]) -> Record:
    name = row.get("path")
    if name is not None and (not isinstance(name, str | int) or isinstance(name, bool)):
        raise ManifestError(f"{path}, line {line}: path must be a string, got {_plain(name)!r}")
    name = "" if name is None else str(name).strip()
    if not name:
        raise ManifestError(f"{path}, line {line}: path is empty")
    values: dict[str, str | None] = {}
    for column, read in _READERS.items():
        try:
            values[column] = read(_plain(row.get(column)))
        except ValueError as error:
            raise ManifestError(f"{path}, line {line}: {column} {error}") from None
    file = _below(path.parent, name)
    if not file.endswith(name):
        name = name.replace("\\", "/")
    return Record(file, values["label"], values["subject"] or subject_of(name), values["split"])


_READERS = {"label": class_name, "subject": class_name, "split": split_name}


def _plain(value: Any) -> Any:
    return dict(value) if isinstance(value, _Object) else value


def _below(folder: Path, name: str) -> str:
    """The path of a file that a manifest in `folder` names."""
    if name.startswith("~/"):
        name = os.path.expanduser(name)
    path = _joined(folder, name)
    if (name.isascii() and "\\" not in name) or os.path.lexists(path):
        return path
    others = (
        # Windows separates folders by backslashes, which file names may hold here.
        name.replace("\\", "/"),
        # Other systems write the same letters in another form of Unicode.
        *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")),
    )
    return next((found for other in others if os.path.isfile(found := _joined(folder, other))), path)


def _joined(folder: Path, name: str) -> str:
    """``str(folder / name)``, faster: for millions of entries, most of the time would go into `Path`."""
    if name.startswith("./") or name.endswith(("/", ".")) or "//" in name or "/./" in name:
        return str(folder / name)
    base = str(folder)
    return name if base == "." else os.path.join(base, name)


def write_manifest(records: Iterable[Record], path: str | PathLike[str]) -> None:
    """Write a manifest atomically; files below its folder are written relative to it.

    Raises:
        ManifestError: the name has another ending, or a file's name is not valid Unicode, which only
            ``.jsonl`` can hold.
    """
    path = Path(path)
    if not is_manifest(path):
        raise ManifestError(f"{path}: {ENDINGS_OF_A_MANIFEST}")
    # Links are not followed, since managers of large files link to targets without name, subject and class.
    folder = Path(os.path.abspath(path.parent))
    rows = []
    for record in records:
        file = Path(os.path.abspath(record.path))
        row = dataclasses.asdict(record)
        row["path"] = str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
        rows.append(row)
    stream = io.StringIO(newline="")
    ending = path.suffix.lower()
    if ending == ".jsonl":
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    else:
        # Before 3.13 Python leaves a carriage return unquoted.
        odd = any("\r" in (value or "") for row in rows for value in row.values())
        writer = csv.DictWriter(
            stream,
            COLUMNS,
            delimiter=SEPARATORS[ending][0],
            lineterminator="\n",
            quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL,
        )
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    try:
        content = stream.getvalue().encode("utf-8")
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{path}: a file's name is not valid Unicode; write a .jsonl manifest: {error}"
        ) from error
    write_bytes(path, content)
