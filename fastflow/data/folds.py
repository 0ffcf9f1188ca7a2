"""Folds of cross-validation: stratified by class, with all files of a subject in the same fold."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from fastflow.data.records import Record
from fastflow.errors import ManifestError

FOLDS = 5


def folds_of(records: Sequence[Record], folds: int = FOLDS, seed: int = 0) -> list[list[Record]]:
    """The records of each round of a cross-validation, with splits of their own.

    In round i, fold i is ``test``, fold i + 1 is ``val`` (which chooses an epoch and calibrates), and the
    others are ``train``. Splits that the records have are replaced.

    Args:
        records: labelled files.
        folds: how many, at least 3.
        seed: of the order of the subjects.

    Returns:
        `folds` lists of all records, in their order.

    Raises:
        ManifestError: a record has no label, or a class has fewer subjects than there are folds.
        ValueError: there are fewer than 3 folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    if folds < 3:
        raise ValueError(f"folds must be at least 3 (test, validation and training), got {folds}")
    unlabelled = [record.path for record in records if record.label is None]
    if unlabelled:
        raise ManifestError(f"{len(unlabelled)} files have no label, such as {unlabelled[0]}")
    subjects: dict[str, set[str]] = {}
    for record in records:
        subjects.setdefault(str(record.label), set()).add(record.subject)
    few = {name: len(members) for name, members in sorted(subjects.items()) if len(members) < folds}
    if few:
        listed = ", ".join(f"{name} {count}" for name, count in few.items())
        raise ManifestError(
            f"{folds} folds need {folds} subjects of each class, but some have fewer: {listed}; "
            "take fewer folds, or take these classes out of the manifest"
        )
    labels = [record.label for record in records]
    groups = [record.subject for record in records]
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    fold = np.empty(len(records), dtype=np.int64)
    for i, (_, members) in enumerate(splitter.split(labels, labels, groups)):
        fold[members] = i
    return [
        [_placed(record, int(f), i, folds) for record, f in zip(records, fold, strict=True)]
        for i in range(folds)
    ]


def _placed(record: Record, fold: int, round_: int, folds: int) -> Record:
    split = "test" if fold == round_ else "val" if fold == (round_ + 1) % folds else "train"
    return dataclasses.replace(record, split=split)
