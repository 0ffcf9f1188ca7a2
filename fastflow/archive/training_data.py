"""The files of a training: which are chosen, which can be used, and a stop where a class or split has none.

Torch-free.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastflow.archive.index import check_subjects
from fastflow.data.grids import Grid
from fastflow.data.inventory import Inventory
from fastflow.data.listing import Listing
from fastflow.data.manifest import Record, class_names
from fastflow.data.preprocess import Preprocess
from fastflow.data.slice_cache import SliceCache
from fastflow.data.slices import SliceSet, load_slices
from fastflow.errors import ManifestError, VolumeError

TRAIN, VAL, TEST = "train", "val", "test"
# The files of splits that are not named one by one have this reason.
OTHER = "other splits"
# A class with fewer training files than this gets a warning.
FEW_FILES = 5
# So many splits that nothing uses are named, and so many classes of a message.
MAX_NAMED = 8


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The labelled files of the splits that training uses.

    Attributes:
        splits: records by split, ``"train"`` and ``"val"``; those of ``"val"`` may be none.
        inventory: what was found, and why the rest is not chosen.
        warnings: of the listing.
    """

    splits: Mapping[str, Sequence[Record]]
    inventory: Inventory
    warnings: tuple[str, ...] = ()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The labels of the training files, sorted."""
        return class_names(self.splits[TRAIN])


def choose(files: Listing | Sequence[Record]) -> Chosen:
    """Take the labelled files of the splits ``train`` and ``val``, and count the others by reason.

    Reasons are ``no_label``, ``no_split``, and ``split 'NAME'`` for the files of another split.

    Raises:
        ManifestError: there is no training file, a label occurs in ``val`` only, no file of ``val`` has a
            label, or a subject is in two splits.
    """
    listing = files if isinstance(files, Listing) else Listing(list(files), Inventory(used=len(files)))
    inventory = copy.deepcopy(listing.inventory)
    splits: dict[str, list[Record]] = {TRAIN: [], VAL: []}
    others = Counter(record.split for record in listing.records if record.split not in (None, TRAIN, VAL))
    named = {name for name, _ in others.most_common(MAX_NAMED)}
    for record in listing.records:
        if record.split is None:
            inventory.drop("no_split", record.path)
        elif record.split not in splits:
            inventory.drop(f"split {record.split!r}" if record.split in named else OTHER, record.path)
        elif record.label is None:
            inventory.drop("no_label", record.path)
        else:
            splits[record.split].append(record)
    # The listing may know better what to do.
    inventory.hints = _hints(inventory) | inventory.hints
    _check_chosen(listing.records, splits, inventory)
    return Chosen(splits, inventory, listing.warnings)


def _hints(inventory: Inventory) -> dict[str, str]:
    others = [reason for reason in inventory.left_out if reason.startswith("split ")]
    hints = dict.fromkeys(["no_split", OTHER, *others], "training uses the splits train and val")
    return hints | {"no_label": "a class name is needed"}


def _check_chosen(
    records: Sequence[Record], splits: Mapping[str, Sequence[Record]], inventory: Inventory
) -> None:
    if not splits[TRAIN]:
        hint = f" (no_label: {inventory.hints['no_label']})" if inventory.left_out["no_label"] else ""
        raise ManifestError(
            "no labelled entry has the split 'train'; `fastflow index` assigns splits, and a model of one "
            f"class needs its name as a label too. {inventory.line()}{hint}"
        )
    validation = [record for record in records if record.split == VAL]
    if validation and not splits[VAL]:
        raise ManifestError(
            f"none of the {len(validation)} files of the split 'val' has a label, such as "
            f"{validation[0].path}; label them, or take them out"
        )
    names = class_names(splits[TRAIN])
    for record in splits[VAL]:
        if record.label not in names:
            raise ManifestError(
                f"the label {record.label!r} of {record.path} occurs in the split 'val' only; "
                f"those of the split 'train' are {', '.join(names)}"
            )
    # A file of a test split must not be learned from by way of its subject, whatever made the manifest.
    check_subjects([record for record in records if record.split is not None])


@dataclasses.dataclass(frozen=True)
class ClassCount:
    """The files of one class in one split.

    Attributes:
        found: how many were chosen.
        errors: of those that cannot be used.
    """

    found: int
    errors: tuple[VolumeError, ...]

    @property
    def used(self) -> int:
        """How many can be used."""
        return self.found - len(self.errors)


@dataclasses.dataclass(frozen=True)
class UsableFiles:
    """How many files of each split and class can be used, as is known before the first epoch.

    Attributes:
        inventory: everything that was found.
        splits: counts by split and class; without ``"val"`` where no file has that split.
        grid: that volumes must have; None where only PNG files were found.
        errors: of all files that cannot be used.
        listed: the warnings of the listing.
        reused: how many files came from the cache, and of how many; None where there was no cache.
    """

    inventory: Inventory
    splits: Mapping[str, Mapping[str, ClassCount]]
    grid: Grid | None
    errors: tuple[VolumeError, ...]
    listed: tuple[str, ...] = ()
    reused: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    def lines(self) -> list[str]:
        """Lines on all files, the grid and each split: ``train: 20 of 21 files can be used (A 9, B 11)``."""
        grid = [] if self.grid is None else [f"grid: {self.grid}"]
        return [self.inventory.line(), *grid, *(_line(name, split) for name, split in self.splits.items())]

    def warnings(self) -> list[str]:
        """Doubts: the listing's, what was left out by reason, classes with few files or not validated.

        Files that cannot be read are no part of it, since each of them has an error, and neither is a test
        split, which a training leaves alone.
        """
        codes = {error.code for error in self.errors} | {f"split {TEST!r}"}
        inventory = copy.deepcopy(self.inventory)
        inventory.left_out = Counter({k: n for k, n in inventory.left_out.items() if k not in codes})
        lines = [*self.listed, *(f"left out: {line}" for line in inventory.details())]
        for name, count in self.splits[TRAIN].items():
            if 0 < count.used < FEW_FILES:
                files = "file" if count.used == 1 else "files"
                lines.append(f"class {name!r} has {count.used} training {files}: expect little of it")
        validation = self.splits.get(VAL, {})
        for name, count in validation.items():
            if not count.used and any(other.used for other in validation.values()):
                lines.append(f"class {name!r} is not validated: {_reasons(count.errors)} of the split 'val'")
        return lines

    def check(self) -> None:
        """Raise ManifestError where a split, or a class of ``train``, has no file that can be used."""
        for name, split in self.splits.items():
            if not any(count.used for count in split.values()):
                errors = [error for count in split.values() for error in count.errors]
                which = "training files" if name == TRAIN else f"files of the split {name!r}"
                raise ManifestError(
                    f"none of the {len(errors)} {which} can be used; the first: {errors[0]} "
                    f"(in all: {_reasons(errors)})"
                )
        empty = {name: count for name, count in self.splits[TRAIN].items() if not count.used}
        if empty:
            each = [
                f"{count.found} of {count.found} files of class {name!r}: {_reasons(count.errors)} "
                f"(the first: {count.errors[0]})"
                for name, count in list(empty.items())[:MAX_NAMED]
            ]
            more = f"; and {len(empty) - MAX_NAMED} more classes" if len(empty) > MAX_NAMED else ""
            raise ManifestError(
                f"no training file can be used of {len(empty)} of {len(self.splits[TRAIN])} classes: "
                f"{'; '.join(each)}{more}. Mend these files, or take the class out of the manifest"
            )

    def to_dict(self) -> dict[str, Any]:
        """A short form of JSON values: used files by split and class, and what was left out by reason."""
        return {
            "files": {
                name: {label: count.used for label, count in split.items()}
                for name, split in self.splits.items()
            },
            "left_out": dict(sorted(self.inventory.left_out.items())),
        }


def _line(name: str, split: Mapping[str, ClassCount]) -> str:
    classes = [
        f"{label} {count.used}" + (f" of {count.found}" if count.errors else "")
        for label, count in split.items()
    ]
    used, found = sum(count.used for count in split.values()), sum(count.found for count in split.values())
    return f"{name}: {used} of {found} files can be used ({', '.join(classes)})"


def _reasons(errors: Sequence[VolumeError]) -> str:
    counts = Counter(error.code for error in errors)
    return ", ".join(f"{code} {count}" for code, count in counts.most_common())


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the files of a training are read, beside what decides about their slices.

    Attributes:
        report: called with the number of files read and their total.
        cache: has the slices of files that need not be decoded, and keeps the others; in memory when None.
    """

    report: Callable[[int, int], None] | None = None
    cache: SliceCache | None = None


