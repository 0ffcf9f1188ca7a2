"""Manifests: lists of files with their labels, subjects and splits.

A manifest is CSV with the columns ``path,label,subject,split``, or JSON lines with the same keys; all but
``path`` may be missing or empty. Relative paths are relative to the manifest's folder. Folders of the
published layout (``split/class/*.png``) and folders of volumes can be indexed into one.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastflow._files import write_bytes
from fastflow.data.endings import ENDINGS, ending_of, without_ending
from fastflow.errors import ManifestError

COLUMNS = ("path", "label", "subject", "split")
MANIFESTS = (".csv", ".jsonl")
# A folder with more entries than this is not held in memory to be sorted.
MAX_SORTED_ENTRIES = 1 << 17
SPLITS = ("train", "val", "validation", "test")
_SUBJECT = re.compile(r"(?:^|_)(sub-[A-Za-z0-9]+)")


@dataclasses.dataclass(frozen=True)
class Record:
    """One file.

    Attributes:
        path: absolute or relative to the working directory.
        label: class name, None when unknown.
        subject: whose file it is; files of one subject never share a test with each other's training.
        split: ``"train"``, ``"val"``, ``"test"`` or any other name, None when not assigned.
    """

    path: str
    label: str | None
    subject: str
    split: str | None = None


def read_manifest(path: str | PathLike[str]) -> list[Record]:
    """Read a ``.csv`` or ``.jsonl`` manifest.

    Raises:
        ManifestError: the manifest is missing, empty, malformed, lacks a column or names a file twice; the
            message gives the line.
    """
    records: list[Record] = []
    seen: dict[str, int] = {}
    for line, record in _numbered(Path(path)):
        if record.path in seen:
            raise ManifestError(
                f"{path}, line {line}: {record.path} stands in line {seen[record.path]} already"
            )
        seen[record.path] = line
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
    for _, record in _numbered(Path(path)):
        yield record


def _numbered(path: Path) -> Iterator[tuple[int, Record]]:
    if path.suffix not in MANIFESTS:
        raise ManifestError(f"{path}: a manifest ends in .csv or .jsonl")
    is_csv = path.suffix == ".csv"
    try:
        # Lines end as the format says: universal newlines would change a quoted field.
        with path.open(encoding="utf-8-sig", newline="" if is_csv else "\n") as stream:
            for line, row in _csv_rows(path, stream) if is_csv else _json_rows(path, stream):
                yield line, _record(path, line, row)
    except FileNotFoundError:
        raise ManifestError(f"{path}: there is no such manifest") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


def _csv_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(stream, strict=True)
    try:
        if "path" not in (reader.fieldnames or ()):
            raise ManifestError(f"{path}, line 1: no column 'path'; columns are {', '.join(COLUMNS)}")
        for row in reader:
            if None in row or any(value is None for value in row.values()):
                raise ManifestError(
                    f"{path}, line {reader.line_num}: has another number of fields than the header"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ManifestError(f"{path}, line {reader.reader.line_num}: is not CSV: {error}") from error


def _json_rows(path: Path, stream: TextIO) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for line, content in enumerate(stream, start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ManifestError(f"{path}, line {line}: is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ManifestError(f"{path}, line {line}: must be a JSON object, got {type(row).__name__}")
        yield line, row


def _record(path: Path, line: int, row: Mapping[str, Any]) -> Record:
    values = {}
    for name in COLUMNS:
        value = row.get(name)
        if value is not None and (not isinstance(value, str | int) or isinstance(value, bool)):
            raise ManifestError(f"{path}, line {line}: {name} must be a string, got {value!r}")
        values[name] = "" if value is None else str(value).strip()
    if not values["path"]:
        raise ManifestError(f"{path}, line {line}: path is empty")
    subject = values["subject"] or subject_of(values["path"])
    return Record(
        _below(path.parent, values["path"]), values["label"] or None, subject, values["split"] or None
    )


def _below(folder: Path, name: str) -> str:
    """``str(folder / name)``, faster: for millions of entries, most of the time would go into `Path`."""
    if name.startswith("./") or name.endswith(("/", ".")) or "//" in name or "/./" in name:
        return str(folder / name)
    base = str(folder)
    return name if base == "." else os.path.join(base, name)


def write_manifest(records: Iterable[Record], path: str | PathLike[str]) -> None:
    """Write a ``.csv`` or ``.jsonl`` manifest atomically; files below its folder are written relative to it.

    Raises:
        ManifestError: the name has another ending, or a file's name is not valid Unicode, which only
            ``.jsonl`` can hold.
    """
    path = Path(path)
    if path.suffix not in MANIFESTS:
        raise ManifestError(f"{path}: a manifest ends in .csv or .jsonl")
    # Links are not followed, since managers of large files link to targets without name, subject and class.
    folder = Path(os.path.abspath(path.parent))
    rows = []
    for record in records:
        file = Path(os.path.abspath(record.path))
        row = dataclasses.asdict(record)
        row["path"] = str(file.relative_to(folder)) if file.is_relative_to(folder) else str(file)
        rows.append(row)
    stream = io.StringIO(newline="")
    if path.suffix == ".csv":
        # Before 3.13 Python leaves a carriage return unquoted.
        odd = any("\r" in (value or "") for row in rows for value in row.values())
        writer = csv.DictWriter(
            stream, COLUMNS, lineterminator="\n", quoting=csv.QUOTE_ALL if odd else csv.QUOTE_MINIMAL
        )
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    else:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    try:
        content = stream.getvalue().encode("utf-8")
    except UnicodeEncodeError as error:
        raise ManifestError(
            f"{path}: a file's name is not valid Unicode; write a .jsonl manifest: {error}"
        ) from error
    write_bytes(path, content)


def find_files(root: str | PathLike[str]) -> list[Path]:
    """Volumes and PNG files below `root`, sorted; hidden files and folders are passed over."""
    return [path for path in map(Path, walk_files(root)) if path.is_file()]


def walk_files(
    root: str | PathLike[str], enters: Callable[[tuple[str, ...]], bool] | None = None
) -> Iterator[str]:
    """Everything below `root` that has the name of a volume or a PNG file, one after the other.

    Files are sorted by the parts of their paths, except within folders of more than `MAX_SORTED_ENTRIES`
    entries, which come as the file system gives them. Hidden files and folders are passed over. Links are
    followed, unless they lead back to a folder on the way. A folder with a volume's name (some archivers make
    them), a broken link, and a folder that cannot be listed are given like files, so that their reader says
    what is wrong.

    Args:
        root: the folder.
        enters: called with the parts of a folder's path relative to `root`; False leaves the folder out.
    """
    # The walk keeps its own stack, as a tree may be deeper than Python's.
    stack: list[Iterator[str | _Folder]] = [iter([_Folder(os.fspath(root), (), frozenset())])]
    while stack:
        found = next(stack[-1], None)
        if found is None:
            stack.pop()
        elif isinstance(found, str):
            yield found
        else:
            stack.append(_list(found, enters))


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder to be listed.

    Attributes:
        path: where it lies.
        parts: the parts of its path below the root.
        above: (device, inode) of the folders on the way to it.
    """

    path: str
    parts: tuple[str, ...]
    above: frozenset[tuple[int, int]]


