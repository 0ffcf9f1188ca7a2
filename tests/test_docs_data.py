"""The guide to data names what the code has."""

import re
from pathlib import Path

from fastflow.data.endings import ENDINGS, HINTS
from fastflow.data.inventory import REASONS
from fastflow.data.listing import list_records
from fastflow.data.manifest import COLUMNS, MANIFESTS
from fastflow.data.words import COLUMN_NAMES, NO_VALUES, SPLIT_NAMES, SPLIT_SUFFIXES

GUIDE = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8")


def tables() -> dict[str, list[list[str]]]:
    """The rows of each table by the first cell of its header."""
    found: dict[str, list[list[str]]] = {}
    for block in re.findall(r"(?:^\|.*\n)+", GUIDE, re.MULTILINE):
        head, _, *rows = [
            [cell.strip() for cell in line.strip("|\n").split(" |")] for line in block.splitlines()
        ]
        found[head[0].strip()] = rows
    return found


def names(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_words_are_those_of_the_code():
    assert {names(split)[0]: names(text) for split, text in tables()["split"]} == SPLIT_NAMES
    assert {names(column)[0]: names(text) for column, text, _ in tables()["column"]} == COLUMN_NAMES
    assert tuple(COLUMN_NAMES) == COLUMNS
    assert tuple(names(word)[0] if names(word) else "" for (word,) in tables()["no class"]) == NO_VALUES
    assert all(f"`{word}`" in GUIDE for word in (*SPLIT_SUFFIXES, *ENDINGS, *MANIFESTS))


def test_reasons_and_endings_are_those_of_the_code():
    assert {names(reason)[0]: text for reason, text in tables()["reason"]} == REASONS
    assert {names(ending)[0]: text for ending, text in tables()["ending"]} == HINTS


def test_layouts_are_read_as_the_guide_says(tmp_path):
    for (layout, *_), expected in zip(
        tables()["layout"], [("old", None), ("old", "val"), ("old", "val")], strict=True
    ):
        parts = {"class": "old", "split": "valid", "file": "a.nii"}
        file = (
            tmp_path
            / layout.replace("/", "-").strip("`")
            / "/".join(parts[part] for part in names(layout)[0].split("/"))
        )
        file.parent.mkdir(parents=True)
        file.touch()
        (record,) = list_records(tmp_path / layout.replace("/", "-").strip("`")).records
        assert (record.label, record.split) == expected
