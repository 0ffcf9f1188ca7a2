"""The slices of a manifest, decoded once for all runs, and the sets of one fold."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.files import replacing
from fastflow.data.folds import folds_of
from fastflow.data.preprocess import Preprocess
from fastflow.data.records import Record, class_names
from fastflow.data.slices import SliceSet, load_slices
from fastflow.errors import ManifestError

FORMAT = 1


def cached_slices(
    records: Sequence[Record], preprocess: Preprocess, cache: Path, workers: int = 1
) -> SliceSet:
    """The slices of all records, from a file of an earlier run where there is one of the same content.

    A file that cannot be read is left out, with a line on standard error.

    Args:
        records: labelled files.
        preprocess: which slices, and how.
        cache: folder of the decoded slices.
        workers: processes that read.

    Raises:
        ManifestError: none of the files can be read.
    """
    path = cache / f"slices-{_key(records, preprocess)}.npz"
    if not path.exists():
        slices, errors = load_slices(records, preprocess, class_names(records), workers)
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)
        if not len(slices):
            raise ManifestError(f"none of the {len(records)} files can be read; the first: {errors[0]}")
        with replacing(path) as stream:
            np.savez(
                stream,
                **{name: getattr(slices, name) for name in ("images", "labels", "volumes")},
                **{name: np.array(getattr(slices, name)) for name in ("paths", "subjects", "class_names")},
            )
    with np.load(path) as stored:
        return SliceSet(
            stored["images"],
            stored["labels"],
            stored["volumes"],
            *(tuple(map(str, stored[name])) for name in ("paths", "subjects", "class_names")),
        )


def _key(records: Sequence[Record], preprocess: Preprocess) -> str:
    files = []
    for record in records:
        state = os.stat(record.path) if os.path.exists(record.path) else None
        file = None if state is None else (state.st_size, state.st_mtime_ns)
        files.append((os.path.abspath(record.path), record.label, record.subject, file))
    text = json.dumps([FORMAT, preprocess.to_dict(), files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def labelled(records: Sequence[Record]) -> list[Record]:
    """The records that have a label.

    Raises:
        ManifestError: there is none.
    """
    chosen = [record for record in records if record.label is not None]
    if not chosen:
        raise ManifestError(f"none of the {len(records)} entries has a label")
    return chosen


def sets_of_fold(
    slices: SliceSet, records: Sequence[Record], kept_out: str, fold: int, folds: int, seed: int
) -> dict[str, SliceSet]:
    """The sets ``train``, ``val`` and ``test`` of one round of the cross-validation, and the kept-out one.

    Args:
        slices: of the records; those that could not be read are missing.
        records: labelled files.
        kept_out: the split whose records are no part of the folds.
        fold: which round, from 0.
        folds: how many rounds.
        seed: of the folds.

    Raises:
        ManifestError: see `fastflow.data.folds.folds_of`; or a subject of the kept-out split has other files.
        ValueError: there is no such fold.
    """
    if not 0 <= fold < folds:
        raise ValueError(f"fold must lie in 0 to {folds - 1}, got {fold}")
    apart = [record for record in records if record.split == kept_out]
    pooled = [record for record in records if record.split != kept_out]
    both = {record.subject for record in apart} & {record.subject for record in pooled}
    if both:
        raise ManifestError(
            f"{len(both)} subjects of the split {kept_out!r} have files of other splits too, such as "
            f"{min(both)}: they would be trained on; give each subject one split"
        )
    split = {record.path: str(record.split) for record in folds_of(pooled, folds, seed)[fold]}
    split |= {record.path: kept_out for record in apart}
    members: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for volume, path in enumerate(slices.paths):
        members.setdefault(split[path], []).append(volume)
    return {name: slices.subset(volumes) for name, volumes in members.items()}