def load_chosen(
    chosen: Chosen,
    preprocess: Preprocess,
    workers: int = 1,
    reading: Callable[[int, int], None] | Reading | None = None,
) -> tuple[dict[str, SliceSet], UsableFiles]:
    """Read the slices of the chosen files.

    Args:
        chosen: the files.
        preprocess: which slices, and how.
        workers: processes that read.
        reading: called with the number of files read and their total, or a `Reading`.

    Returns:
        `(sets, usable)`: the slices by split, without those of a split of which no file can be used, and the
        counts. `UsableFiles.check` says whether they are enough.
    """
    how = reading if isinstance(reading, Reading) else Reading(reading)
    total, before = sum(map(len, chosen.splits.values())), 0
    reused = 0 if how.cache is None else how.cache.reused
    inventory = copy.deepcopy(chosen.inventory)
    sets: dict[str, SliceSet] = {}
    counts: dict[str, dict[str, ClassCount]] = {}
    errors: list[VolumeError] = []
    for name, records in chosen.splits.items():

        def report(done: int, offset: int = before) -> None:
            if how.report is not None:
                how.report(offset + done, total)

        data, bad = load_slices(records, preprocess, chosen.class_names, workers, report, how.cache)
        before += len(records)
        for error in bad:
            inventory.drop(error.code, error.path)
        errors += bad
        if records:
            counts[name] = _count_classes(records, bad, chosen.class_names)
        if len(data):
            sets[name] = data
    grid = (
        None
        if preprocess.grid is None or preprocess.spacing is None
        else Grid(preprocess.grid, preprocess.spacing)
    )
    known = None if how.cache is None else (how.cache.reused - reused, total)
    return sets, UsableFiles(inventory, counts, grid, tuple(errors), chosen.warnings, known)


def _count_classes(
    records: Sequence[Record], errors: Sequence[VolumeError], names: Sequence[str]
) -> dict[str, ClassCount]:
    labels = {record.path: record.label for record in records}
    found = Counter(record.label for record in records)
    bad: dict[str | None, list[VolumeError]] = {}
    for error in errors:
        bad.setdefault(labels[error.path], []).append(error)
    return {name: ClassCount(found[name], tuple(bad.get(name, ()))) for name in names if found[name]}
