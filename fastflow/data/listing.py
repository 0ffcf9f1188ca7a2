"""Labelled files with splits, from a manifest, a folder of classes or a BIDS dataset. Torch-free."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path

from fastflow.data.bids import is_dataset, subjects_in
from fastflow.data.bids_labels import list_bids
from fastflow.data.folders import list_folder, once_each
from fastflow.data.inventory import REASONS, Inventory
from fastflow.data.manifest import ENDINGS_OF_A_MANIFEST, Record, is_manifest, numbered_records
from fastflow.data.words import NO_LABELS, alike, column_name, find_columns
from fastflow.errors import ManifestError

# So many pairs of subjects that may be one are named.
MAX_NAMED = 5


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        records: those that can be used, as far as their names and rows tell.
        inventory: how many were found, and why some are no records. ``inventory.used == len(records)``.
        warnings: sentences on what may not be meant, such as two classes that differ in case only.
        other_columns: of a manifest, which no record holds.
    """

    records: list[Record]
    inventory: Inventory
    warnings: tuple[str, ...] = ()
    other_columns: tuple[str, ...] = ()


def list_records(source: str | PathLike[str], label: str | None = None) -> Listing:
    """List a manifest, a folder of classes with or without splits, or a BIDS dataset.

    Labels and splits are normalised by `fastflow.data.words`. ``docs/data.md`` tells what a source may look
    like and what is counted.

    Args:
        source: the manifest or folder.
        label: the field of a BIDS dataset, or the column of a manifest, that holds the class; ``"none"`` for
            records without labels.

    Raises:
        ManifestError: it cannot be read, or could be read in two ways; the message says which.
    """
    source, inventory = Path(source), Inventory()
    if label is not None and column_name(label) == "subject":
        raise ManifestError(f"{source}: {label!r} names subjects, which are no classes (--label)")
    if not source.is_dir():
        return _list_manifest(source, label, inventory)
    if is_dataset(source) or (label is not None and any(subjects_in(source))):
        records, warnings = list_bids(source, label, inventory)
        return Listing(records, inventory, (*warnings, *_warnings(records)))
    if label is not None:
        raise ManifestError(
            f"{source}: a label field (--label {label}) belongs to BIDS datasets and manifests; "
            "in a folder of class/file the folders are the classes"
        )
    records, warnings = list_folder(source, inventory)
    return Listing(records, inventory, (*warnings, *_warnings(records)))


def _list_manifest(path: Path, label: str | None, inventory: Inventory) -> Listing:
    if not path.exists() and not is_manifest(path):
        raise ManifestError(f"{path}: there is no such file or folder; {ENDINGS_OF_A_MANIFEST}")
    columns: list[str] = []
    records = list(_unique_rows(path, label, columns, inventory))
    if not records:
        raise ManifestError(f"{path}: the manifest has no entries")
    identities = [_identity_of(record.path) for record in records]
    warnings = []
    absent = [record.path for record, file in zip(records, identities, strict=True) if file is None]
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        hint = "; on this system folders are separated by /" if "\\" in absent[0] else ""
        warnings.append(f"{path} names files that are not there: {absent[0]}{more}{hint}")
    records = once_each(records, identities, inventory)
    used = find_columns(columns, None if label == NO_LABELS else label)
    others = [name for i, name in enumerate(columns) if name and i not in used.values()]
    unlabelled = sum(record.label is None for record in records)
    if label is None and "label" not in used and unlabelled == len(records):
        hint = "the manifest has no column 'label'"
        hint += f"; --label NAME takes one of {', '.join(others)}" if others else ""
        # Whoever leaves entries out for want of a label shows it.
        inventory.hints["no_label"] = hint
        warnings.append(hint)
    elif unlabelled and label != NO_LABELS:
        count = f"{unlabelled} of {len(records)} entries"
        warnings.append(f"{path}: {count} have no label, and training leaves them out")
    return Listing(records, inventory, (*warnings, *_warnings(records)), tuple(others))


def _unique_rows(path: Path, label: str | None, columns: list[str], inventory: Inventory) -> Iterator[Record]:
    """The entries of a manifest; one that says again what an earlier one said is counted.

    Raises:
        ManifestError: two entries say different things about one file.
    """
    seen: dict[str, tuple[int, Record]] = {}
    for line, record in numbered_records(path, label, columns.extend):
        inventory.used += 1
        first, other = seen.setdefault(os.path.abspath(record.path), (line, record))
        if other is record:
            yield record
            continue
        for what in ("label", "split", "subject"):
            one, two = getattr(other, what), getattr(record, what)
            if one != two:
                raise ManifestError(
                    f"{path}, line {line}: {record.path} has the {what} {two!r}, but {one!r} in line {first}"
                )
        inventory.drop("duplicate", f"{record.path} (line {line})", REASONS["duplicate"])


def _identity_of(path: str) -> tuple[int, int] | None:
    """(device, inode) of a file, None where there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _warnings(records: Sequence[Record]) -> tuple[str, ...]:
    classes = alike({record.label for record in records if record.label is not None})
    subjects = alike({record.subject for record in records}, str.casefold)
    return (
        *(f"the classes {one!r} and {other!r} differ in case or separators only" for one, other in classes),
        *(f"the subjects {one!r} and {other!r} differ in case only" for one, other in subjects[:MAX_NAMED]),
    )