def _list(folder: _Folder, enters: Callable[[tuple[str, ...]], bool] | None) -> Iterator[str | _Folder]:
    try:
        status = os.stat(folder.path)
        above = folder.above | {(status.st_dev, status.st_ino)}
        if above == folder.above:
            return
        for entry in _entries(folder.path):
            if entry.name.startswith("."):
                continue
            if ending_of(entry.name):
                yield entry.path
            inner = (*folder.parts, entry.name)
            if _is_folder(entry) and (enters is None or enters(inner)):
                yield _Folder(entry.path, inner, above)
    except OSError:
        # A folder with a volume's name was given already.
        if not (folder.parts and ending_of(folder.parts[-1])):
            yield folder.path


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as listing:
        entries = list(itertools.islice(listing, MAX_SORTED_ENTRIES + 1))
        if len(entries) <= MAX_SORTED_ENTRIES:
            entries.sort(key=lambda entry: entry.name)
        yield from entries
        yield from listing


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def subject_of(path: str | PathLike[str]) -> str:
    """The BIDS ``sub-`` entity of a file's name or folders, or the name without its endings."""
    parts = os.fspath(path).split("/")
    for part in reversed(parts):
        match = _SUBJECT.search(part)
        if match:
            return match[1]
    # Only known endings are cut off, as names that are DICOM identifiers are full of dots.
    return without_ending(parts[-1])


def index_folder(root: str | PathLike[str]) -> list[Record]:
    """Records of the files below a folder, which lie as ``class/file`` or ``split/class/file``.

    The latter is the published layout.

    Raises:
        ManifestError: there is no such folder, no file in it, or a file that lies outside a class folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"{root}: there is no such folder")
    files = find_files(root)
    if not files:
        raise ManifestError(f"{root}: no {', '.join(ENDINGS)} file below it")
    records = []
    for file in files:
        parts = file.relative_to(root).parts[:-1]
        split = parts[0] if parts and parts[0] in SPLITS else None
        classes = parts[1:] if split else parts
        if not classes:
            raise ManifestError(
                f"{file}: lies in no class folder; folders are class/file or split/class/file"
            )
        subject = subject_of(file.relative_to(root))
        records.append(Record(str(file), classes[0], subject, "val" if split == "validation" else split))
    return records


def class_names(records: Iterable[Record]) -> tuple[str, ...]:
    """The labels that occur, sorted."""
    return tuple(sorted({record.label for record in records if record.label is not None}))


def split_by_subject(
    records: Sequence[Record], fractions: Mapping[str, float], seed: int = 0
) -> list[Record]:
    """Assign splits by subject, each label's subjects in the same proportions.

    Args:
        records: the files; splits that they have are replaced.
        fractions: share of each split, summing to 1.
        seed: of the shuffling.

    Returns:
        The records in their order, with splits. All files of a subject share one.

    Raises:
        ValueError: the fractions are negative or do not sum to 1.
    """
    if not (all(f >= 0 for f in fractions.values()) and abs(sum(fractions.values()) - 1.0) <= 1e-6):
        raise ValueError(f"fractions must not be negative and sum to 1, got {dict(fractions)}")
    first_label = {record.subject: record.label or "" for record in reversed(records)}
    rng = np.random.default_rng(seed)
    splits: dict[str, str] = {}
    for label in sorted(set(first_label.values())):
        subjects = sorted(subject for subject, own in first_label.items() if own == label)
        rng.shuffle(subjects)
        bounds = np.rint(np.cumsum(list(fractions.values())) * len(subjects)).astype(int)
        bounds[-1] = len(subjects)
        for name, start, stop in zip(fractions, [0, *bounds[:-1]], bounds, strict=True):
            splits |= dict.fromkeys(subjects[start:stop], name)
    return [dataclasses.replace(record, split=splits[record.subject]) for record in records]
