from __future__ import annotations

import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflow.data.words import (
    COLUMN_NAMES,
    NO_VALUES,
    SPLIT_NAMES,
    SPLIT_SUFFIXES,
    alike,
    class_indices,
    class_name,
    column_name,
    find_columns,
    is_split,
    split_name,
)

# Ways to write a word that should make no difference.
spellings = st.sampled_from([str.upper, str.title, lambda word: f"  {word} ", lambda word: f"{word}\t"])


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("Training", "train"),
        ("train_set", "train"),
        ("TRAINING SET", "train"),
        ("valid", "val"),
        ("Validation", "val"),
        (" dev ", "val"),
        ("Development-data", "val"),
        ("Testing", "test"),
        ("tst", "test"),
        ("unseen_head", "unseen_head"),
        ("Unseen  head", "Unseen head"),
        ("eval", "eval"),
        ("set", "set"),
        ("contest", "contest"),
        ("n/a", None),
        ("", None),
        (None, None),
        (float("nan"), None),
        (0, "0"),
    ],
)
def test_names_of_splits(text: object, split: str | None) -> None:
    assert split_name(text) == split


@given(
    st.sampled_from([(split, name) for split, names in SPLIT_NAMES.items() for name in names]),
    st.sampled_from(["", *SPLIT_SUFFIXES]),
    st.sampled_from(["", " ", "_", "-"]),
    spellings,
)
def test_a_split_has_its_name_however_it_is_written(
    pair: tuple[str, str], suffix: str, separator: str, spelling: object
) -> None:
    split, name = pair
    text = spelling(name + separator + suffix)  # type: ignore[operator]
    assert split_name(text) == split and is_split(text)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("  Alzheimer's \u00a0 disease\t", "Alzheimer's disease"),
        ("cafe\u0301", "caf\u00e9"),
        ("AD", "AD"),
        ("3.0", "3.0"),
        (3, "3"),
        (3.0, "3"),
        (1.5, "1.5"),
        (2.89362, "2.89362"),
        (10**20, "1" + "0" * 20),
        (" N/A ", None),
        ("NaN", None),
        ("None", None),
        ("<NA>", None),
        (None, None),
        (math.nan, None),
        ("naïve", "naïve"),
        ("nana", "nana"),
    ],
)
def test_names_of_classes(value: object, name: str | None) -> None:
    assert class_name(value) == name


@given(st.text())
def test_a_class_has_one_form(text: str) -> None:
    name = class_name(text)
    if name is not None:
        assert class_name(name) == name == name.strip() and unicodedata.is_normalized("NFC", name)
        assert class_name(f" {unicodedata.normalize('NFD', text)}\n") == name


@pytest.mark.parametrize("value", [True, False, [], {"a": 1}, math.inf, b"x"])
def test_values_that_name_no_class(value: object) -> None:
    with pytest.raises(ValueError, match="must be a string, got "):
        class_name(value)


@given(st.sampled_from([(c, n) for c, names in COLUMN_NAMES.items() for n in names]), spellings)
def test_a_column_has_its_name_however_it_is_written(pair: tuple[str, str], spelling: object) -> None:
    column, name = pair
    assert column_name(spelling(name)) == column  # type: ignore[operator]


def test_columns_are_found_and_others_are_not_read() -> None:
    names = ["Age", "Subject ID", "FILE_NAME", "class", "", "Set", "age"]
    assert find_columns(names) == {"subject": 1, "path": 2, "label": 3, "split": 5}
    assert find_columns(["path", "dx", "label"], "DX") == {"path": 0, "label": 1}
    # The name that is written into manifests goes before its synonyms.
    assert find_columns(["image", "path", "label", "class"]) == {"path": 1, "label": 2}
    # Short words are near to many others.
    assert find_columns(["path", "sex", "age", "part", "pat", "level"]) == {"path": 0}


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (["path", "label", "Label"], None, "the columns 'label' and 'Label' both mean 'label'"),
        (["path", "Subject", "participant_id"], None, "'Subject' and 'participant_id' both mean 'subject'"),
        (["path", "lable"], None, "the column 'lable' is nearly 'label': rename it"),
        (["path", "labels"], None, "'labels' is nearly 'label'"),
        (["fliename"], None, "'fliename' is nearly 'path'"),
        (["path", "Spilt"], None, "'Spilt' is nearly 'split'"),
        (["path", "participants_id"], None, "nearly 'subject'"),
        (["path", "age"], "dx", "no column 'dx'; there are path, age"),
        (["path", "Label", "label"], None, "the columns 'Label' and 'label' both mean 'label'"),
        (["path", "path"], None, "the columns 'path' and 'path' both mean 'path'"),
        (["path", "dx", "DX"], "dx", "both mean 'label'"),
    ],
)
def test_columns_that_are_not_plain(names: list[str], label: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_columns(names, label)


def test_labels_and_class_names_are_compared_in_one_form() -> None:
    indices = class_indices(["cafe\u0301", " old  age ", "3"])
    assert [indices[class_name(label)] for label in ("caf\u00e9", "old age", 3.0)] == [0, 1, 2]
    assert class_name("Old age") not in indices
    # The first of two names of one form has it.
    assert class_indices(["a  b", "a b", "a\tb"])["a b"] == 1
    assert class_indices(["a  b", "a\tb"])["a b"] == 0


def test_names_that_differ_in_little() -> None:
    assert alike(["Old", "old", "young", "no-tumour", "no tumour"]) == [
        ("no tumour", "no-tumour"),
        ("Old", "old"),
    ]
    assert alike(["P1", "p1", "P-1"], str.casefold) == [("P1", "p1")]


def test_tables_are_in_their_own_form() -> None:
    for names in (*SPLIT_NAMES.values(), *COLUMN_NAMES.values()):
        assert all(name.isalpha() and name.islower() for name in names)
    assert all(word == word.casefold().strip() for word in NO_VALUES)
    assert all(column in names for column, names in COLUMN_NAMES.items())
