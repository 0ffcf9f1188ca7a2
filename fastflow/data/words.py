"""The tables of words: names of splits and columns, and how names of classes are read. Torch-free.

Manifests, folders, BIDS datasets and command-line options are all read by these functions, and whoever
compares a label with a model's class names does so by `class_indices`.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

# The names of each split, written without blanks, hyphens and underscores.
SPLIT_NAMES = {
    "train": ("train", "training", "trn", "tr"),
    "val": ("val", "valid", "validation", "validate", "dev", "development", "va"),
    "test": ("test", "testing", "tst", "te"),
}
# These may follow the name of a split: `training_set`.
SPLIT_SUFFIXES = ("set", "data", "split")
# The names of each column, written likewise.
COLUMN_NAMES = {
    "path": ("path", "file", "filename", "filepath", "image", "imagepath", "imagefile"),
    "label": ("label", "class", "classname", "classlabel"),
    "subject": (
        *("subject", "subjectid", "sub", "participant", "participantid"),
        *("patient", "patientid"),
    ),
    "split": ("split", "set", "subset", "partition"),
}
# In place of a class, a subject or a split, these say that there is none.
NO_VALUES = ("", "n/a", "na", "nan", "none", "null", "<na>", "#n/a")
# The name of a label field that asks for no labels.
NO_LABELS = "none"

_SEPARATORS = re.compile(r"[\s_-]+")
_SPLITS = {
    name + suffix: split
    for split, names in SPLIT_NAMES.items()
    for name, suffix in itertools.product(names, ("", *SPLIT_SUFFIXES))
}
_COLUMNS = {name: column for column, names in COLUMN_NAMES.items() for name in names}
# Shorter names are one letter away from many other words.
_MIN_LETTERS_OF_A_NEAR_MISS = 5


def key_of_word(text: str) -> str:
    """A name without regard to case, blanks, hyphens, underscores and forms of Unicode."""
    return _SEPARATORS.sub("", unicodedata.normalize("NFKC", text)).casefold()


def class_name(value: object) -> str | None:
    """The class that a cell, a JSON value or a folder's name means; None where it says that there is none.

    Unicode has form NFC, outer blanks go, inner ones become one space; case matters. Numbers of JSON are
    their shortest form, so that 3 and 3.0 are one class; NaN and null are none.

    Raises:
        ValueError: the value is no text and no finite number.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return _name(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"must be a string, got {value!r}")
    return str(value) if isinstance(value, int) else f"{value:.12g}"


@functools.lru_cache(maxsize=4096)
def _name(text: str) -> str | None:
    name = " ".join(unicodedata.normalize("NFC", text).split())
    return None if name.casefold() in NO_VALUES else name


def split_name(value: object) -> str | None:
    """``"train"``, ``"val"`` or ``"test"`` for any name of theirs; other names are read like a class's.

    Raises:
        ValueError: the value is no text and no finite number.
    """
    name = class_name(value)
    return None if name is None else _split_of(name)


@functools.lru_cache(maxsize=4096)
def _split_of(name: str) -> str:
    return _SPLITS.get(key_of_word(name), name)


def is_split(name: str) -> bool:
    """Whether a folder's name is one of `SPLIT_NAMES`."""
    return split_name(name) in SPLIT_NAMES


def column_name(name: str) -> str | None:
    """The one of `COLUMN_NAMES` that a column's name means; None for others."""
    return _COLUMNS.get(key_of_word(name))


def find_columns(names: Sequence[str], label: str | None = None) -> dict[str, int]:
    """The positions of the columns that are read.

    Args:
        names: of all columns.
        label: the column that holds the class; one of `COLUMN_NAMES` when None.

    Raises:
        ValueError: two columns mean the same, there is no column `label`, or one that is missing has nearly
            the name of one that is there.
    """
    found: dict[str, int] = {}
    for i, name in enumerate(names):
        column = column_name(name) if label is None else _with_label(name, label)
        if column is None:
            continue
        first = names[found[column]] if column in found else None
        if first is None or (name == column != key_of_word(first)):
            # The name that manifests are written with goes before its synonyms.
            found[column] = i
        elif first != column or key_of_word(name) == column:
            raise ValueError(f"the columns {first!r} and {name!r} both mean {column!r}: keep one of them")
    if label is not None and "label" not in found:
        raise ValueError(f"no column {label!r}; there are {', '.join(filter(None, names))}")
    for column in COLUMN_NAMES.keys() - found.keys():
        for name in names:
            if column_name(name) is None and _is_nearly(key_of_word(name), COLUMN_NAMES[column]):
                raise ValueError(f"the column {name!r} is nearly {column!r}: rename it")
    return found


def _with_label(name: str, label: str) -> str | None:
    if key_of_word(name) == key_of_word(label):
        return "label"
    column = column_name(name)
    return None if column == "label" else column


def _is_nearly(key: str, names: Iterable[str]) -> bool:
    """Whether a word is one letter too many, too few, another or exchanged with the next, from a name."""
    return any(
        len(name) >= _MIN_LETTERS_OF_A_NEAR_MISS and abs(len(key) - len(name)) <= 1 and _one_slip(key, name)
        for name in names
    )


def _one_slip(one: str, other: str) -> bool:
    start = 0
    while start < min(len(one), len(other)) and one[start] == other[start]:
        start += 1
    a, b = one[start:], other[start:]
    exchanged = a[:2] == b[1::-1] and a[2:] == b[2:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or exchanged


def class_indices(names: Sequence[str]) -> dict[str, int]:
    """The place of each class name, which is looked up by what `class_name` makes of a label."""
    read = {name: i for i, text in reversed(list(enumerate(names))) if (name := class_name(text)) is not None}
    return read | {name: i for i, name in enumerate(names)}


def find_class(label: str, names: Sequence[str]) -> int:
    """The place of a class that a user names.

    Raises:
        ValueError: it is none of them; the message lists them.
    """
    known = class_indices(names)
    found = known.get(label, known.get(class_name(label) or ""))
    if found is None:
        raise ValueError(f"label must be one of {', '.join(names)}, got {label!r}")
    return found


def alike(names: Iterable[str], key: Callable[[str], str] = key_of_word) -> list[tuple[str, str]]:
    """Pairs of different names that `key` does not tell apart."""
    first: dict[str, str] = {}
    pairs = []
    for name in sorted(set(names)):
        other = first.setdefault(key(name), name)
        if other != name:
            pairs.append((other, name))
    return pairs
