"""The walk over a folder: files that have the name of an image, and a word on those that are passed over.

Torch-free.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from fastflow.data.endings import HINTS, ending_of, unread_ending_of
from fastflow.data.inventory import REASONS

# A folder with more entries than this is not held in memory to be sorted.
MAX_SORTED_ENTRIES = 1 << 17
# Files with these endings or names lie beside images and hold none: nothing is said about them.
SIDECARS = (
    *(".json", ".jsonl", ".tsv", ".tsv.gz", ".csv", ".txt", ".md", ".rst", ".html", ".pdf", ".xml", ".log"),
    *(".yml", ".yaml", ".toml", ".ini", ".cfg", ".bval", ".bvec", ".mat", ".xlsx", ".xls", ".ods", ".docx"),
    *(".py", ".m", ".sh", ".r", ".ipynb", ".bib", ".db", ".sha1", ".sha256", ".md5", ".lock"),
)
SIDECAR_NAMES = ("README", "CHANGES", "LICENSE", "LICENCE", "CITATION.cff", "DICOMDIR", "Makefile")
Passed = Callable[[str, str, str | None], None]


def find_files(root: str | PathLike[str]) -> list[Path]:
    """Volumes and PNG files below `root`, sorted; hidden files and folders are passed over."""
    return [path for path in map(Path, walk_files(root)) if path.is_file()]


def walk_files(
    root: str | PathLike[str],
    enters: Callable[[tuple[str, ...]], bool] | None = None,
    passed: Passed | None = None,
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
        passed: called with (reason, path, hint) of each file that may hold an image and is not given: its
            ending if it is one of `HINTS`, ``"hidden"`` or ``"other"``. Sidecars are no such files, and
            nothing is said about what hidden folders hold.
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
            stack.append(_list(found, enters, passed))


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


def _list(
    folder: _Folder, enters: Callable[[tuple[str, ...]], bool] | None, passed: Passed | None
) -> Iterator[str | _Folder]:
    try:
        status = os.stat(folder.path)
        above = folder.above | {(status.st_dev, status.st_ino)}
        if above == folder.above:
            return
        for entry in _entries(folder.path):
            is_read = ending_of(entry.name) is not None
            if entry.name.startswith("."):
                if passed is not None and (is_read or unread_ending_of(entry.name)):
                    passed("hidden", entry.path, REASONS["hidden"])
                continue
            if is_read:
                yield entry.path
            inner = (*folder.parts, entry.name)
            if _is_folder(entry):
                if enters is None or enters(inner):
                    yield _Folder(entry.path, inner, above)
            elif passed is not None and not is_read:
                _pass_over(entry, passed)
    except OSError:
        # A folder with a volume's name was given already.
        if not (folder.parts and ending_of(folder.parts[-1])):
            yield folder.path


def _pass_over(entry: os.DirEntry[str], passed: Passed) -> None:
    ending = unread_ending_of(entry.name)
    if ending is not None:
        passed(ending, entry.path, HINTS[ending])
    elif not entry.name.lower().endswith(SIDECARS) and entry.name not in SIDECAR_NAMES:
        passed("other", entry.path, REASONS["other"])


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
