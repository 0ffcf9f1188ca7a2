"""File names of results: unique, and fit for other file systems; tables of which is whose. Torch-free."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastflow._files import shortened, write_text
from fastflow._places import Kind, names_in
from fastflow.archive.results import format_cell
from fastflow.data.endings import without_ending
from fastflow.errors import OutputFolderError

# With a number, an ending and the marks of a temporary file, a name still has fewer than 255 bytes.
MAX_STEM_BYTES = 180
_NOT_ALLOWED = '<>:"/\\|?*'
# Control and format characters, halves of surrogate pairs, and separators of lines.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
_RESERVED = re.compile(r"(con|prn|aux|nul|com[1-9]|lpt[1-9])(\..*)?", re.IGNORECASE)


# -- names ---------------------------------------------------------------------------------------------------


def stem_of(path: str) -> str:
    """The name of an input without its folder and ending, fit to begin a file name anywhere."""
    return clean_stem(without_ending(Path(path).name) or "input")


def clean_stem(text: str) -> str:
    """A text fit to begin a file name: characters that some file system stumbles over become ``_``.

    It is in Unicode's composed form, has at most `MAX_STEM_BYTES` bytes, is not empty, begins with no dot or
    sign, and ends with no dot or blank.
    """
    text = unicodedata.normalize("NFC", text)
    text = "".join(
        "_" if character in _NOT_ALLOWED or unicodedata.category(character) in _UNSEEN else character
        for character in text
    )
    text = shortened(text, MAX_STEM_BYTES)
    # A name with such a beginning is hidden, an option, or a formula in a table.
    bare = text.lstrip(".-+=@")
    text = "_" * (len(text) - len(bare)) + bare
    bare = text.rstrip(". ")
    text = bare + "_" * (len(text) - len(bare))
    return f"_{text}" if not text or _RESERVED.fullmatch(text) else text


def unique_names(wanted: Sequence[str], mark: str = "-") -> list[str]:
    """The wanted names, of which one that occurred before gets a number: ``scan``, ``scan-2``.

    A numbered name is no other's own name. Names that differ only in case or in Unicode's form are equal to
    some file systems, and so they are here. Equal sequences give equal names.

    Args:
        wanted: names, which may be equal.
        mark: stands before a number.
    """
    own = {_key(name) for name in wanted}
    used: set[str] = set()
    numbers: dict[str, int] = {}
    names = []
    for name in wanted:
        key, unique = _key(name), name
        if key in used:
            number = numbers.get(key, 2)
            while _key(f"{name}{mark}{number}") in own or _key(f"{name}{mark}{number}") in used:
                number += 1
            numbers[key] = number + 1
            unique = f"{name}{mark}{number}"
        used.add(_key(unique))
        names.append(unique)
    return names


def _key(name: str) -> str:
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


# -- tables --------------------------------------------------------------------------------------------------


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV; text that a spreadsheet would take for a formula gets a leading apostrophe.

    Raises:
        OSError: it cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([format_cell(row.get(column)) for column in columns] for row in rows)
    write_text(path, text.getvalue())


def files_in_table(path: Path, column: str) -> list[str]:
    """The names that a column of an earlier table holds; none where there is no table.

    Raises:
        OutputFolderError: it cannot be read as such a table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as stream:
            names = [row[column] or "" for row in csv.DictReader(stream)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise OutputFolderError(
            f"{path} cannot be read ({error}), so it is not known which files may be replaced; "
            "name another folder"
        ) from error
    # Whoever changed the table must not make this remove files elsewhere.
    return [name for name in names if name not in ("", ".", "..") and Path(name).name == name]


def replace_files(folder: Path, mine: Iterable[str], wanted: Iterable[str], kind: Kind) -> None:
    """Remove the files of an earlier run from a folder, and nothing else.

    Args:
        folder: the folder.
        mine: names of the earlier run's files.
        wanted: names of the files that will be written.
        kind: what they are.

    Raises:
        OutputFolderError: a wanted name is that of a file which is none of the earlier run's; nothing is
            removed then.
    """
    own = set(mine)
    others = {_key(name): name for name in names_in(folder) if name not in own}
    taken = [others[_key(name)] for name in wanted if _key(name) in others]
    if taken:
        raise OutputFolderError(
            f"{folder}: holds other files, such as {taken[0]!r}, which would be replaced; {kind.own}"
        )
    for name in sorted(own):
        (folder / name).unlink(missing_ok=True)
