"""Tables of text: CSV and TSV files as spreadsheets write them. Torch-free."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

from fastflow.errors import ManifestError

# The separators that are tried, each ending's own first.
SEPARATORS = {".csv": (",", ";", "\t", "|"), ".tsv": ("\t", ",", ";", "|")}
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\s*')
# Beginnings of files that are no UTF-8 text. The first four bytes of two encodings begin alike.
_OTHER_BEGINNINGS = {
    codecs.BOM_UTF32_LE: "is UTF-32 text",
    codecs.BOM_UTF16_LE: "is UTF-16 text (Excel's 'Unicode text')",
    codecs.BOM_UTF16_BE: "is UTF-16 text",
    b"PK\x03\x04": "is a workbook or another ZIP archive, no text",
    b"\xd0\xcf\x11\xe0": "is a workbook of an old Excel, no text",
    b"\x1f\x8b": "is compressed by gzip",
}
_SAVE_AS = "save it as 'CSV UTF-8'"


@contextlib.contextmanager
def text_of(path: Path, newline: str) -> Iterator[TextIO]:
    """A file as UTF-8 text with or without a byte-order mark.

    Raises:
        ManifestError: it cannot be read, or is no UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            beginning = file.peek(512)[:512]
            for mark, what in _OTHER_BEGINNINGS.items():
                if beginning.startswith(mark):
                    raise ManifestError(f"{path}: {what}: {_SAVE_AS}")
            if b"\0" in beginning:
                raise ManifestError(f"{path}: is UTF-16 text, or no text at all: {_SAVE_AS}")
            yield io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)
    except FileNotFoundError:
        if path.is_symlink():
            raise ManifestError(f"{path}: the file that this link names is missing: fetch it") from None
        raise ManifestError(f"{path}: there is no such manifest") from None
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: cannot be read: {error}; {_SAVE_AS}") from error
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read: {error}") from error


class Table:
    """The rows of a table.

    Iterating gives (line, cells) of each row that is not blank. Cells stand without the blanks around them.

    Attributes:
        path: of the file.
        columns: the names in the header; empty where the file is.
        line: in which the header stands.

    Raises:
        ManifestError: it is not CSV, or a row has another number of cells than the header; the message gives
            the line.
    """

    def __init__(self, path: Path, stream: TextIO, suits: Callable[[Sequence[str]], bool]) -> None:
        """Read the header.

        Args:
            path: of the file, for messages and the order in which separators are tried.
            stream: the file's text with newlines as they are.
            suits: whether names are those of a header. The first separator is taken with which they are, or
                the ending's own.
        """
        self.path = path
        self.columns: list[str] = []
        self.line = 1
        separators: tuple[str, ...] = SEPARATORS[path.suffix.lower()]
        skipped = 0
        for header in stream:
            declared = _SEPARATOR_LINE.fullmatch(header)
            if header.strip() and not declared:
                break
            separators = (declared[1],) if declared else separators
            skipped += 1
        else:
            header = ""
        own = separators[0]
        chosen = next((s for s in separators if suits(_cells(header, s))), own)
        self._skipped = skipped
        self._reader = csv.reader(
            itertools.chain([header], stream), delimiter=chosen, strict=True, skipinitialspace=True
        )
        if header:
            with self._named_errors():
                self.columns = [name.strip() for name in next(self._reader)]
            self.line = self._skipped + 1

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        with self._named_errors():
            for row in self._reader:
                cells = [cell.strip() for cell in row]
                if not any(cells):
                    continue
                line = self._skipped + self._reader.line_num
                if len(cells) != len(self.columns):
                    raise ManifestError(
                        f"{self.path}, line {line}: has another number of fields than the header "
                        f"({len(cells)}, not {len(self.columns)})"
                    )
                yield line, cells

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            line = self._skipped + self._reader.line_num
            raise ManifestError(f"{self.path}, line {line}: is not CSV: {error}") from error


def _cells(line: str, separator: str) -> list[str]:
    try:
        cells = next(csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True), [])
    except csv.Error:
        return []
    return [cell.strip() for cell in cells]
