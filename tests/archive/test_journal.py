from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastflow.archive.journal import KEY_BYTES, FinishedInputs, Journal, key_of
from fastflow.errors import JournalError

KEYS = st.binary(min_size=KEY_BYTES, max_size=KEY_BYTES) | st.integers(0, 255).map(
    lambda n: bytes([n]) + bytes(KEY_BYTES - 1)
)
# Names of files may hold what is no Unicode; scores may be infinite.
VALUES = (
    st.none()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None))
    | st.lists(st.floats(-9, 9))
)
ROWS = st.lists(st.tuples(KEYS, st.dictionaries(st.text(), VALUES)), max_size=6)


@settings(max_examples=50)
@given(ROWS, ROWS, st.binary(max_size=40))
def test_what_was_appended_is_read(first: list[Any], second: list[Any], garbage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j"
        journal = Journal.open(path)
        ends = [*journal.append(first), *journal.append(second)]
        assert list(journal.read()) == first + second
        assert list(journal.ends()) == ends
        assert list(journal.keys()) == [key for key, _ in first + second]
        with path.open("ab") as stream:
            stream.write(garbage.replace(b"\n", b""))
        again = Journal.open(path)
        assert again.size == path.stat().st_size == journal.size
        assert list(again.read()) == first + second
        for start, stop in zip([0, *ends], ends, strict=False):
            assert len(list(again.read(start, stop))) == 1


@settings(max_examples=50)
@given(ROWS)
def test_rows_that_are_not_wanted_go(rows: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.open(Path(folder) / "j")
        journal.append(rows)
        assert journal.keep(lambda key, row: len(row) % 2 == 0) == sum(len(row) % 2 for _, row in rows)
        left = [(key, row) for key, row in rows if len(row) % 2 == 0]
        assert list(journal.read()) == list(Journal.open(journal.path).read()) == left


@settings(max_examples=50)
@given(st.lists(KEYS, max_size=20), st.lists(KEYS, max_size=20))
def test_each_row_answers_one_input(rows: list[bytes], inputs: list[bytes]) -> None:
    done, left = FinishedInputs(rows), list(rows)
    for key in inputs:
        assert done.take(key) == (key in left)
        if key in left:
            left.remove(key)
    assert done.left() == {key: left.count(key) for key in left}


def test_keys_tell_files_their_states_and_models_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [
        ("a", 1, 2, "m"),
        ("b", 1, 2, "m"),
        ("a", 11, 2, "m"),
        ("a", 1, 1, "m"),
        ("a", 1, 2, "n"),
        ("a\udcff", 1, 2, "m"),
    ]
    assert len({key_of(*field) for field in fields}) == len(fields)
    monkeypatch.chdir(tmp_path)
    assert key_of("a.nii", 1, 2, "m") == key_of(str(tmp_path / "a.nii"), 1, 2, "m")


@settings(max_examples=50)
@given(ROWS.filter(bool), st.binary(max_size=40))
# Lines whose checksums are right: of nothing, and of text that begins with no key.
@example([(bytes(16), {})], b"00000000 ")
@example([(bytes(16), {})], b"3610a686 hello")
def test_no_line_of_garbage_is_taken_for_a_row(rows: list[Any], garbage: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.open(Path(folder) / "j")
        journal.append(rows)
        for tail in (garbage, garbage + b"\n", b"\n" + garbage, garbage + b"\n" + garbage):
            with journal.path.open("ab") as stream:
                stream.write(tail)
            assert list(Journal.open(journal.path).read()) == rows
            assert journal.path.stat().st_size == journal.size


# Positions of a byte are drawn from all lines alike, and the first ten are a checksum and a space.
@settings(max_examples=60)
@given(ROWS.filter(lambda rows: len(rows) > 1), st.integers(0), st.integers(1, 255))
# A tab in the place of a zero, which `int` takes for white space before the checksum's other digits.
@example([(bytes(16), {"": None}), (bytes(16), {})], 0, 57)
# Another character in the place of the space.
@example([(bytes(16), {"": None}), (bytes(16), {})], 8, 1)
# Another character in the place of the line break before the last row.
@example([(bytes(16), {"": None}), (bytes(16), {})], 51, 1)
def test_a_changed_byte_costs_the_last_row_or_is_told(rows: list[Any], position: int, change: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal.open(Path(folder) / "j")
        *_, last, end = journal.append(rows)
        content = bytearray(journal.path.read_bytes())
        # Another line break before the last one cuts its line in two, and both halves are none.
        content[position % end] ^= change
        journal.path.write_bytes(content)
        if position % end < last:
            with pytest.raises(JournalError, match=r"the line at byte \d+ is damaged"):
                Journal.open(journal.path)
        else:
            assert list(Journal.open(journal.path).read()) == rows[:-1]


def test_every_change_of_a_byte_before_the_row_is_told(tmp_path: Path) -> None:
    """The digits of a checksum can be written in many ways that `int` reads as the same number."""
    journal = Journal.open(tmp_path / "j")
    # Its checksum begins with a zero.
    key = next(
        key for key in map(bytes, itertools.product(range(9), repeat=KEY_BYTES)) if _zero(journal, key)
    )
    content = journal.path.read_bytes()
    assert content.startswith(b"0")
    for position, change in itertools.product((0, 4, 7, 8), range(1, 256)):
        changed = bytearray(content)
        changed[position] ^= change
        journal.path.write_bytes(changed)
        with pytest.raises(JournalError, match="the line at byte 0 is damaged"):
            Journal.open(journal.path)
    journal.path.write_bytes(content)
    assert [key for key, _ in Journal.open(journal.path).read()] == [key, key]


def _zero(journal: Journal, key: bytes) -> bool:
    """Write two rows; whether the checksum of the first begins with a zero."""
    journal.path.unlink(missing_ok=True)
    journal.size = 0
    journal.append([(key, {}), (key, {})])
    return journal.path.read_bytes().startswith(b"0")


def test_names_that_no_file_system_has_have_keys() -> None:
    assert key_of("a\ud800", -1, -1, "m") != key_of("a\ud801", -1, -1, "m")
