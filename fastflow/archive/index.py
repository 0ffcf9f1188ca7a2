"""Indexing: from files to a manifest with splits. Torch-free."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path

from fastflow._files import write_text
from fastflow._places import check_writable
from fastflow.data.listing import Listing, list_records
from fastflow.data.manifest import (
    ENDINGS_OF_A_MANIFEST,
    Record,
    is_manifest,
    split_by_subject,
    write_manifest,
)
from fastflow.data.words import SPLIT_NAMES
from fastflow.errors import ManifestError, OutputFolderError

# The counts of a manifest stand beside it in a file of its name with this ending.
INVENTORY_ENDING = ".inventory.json"


def index_archive(
    source: str | PathLike[str],
    out: str | PathLike[str],
    fractions: Mapping[str, float],
    seed: int = 0,
    resplit: bool = False,
    label: str | None = None,
    overwrite: bool = True,
) -> list[Record]:
    """Write a manifest of `source`, and beside it the count of what was found.

    Args:
        source: a folder of ``class/file`` or ``split/class/file``, a BIDS dataset, or a manifest.
        out: the manifest to write.
        fractions: share of the subjects in each split; used where no file has a split, or with `resplit`.
        seed: of the shuffling.
        resplit: replace splits that are there.
        label: the field of a BIDS dataset, or the column of a manifest, that holds the class; ``"none"`` for
            a manifest without labels.
        overwrite: replace a manifest that is there; the command `fastflow index` does so only when asked.

    Returns:
        The records that were written.

    Raises:
        ManifestError: the source cannot be read, some files have a split and others none, or a subject is in
            two splits.
        OutputFolderError: `out` exists and is not to be replaced.
        ValueError: the fractions do not sum to 1.
    """
    return write_index(source, out, fractions, seed, resplit, label, overwrite).records


def write_index(
    source: str | PathLike[str],
    out: str | PathLike[str],
    fractions: Mapping[str, float],
    seed: int = 0,
    resplit: bool = False,
    label: str | None = None,
    overwrite: bool = False,
) -> Listing:
    """Write a manifest as `index_archive` does, and give its counts and warnings beside its records.

    Raises:
        ManifestError: see `index_archive`, which tells the arguments too.
        OutputFolderError: `out` exists and is not to be replaced.
        OSError: the manifest cannot be written there, or the disk is full.
        ValueError: the fractions do not sum to 1.
    """
    if not is_manifest(out):
        raise ManifestError(f"{out}: {ENDINGS_OF_A_MANIFEST}")
    if os.path.lexists(out) and not overwrite:
        raise OutputFolderError(
            f"{out}: there is such a file; replace it (--overwrite) or name another (--out)"
        )
    check_writable(Path(out).parent)
    found = list_records(source, label)
    records = found.records
    have = [record.split is not None for record in records]
    empty: list[str] = []
    if resplit or not any(have):
        records = split_by_subject(records, fractions, seed)
        empty = empty_splits(records, fractions)
    elif not all(have):
        missing = records[have.index(False)].path
        raise ManifestError(
            f"{source}: {missing} has no split, others have one; "
            "assign all or none, or split anew (--resplit)"
        )
    check_subjects(records)
    write_manifest(records, out)
    counts = json.dumps({"source": os.path.abspath(source), **found.inventory.to_dict()}, indent=1)
    write_text(f"{out}{INVENTORY_ENDING}", counts + "\n")
    warnings = [*found.warnings, *empty, *unused_splits(records), *missing_classes(records)]
    if found.other_columns:
        warnings.append(f"{out} does not keep the columns {', '.join(found.other_columns)}")
    return Listing(records, found.inventory, tuple(warnings))


def check_subjects(records: list[Record]) -> None:
    """Raise ManifestError where a subject is in two splits: its test would be answered by its training."""
    first: dict[str, Record] = {}
    for record in records:
        other = first.setdefault(record.subject, record)
        if other.split != record.split:
            raise ManifestError(
                f"subject {record.subject!r} is in the splits {other.split!r} ({other.path}) "
                f"and {record.split!r} ({record.path}); split anew (--resplit), or list the files in a "
                "manifest whose column subject tells different people apart"
            )


ClassCounts = dict[str | None, Counter[str | None]]


def count_classes(records: Sequence[Record]) -> tuple[list[str | None], ClassCounts]:
    """(splits in their usual order, files by class and split)."""
    counts: ClassCounts = {}
    for record in records:
        counts.setdefault(record.label, Counter())[record.split] += 1
    usual = {name: i for i, name in enumerate(SPLIT_NAMES)}
    splits = {split for row in counts.values() for split in row}
    ordered = sorted(splits, key=lambda name: (name is None, usual.get(name or "", len(usual)), name or ""))
    return ordered, {label: counts[label] for label in sorted(counts, key=lambda name: (name is None, name))}


def empty_splits(records: Sequence[Record], fractions: Mapping[str, float]) -> list[str]:
    """A sentence on each split that should have a share of the subjects and has none."""
    there = {record.split for record in records}
    return [
        f"no subject fell to the split {name!r}: each class has too few subjects for a share of {share:g}"
        for name, share in fractions.items()
        if share > 0 and name not in there
    ]


def unused_splits(records: Sequence[Record]) -> list[str]:
    """A sentence on each split that is none of `SPLIT_NAMES`."""
    counts = Counter(record.split for record in records if record.split)
    return [
        f"the split {name!r} ({count} files) is none of {', '.join(SPLIT_NAMES)}: training does not use it"
        for name, count in counts.items()
        if name not in SPLIT_NAMES
    ]


def missing_classes(records: Sequence[Record]) -> list[str]:
    """A sentence for each class that a split lacks."""
    splits, counts = count_classes(records)
    sentences = []
    for label, row in counts.items():
        absent = [split for split in splits if split is not None and not row[split]]
        if absent and label is not None:
            there = ", ".join(split for split in splits if split is not None and row[split])
            sentences.append(f"the class {label!r} has files in {there} only, none in {', '.join(absent)}")
    return sentences


def describe_classes(records: Sequence[Record]) -> list[str]:
    """The lines of a table of the files by class and split."""
    splits, counts = count_classes(records)
    heads = ["class", *(name or "(no split)" for name in splits)]
    rows = [[name or "(no label)", *(str(row[split]) for split in splits)] for name, row in counts.items()]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
        for row in [heads, *rows]
    ]
