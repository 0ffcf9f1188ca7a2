"""The labels of a BIDS dataset: a column of its tables, or a field of sidecars. Torch-free.

A field is looked for in ``participants.tsv``, then in the ``sessions.tsv`` of subjects, then in the sidecars
of images with inheritance; the first of these places that has the field decides for the whole dataset.
Source: Brain Imaging Data Structure 1.10, "Data summary files" and "The inheritance principle".
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastflow.data.bids import dataset_type, iterate_bids, subjects_in
from fastflow.data.endings import without_ending
from fastflow.data.folders import nothing_below, once_each, regular_files
from fastflow.data.inventory import REASONS, Inventory
from fastflow.data.records import Record, subject_of
from fastflow.data.tables import Table, text_of
from fastflow.data.words import NO_LABELS, class_name, column_name, key_of_word
from fastflow.errors import ManifestError

PARTICIPANTS = "participants.tsv"
_MAX_FIELDS = 20


def list_bids(root: Path, field: str | None, inventory: Inventory) -> tuple[list[Record], list[str]]:
    """(records of the anatomical and PET images of a dataset, warnings).

    Args:
        root: the dataset, raw or of derivatives, also one without a description.
        field: that holds the class; `NO_LABELS` for records without labels.
        inventory: receives the counts. Images without a value of the field are ``"no_label"``.

    Raises:
        ManifestError: no field is given, none of that name exists, a table cannot be read, or there is no
            image.
    """
    files = list(regular_files(iterate_bids(root, inventory.leave_out), inventory))
    if not files:
        raise ManifestError(nothing_below(root, "anatomical or PET image of this BIDS dataset", inventory))
    labels = _Labels(root, field, [file.path for file in files])
    records, identities = [], []
    for file in files:
        label = labels.of(file.path)
        if label is None and field != NO_LABELS:
            inventory.drop("no_label", file.path, REASONS["no_label"])
            continue
        records.append(Record(file.path, label, subject_of(os.path.relpath(file.path, root))))
        identities.append(file.identity)
    if not records:
        raise ManifestError(
            f"{root}: none of its {len(files)} images has a value of the field {field!r}, or all are n/a"
        )
    empty = sorted(set(subjects_in(root)) - set(_subjects(root, [file.path for file in files])))
    warnings = [f"{root}: subjects without an image: {_listed(empty)}"] if empty else []
    return once_each(records, identities, inventory), warnings


class _Labels:
    """The labels of a dataset by one of its fields."""

    def __init__(self, root: Path, field: str | None, images: Sequence[str]) -> None:
        self.root, self.field = root, field or ""
        self.participants: dict[str, str | None] | None = None
        self.uses_sessions = False
        self.sidecars = Sidecars(root)
        self._session_values = functools.lru_cache(maxsize=1024)(self._read_sessions)
        if field == NO_LABELS:
            return
        table = _participants_of(root)
        if field is not None:
            self.participants = None if table is None else _read_column(table, "participant", field)
            if self.participants is not None:
                return
            self.uses_sessions = any(self._session_values(subject) for subject in _subjects(root, images))
            if self.uses_sessions or any(self._in_sidecar(path) is not None for path in images):
                return
        raise ManifestError(_which_field(root, table, field, images))

    def of(self, path: str) -> str | None:
        """The label of an image, None where it has none."""
        subject = subject_of(os.path.relpath(path, self.root))
        if self.participants is not None:
            return self.participants.get(subject)
        if self.field == NO_LABELS:
            return None
        if self.uses_sessions:
            values = self._session_values(subject) or {}
            session = next((part for part in _entities(path) if part.startswith("ses-")), "")
            return values.get(session)
        return self._in_sidecar(path)

    def _read_sessions(self, subject: str) -> dict[str, str | None] | None:
        table = self.root / subject / f"{subject}_sessions.tsv"
        return _read_column(table, "session", self.field) if os.path.lexists(table) else None

    def _in_sidecar(self, path: str) -> str | None:
        value = self.sidecars.of(path).get(self.field)
        try:
            return class_name(value)
        except ValueError as error:
            raise ManifestError(
                f"{path}: the field {self.field!r} of its sidecar {error}; name the classes in a column of "
                f"{PARTICIPANTS}"
            ) from None


def _subjects(root: Path, images: Sequence[str]) -> Iterator[str]:
    yield from dict.fromkeys(subject_of(os.path.relpath(path, root)) for path in images)


def _participants_of(root: Path) -> Path | None:
    """The table of participants; derivatives lie in a folder of the dataset that has it."""
    folders = [root, *Path(os.path.abspath(root)).parents[:2]] if dataset_type(root) != "raw" else [root]
    return next((folder / PARTICIPANTS for folder in folders if os.path.lexists(folder / PARTICIPANTS)), None)


def _read_column(path: Path, who: str, field: str) -> dict[str, str | None] | None:
    """The values of a column by the identity of its row (``sub-01``, ``ses-a``); None if there is no column.

    Raises:
        ManifestError: the table cannot be read, or gives two values to one participant or session.
    """
    prefix = {"participant": "sub-", "session": "ses-"}[who]
    with text_of(path, "") as stream:
        table = Table(path, stream, lambda names: any(_is_identity(name, who) for name in names))
        identity = next((i for i, name in enumerate(table.columns) if _is_identity(name, who)), None)
        if identity is None:
            raise ManifestError(
                f"{path}, line {table.line}: no column '{who}_id'; there are {', '.join(table.columns)}"
            )
        columns = [i for i, name in enumerate(table.columns) if name == field] or [
            i for i, name in enumerate(table.columns) if key_of_word(name) == key_of_word(field)
        ]
        if not columns:
            return None
        if len(columns) > 1:
            raise ManifestError(f"{path}, line {table.line}: the column {field!r} stands twice: keep one")
        values: dict[str, str | None] = {}
        for line, cells in table:
            name = cells[identity] if cells[identity].startswith(prefix) else prefix + cells[identity]
            value = class_name(cells[columns[0]])
            if values.setdefault(name, value) != value:
                raise ManifestError(
                    f"{path}, line {line}: {name} has the {field} {value!r}, and {values[name]!r} above"
                )
        return values


def _is_identity(column: str, who: str) -> bool:
    if who == "session":
        return key_of_word(column) in ("sessionid", "session")
    return column_name(column) == "subject"


# -- sidecars ------------------------------------------------------------------------------------------------


class Sidecars:
    """The JSON files that describe the images of a dataset. Files that were read lately are remembered."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names = functools.lru_cache(maxsize=256)(_sidecars_in)
        self._read = functools.lru_cache(maxsize=256)(_read_json)

    def of(self, image: str) -> dict[str, Any]:
        """The fields that the sidecars of an image give it; those of lower folders replace those above.

        Raises:
            ManifestError: a sidecar that applies cannot be read.
        """
        own, suffix = set(_entities(image)), _suffix(image)
        fields: dict[str, Any] = {}
        folder = self.root
        for part in ("", *Path(image).relative_to(self.root).parts[:-1]):
            folder = folder / part
            applying = [
                (len(entities), name)
                for name, entities, its_suffix in self._names(str(folder))
                if its_suffix == suffix and entities <= own
            ]
            for _, name in sorted(applying):
                fields |= self._read(str(folder / name))
        return fields


