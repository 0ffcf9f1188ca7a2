"""The table of distortions, and what the documentation says of it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from bench.distortions import COLUMNS, NONE, row_of
from fastflow.archive.distorted import Noticed
from fastflow.data.demo.distortions import DISTORTIONS
from fastflow.workflow import TESTS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def table() -> list[dict[str, str]]:
    with (DOCS / "data" / "distortions.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_the_table_has_a_row_for_each_distortion_and_test_set(table: list[dict[str, str]]) -> None:
    assert tuple(table[0]) == COLUMNS
    assert [(row["test_set"], row["distortion"]) for row in table] == [
        (heading, one.name) for _, heading, _ in TESTS.values() for one in (NONE, *DISTORTIONS)
    ]
    for row in table:
        counts = [int(row[status]) for status in ("ok", "flagged", "error")]
        assert sum(counts) == int(row["volumes"])
        assert float(row["share"]) == pytest.approx(1 - counts[0] / sum(counts), abs=5e-4)


def test_the_guide_to_the_demo_has_the_shares_of_the_table(table: list[dict[str, str]]) -> None:
    guide = (DOCS / "demo.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^\| `(\w+)` \|.*?\| (\d\.\d{3} \| \d\.\d{3}) \|$", guide, re.MULTILINE))
    shares: dict[str, list[str]] = {}
    for row in table:
        shares.setdefault(row["distortion"], []).append(row["share"])
    assert shown == {name: " | ".join(both) for name, both in shares.items()}


def test_a_row_of_the_table() -> None:
    noticed = Noticed("mask", "1 or 0", {"ok": 1, "flagged": 2}, {"unlike_training": 2, "atypical": 1})
    assert row_of("Set", noticed) == (
        *("Set", "mask", 3, 1, 2, 0, "0.667"),
        "atypical:1 unlike_training:2",
    )
