"""Indexing: from files to a manifest with splits. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path

from fastflow.data.manifest import Record, index_folder, read_manifest, split_by_subject, write_manifest
from fastflow.errors import ManifestError


def index_archive(
    source: str | PathLike[str],
    out: str | PathLike[str],
    fractions: Mapping[str, float],
    seed: int = 0,
    resplit: bool = False,
) -> list[Record]:
    """Write a manifest of `source`.

    Args:
        source: a folder of ``class/file`` or ``split/class/file``, or a manifest.
        out: the manifest to write.
        fractions: share of the subjects in each split; used where no file has a split, or with `resplit`.
        seed: of the shuffling.
        resplit: replace splits that are there.

    Returns:
        The records that were written.

    Raises:
        ManifestError: the source cannot be read, some files have a split and others none, or a subject is in
            two splits.
        ValueError: the fractions do not sum to 1.
    """
    records = index_folder(source) if Path(source).is_dir() else read_manifest(source)
    have = [record.split is not None for record in records]
    if resplit or not any(have):
        records = split_by_subject(records, fractions, seed)
    elif not all(have):
        missing = records[have.index(False)].path
        raise ManifestError(
            f"{source}: {missing} has no split, others have one; "
            "assign all or none, or split anew (--resplit)"
        )
    check_subjects(records)
    write_manifest(records, out)
    return records


def check_subjects(records: list[Record]) -> None:
    """Raise ManifestError where a subject is in two splits: its test would be answered by its training."""
    first: dict[str, Record] = {}
    for record in records:
        other = first.setdefault(record.subject, record)
        if other.split != record.split:
            raise ManifestError(
                f"subject {record.subject!r} is in the splits {other.split!r} ({other.path}) "
                f"and {record.split!r} ({record.path})"
            )