def _sidecars_in(folder: str) -> tuple[tuple[str, frozenset[str], str], ...]:
    """(name, entities, suffix) of the JSON files of a folder."""
    try:
        names = os.listdir(folder)
    except OSError:
        return ()
    return tuple(
        (name, frozenset(_entities(name)), _suffix(name))
        for name in names
        if name.endswith(".json") and not name.startswith(".")
    )


def _read_json(path: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestError(f"{path}: the sidecar cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ManifestError(f"{path}: a sidecar must be a JSON object, got {type(content).__name__}")
    return content


def _stem(path: str) -> str:
    name = os.path.basename(path)
    return name[: -len(".json")] if name.endswith(".json") else without_ending(name)


def _entities(path: str) -> list[str]:
    return _stem(path).split("_")[:-1]


def _suffix(path: str) -> str:
    return _stem(path).rsplit("_", 1)[-1]


# -- messages ------------------------------------------------------------------------------------------------


def _which_field(root: Path, table: Path | None, field: str | None, images: Sequence[str]) -> str:
    """The message that names the fields which could hold the class."""
    places = []
    if table is not None:
        with text_of(table, "") as stream:
            columns = Table(table, stream, lambda names: any(_is_identity(n, "participant") for n in names))
            names = [name for name in columns.columns if not _is_identity(name, "participant")]
        places.append(f"{table.name} has {_listed(names)}")
    try:
        fields = Sidecars(root).of(images[0])
    except ManifestError:
        fields = {}
    names = [name for name, value in fields.items() if isinstance(value, str | int | float)]
    if names:
        places.append(f"the sidecars have {_listed(names)}")
    there = "; ".join(places) or f"there is no {PARTICIPANTS} and no sidecar"
    what = (
        "the subjects of a BIDS dataset are no classes: name the field that holds the class "
        "(fastflow index DATASET --label FIELD)"
        if field is None
        else f"no {PARTICIPANTS}, sessions.tsv or sidecar has the field {field!r}"
    )
    return f"{root}: {what}; {there}; '{NO_LABELS}' lists the images without labels"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_FIELDS} more" if len(names) > _MAX_FIELDS else ""
    return (", ".join(names[:_MAX_FIELDS]) or "no other column") + more
