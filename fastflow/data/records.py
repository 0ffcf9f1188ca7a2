"""Records: a file, its label, subject and split. Torch-free."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

import numpy as np

from fastflow.data.endings import without_ending

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


def subject_of(path: str | PathLike[str]) -> str:
    """The BIDS ``sub-`` entity of a file's name or folders, or the name without its endings."""
    parts = os.fspath(path).split("/")
    for part in reversed(parts):
        match = _SUBJECT.search(part)
        if match:
            return match[1]
    # Only known endings are cut off, as names that are DICOM identifiers are full of dots.
    return without_ending(parts[-1])


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
