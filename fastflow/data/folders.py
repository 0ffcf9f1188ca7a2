"""The meaning of a folder of images: classes, splits, or neither. Torch-free.

Folders are ``class/file``, ``split/class/file`` or ``class/split/file``, where `fastflow.data.words` says
which names are splits. What could be read in two ways is refused by name.
"""

from __future__ import annotations

import collections
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from fastflow.data.endings import ENDINGS, ending_of
from fastflow.data.inventory import REASONS, Inventory
from fastflow.data.records import Record, subject_of
from fastflow.data.walk import Passed, walk_files
from fastflow.data.words import class_name, is_split, split_name
from fastflow.errors import ManifestError

LAYOUTS = "folders are class/file or split/class/file"
# Folders of a BIDS subject: sessions, and data types.
_PARTS_OF_A_SUBJECT = re.compile(
    r"ses-\w+|anat|func|dwi|fmap|perf|pet|eeg|meg|ieeg|beh|micr|nirs|motion|mrs", re.ASCII
)
_BIDS_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SUBJECT = re.compile(
    r"sub-[a-z0-9]+|(?:sub|subj|subject|participant|patient|pat|ses|session)[-_ ]?\d+", re.IGNORECASE
)
_NUMBERED_SUBJECT = re.compile(r"sub-\d+")
_MAX_NAMES = 5


class FoundFile(NamedTuple):
    """A regular file.

    Attributes:
        path: where it lies.
        identity: (device, inode).
    """

    path: str
    identity: tuple[int, int]


def regular_files(
    paths: Iterable[str], inventory: Inventory, leave_out: Passed | None = None
) -> Iterator[FoundFile]:
    """Those of the paths that are regular files, which count as used; others are left out with their reason.

    Args:
        paths: as `walk_files` gives them.
        inventory: receives the count of the files.
        leave_out: takes the others; `inventory` does when None.
    """
    leave_out = leave_out or inventory.leave_out
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            reason = _reason_of(error)
        else:
            if stat.S_ISREG(status.st_mode):
                inventory.used += 1
                yield FoundFile(path, (status.st_dev, status.st_ino))
                continue
            reason = "not_a_file" if ending_of(path) else _refusal_of(path)
        leave_out(reason, path, REASONS[reason])


