"""The plan of a cross-validation: which files are in which fold, and which models are trained. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastflow.archive.decode import file_state
from fastflow.data.folds import folds_of
from fastflow.data.listing import Listing
from fastflow.data.records import Record, class_names
from fastflow.data.words import SPLIT_NAMES, split_name
from fastflow.errors import ManifestError

TEST = "test"
# A split that is kept out must not have the name of a fold's part.
KEPT = "kept_"


@dataclasses.dataclass(frozen=True)
class Round:
    """One training of a cross-validation.

    Attributes:
        name: of its folder.
        fold: the fold that is its test.
        seed: of its training.
        records: all files, with the splits of this round.
    """

    name: str
    fold: int
    seed: int
    records: tuple[Record, ...] = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A cross-validation that is not begun.

    Attributes:
        rounds: the records of each fold's round, those that are kept out last.
        trainings: each round with each seed.
        kept: names of the splits that are kept out.
        class_names: K names.
        identity: what must be equal where a cross-validation goes on, as JSON values.
        warnings: doubts about the files.
    """

    rounds: tuple[tuple[Record, ...], ...]
    trainings: tuple[Round, ...]
    kept: tuple[str, ...]
    class_names: tuple[str, ...]
    identity: dict[str, Any]
    warnings: tuple[str, ...]


def plan_rounds(
    files: Listing | Sequence[Record],
    folds: int,
    seed: int,
    seeds: Sequence[int] = (),
    keep_out: Sequence[str] = (),
) -> Plan:
    """Assign files to folds, and see whether each fold can be trained and evaluated.

    Args:
        files: labelled ones; those without a label are left out of the folds, with a warning.
        folds: how many.
        seed: of the folds.
        seeds: of the trainings; `seed` when there are none.
        keep_out: names of splits that are in no fold.

    Raises:
        ManifestError: a class has fewer subjects than there are folds, or a split that is kept out has no
            file, a class that the folds lack, or a subject of theirs.
        ValueError: there are fewer than 3 folds.
    """
    records = list(files.records) if isinstance(files, Listing) else list(files)
    warnings = list(files.warnings) if isinstance(files, Listing) else []
    kept_names = [str(split_name(name)) for name in keep_out]
    _check_names(records, kept_names)
    pooled = [record for record in records if record.split not in kept_names]
    unlabelled = [record for record in pooled if record.label is None]
    if unlabelled:
        warnings.append(
            f"{len(unlabelled)} files without a label are in no fold, such as {unlabelled[0].path}"
        )
    pooled = [record for record in pooled if record.label is not None]
    if not pooled:
        raise ManifestError("no labelled file is left for the folds; --keep-out takes all others away")
    rounds = folds_of(pooled, folds, seed)
    kept = [
        dataclasses.replace(record, split=kept_split(str(record.split)))
        for record in records
        if record.split in kept_names
    ]
    _check_kept(kept, pooled)
    warnings += [
        f"the split {name!r} ({count} files) is part of the folds; --keep-out {name} keeps it apart"
        for name, count in Counter(record.split for record in pooled).items()
        if name is not None and name not in SPLIT_NAMES
    ]
    all_rounds = tuple((*round_, *kept) for round_ in rounds)
    trainings = [
        Round(f"fold-{i}" + (f"-seed-{own}" if len(seeds) > 1 else ""), i, own, members)
        for own in (seeds or (seed,))
        for i, members in enumerate(all_rounds)
    ]
    identity = {
        "files": len(pooled) + len(kept),
        "files_hash": _hash_of_files([*pooled, *kept]),
        "folds": folds,
        "seed": seed,
        "seeds": list(seeds or (seed,)),
        "keep_out": kept_names,
        "models": [training.name for training in trainings],
    }
    kept_splits = tuple(kept_split(name) for name in dict.fromkeys(kept_names))
    names = class_names(pooled)
    return Plan(all_rounds, tuple(trainings), kept_splits, names, identity, tuple(warnings))


def kept_split(name: str) -> str:
    """The name of a split that is kept out, in the manifests of the rounds."""
    return f"{KEPT}{name}" if name in SPLIT_NAMES else name


def _check_names(records: Sequence[Record], keep_out: Sequence[str]) -> None:
    found = Counter(record.split for record in records)
    for name in keep_out:
        if name not in found:
            there = ", ".join(f"{split or '(none)'} {count}" for split, count in found.most_common())
            raise ManifestError(
                f"keep_out: no file is in the split {name!r}; the splits are {there or 'none'}"
            )


def _check_kept(kept: Sequence[Record], pooled: Sequence[Record]) -> None:
    names, subjects = class_names(pooled), {record.subject: record for record in pooled}
    for record in kept:
        if record.label is not None and record.label not in names:
            raise ManifestError(
                f"the label {record.label!r} of {record.path} occurs in what is kept out only; "
                f"those of the folds are {', '.join(names)}"
            )
        if record.subject in subjects:
            raise ManifestError(
                f"subject {record.subject!r} is kept out ({record.path}) and in the folds "
                f"({subjects[record.subject].path}): its test would be answered by its training"
            )


def _hash_of_files(records: Sequence[Record]) -> str:
    """A digest of the files, their sizes and what is said of them; their order changes the folds."""
    digest = hashlib.sha256()
    for record in records:
        size, _ = file_state(record.path)
        fields = (os.path.abspath(record.path), size, record.label, record.subject, record.split)
        digest.update(repr(fields).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]