def _reason_of(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return "no_content"
    return "no_permission" if isinstance(error, PermissionError) else "unreadable"


def _refusal_of(folder: str) -> str:
    """The reason for which a folder could not be listed."""
    try:
        with os.scandir(folder):
            return "unreadable"
    except OSError as error:
        return _reason_of(error)


def index_folder(root: str | PathLike[str]) -> list[Record]:
    """Records of the files below a folder, which lie as ``class/file`` or ``split/class/file``.

    The latter is the published layout.

    Raises:
        ManifestError: there is no such folder, no file in it, a file that lies outside a class folder, or
            the folders are neither classes nor splits.
    """
    inventory = Inventory()
    records, _ = list_folder(root, inventory)
    outside = inventory.examples.get("no_class_folder")
    if outside:
        raise ManifestError(f"{outside[0]}: lies in no class folder; {LAYOUTS}")
    return records


def list_folder(root: str | PathLike[str], inventory: Inventory) -> tuple[list[Record], list[str]]:
    """(records of the files below a folder of classes, warnings about classes without a file).

    Args:
        root: the folder.
        inventory: receives the count of the records and of all other files.

    Raises:
        ManifestError: see `index_folder`; files outside of class folders are counted where others are in one.
    """
    root = Path(root)
    if not root.is_dir():
        raise ManifestError(f"{root}: there is no such folder")
    # Cutting off a prefix takes a tenth of the time of making the path relative.
    start = len(os.path.join(root, ""))
    places: set[tuple[str, ...]] = set()

    def leave_out(reason: str, path: str, hint: str | None = None) -> None:
        parts = path[start:].split("/")
        # A folder that cannot be listed is itself the place of its files.
        is_place = reason in ("no_permission", "unreadable") and os.path.isdir(path)
        places.add(tuple(parts if is_place else parts[:-1])[:2])
        inventory.leave_out(reason, path, hint)

    files = list(regular_files(walk_files(root, passed=leave_out), inventory, leave_out))
    if not files:
        raise ManifestError(nothing_below(root, f"{', '.join(ENDINGS)} file", inventory))
    folders = [os.path.dirname(file.path[start:]).split("/") for file in files]
    layout = _layout_of(root, {tuple(filter(None, parts[:3])) for parts in folders})
    records, kept = [], []
    for file, parts in zip(files, folders, strict=True):
        if not parts[0] or len(parts) < layout.depth:
            inventory.drop("no_class_folder", file.path, REASONS["no_class_folder"])
            continue
        label = class_name(parts[layout.class_part])
        split = None if layout.split_part is None else split_name(parts[layout.split_part])
        records.append(Record(file.path, label, subject_of(file.path[start:]), split))
        kept.append(file)
    if not records:
        raise ManifestError(f"{files[0].path}: lies in no class folder; {LAYOUTS}")
    i = layout.class_part
    lost = {class_name(parts[i]) for parts in places if len(parts) > i} - {r.label for r in records}
    warnings = [f"{root}: no file of the class {name!r} can be used" for name in sorted(filter(None, lost))]
    return once_each(records, [file.identity for file in kept], inventory), warnings


def nothing_below(root: str | PathLike[str], what: str, inventory: Inventory) -> str:
    """The message for a folder without a file that can be read, which names those that were found."""
    found = ""
    if inventory.left_out:
        ((most, _),) = inventory.left_out.most_common(1)
        hint = f": {inventory.hints[most]}" if most in inventory.hints else ""
        found = f"; left out were {inventory.reasons()}{hint}"
    return f"{root}: no {what} below this folder{found}"


def once_each(
    records: Sequence[Record], identities: Sequence[object | None], inventory: Inventory
) -> list[Record]:
    """The records without those of a file that is there already; identities of None are all different.

    Raises:
        ManifestError: a file has two labels or splits.
    """
    first: dict[object, Record] = {}
    kept = []
    for record, identity in zip(records, identities, strict=True):
        other = record if identity is None else first.setdefault(identity, record)
        if other is record:
            kept.append(record)
            continue
        for what in ("label", "split"):
            one, two = getattr(other, what), getattr(record, what)
            if one != two:
                raise ManifestError(
                    f"{record.path} is the same file as {other.path}, which has the {what} {one!r}, not "
                    f"{two!r}: remove one of them"
                )
        inventory.drop("duplicate", record.path, REASONS["duplicate"])
    return kept


class _Layout(NamedTuple):
    """Which parts of a file's folders are its class and its split, and how many parts there must be."""

    class_part: int
    split_part: int | None
    depth: int


def _layout_of(root: Path, folders: set[tuple[str, ...]]) -> _Layout:
    """The layout of folders, of each of which the first three parts are given.

    Raises:
        ManifestError: it is none, or could be two.
    """
    tops = sorted({parts[0] for parts in folders if parts})
    splits = [name for name in tops if is_split(name)]
    others = [name for name in tops if not is_split(name)]
    if splits and others:
        raise ManifestError(
            f"{root}: the folders {_named(splits)} are splits, {_named(others)} are none: are these classes? "
            "Rename or move either, or list the files in a manifest with the columns path, label and split"
        )
    layout = _Layout(1, 0, 2) if splits else _layout_of_classes(root, folders, tops)
    classes = sorted({parts[layout.class_part] for parts in folders if len(parts) >= layout.depth})
    _check_classes(root, classes, folders, layout)
    return layout


def _layout_of_classes(root: Path, folders: set[tuple[str, ...]], tops: Sequence[str]) -> _Layout:
    inner: dict[str, set[str | None]] = collections.defaultdict(set)
    for parts in folders:
        if parts:
            inner[parts[0]].add(parts[1] if len(parts) > 1 else None)
    below = set().union(*inner.values())
    splits = sorted(name for name in below if name is not None and is_split(name))
    if not splits:
        return _Layout(0, None, 1)
    if len(splits) < len(below):
        others = sorted(name for name in below - set(splits) if name is not None)
        beside = _named(others) if others else "other files"
        raise ManifestError(
            f"{root}: the folders in {_named(tops)} are splits ({_named(splits)}), beside {beside}. "
            "Folders are class/file, split/class/file or class/split/file: move the files, or list them in a "
            "manifest with the columns path, label and split"
        )
    if len(tops) == 1 and any(len(parts) > 2 for parts in folders):
        raise ManifestError(
            f"{root}: all files lie in {tops[0]!r}, below which there are the splits {_named(splits)} and "
            f"more folders: give {root / tops[0]}"
        )
    return _Layout(0, 1, 2)


def _check_classes(
    root: Path, classes: Sequence[str], folders: set[tuple[str, ...]], layout: _Layout
) -> None:
    """Refuse folders that are subjects, or parts of one, in place of classes."""
    for name in classes:
        if class_name(name) is None:
            raise ManifestError(
                f"{root}: the class folder {name!r} has a name that means 'no class' in tables: rename it"
            )
    i = layout.class_part
    # A subject of BIDS shows by the folders in it, whatever lies beside it.
    subjects = sorted(
        {
            parts[i]
            for parts in folders
            if len(parts) > i + 1
            and _BIDS_SUBJECT.fullmatch(parts[i])
            and _PARTS_OF_A_SUBJECT.fullmatch(parts[i + 1])
        }
    )
    if classes and all(map(_SUBJECT.fullmatch, classes)):
        subjects = list(classes)
    subjects = subjects or [name for name in classes if _NUMBERED_SUBJECT.fullmatch(name)]
    if subjects:
        raise ManifestError(
            f"{root}: the folders {_named(subjects)} are subjects, not classes. Name the field that holds "
            "the class (fastflow index FOLDER --label FIELD), put the files into folders of classes, or list "
            "them in a manifest with the columns path, label and subject"
        )
    if classes and all(map(_PARTS_OF_A_SUBJECT.fullmatch, classes)):
        raise ManifestError(
            f"{root}: the folders {_named(classes)} are parts of a subject, not classes: give the dataset or "
            "a folder of class/file"
        )


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(map(repr, names[:_MAX_NAMES])) + more
