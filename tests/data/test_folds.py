from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastflow.data.folds import folds_of
from fastflow.data.records import Record
from fastflow.errors import ManifestError

SPLITS = ("train", "val", "test")


def archive(subjects: dict[str, int], files: int = 1) -> list[Record]:
    """So many subjects of each class, each with `files` files."""
    return [
        Record(f"{label}{i}-{n}.nii", label, f"sub-{label}{i}")
        for label, count in subjects.items()
        for i in range(count)
        for n in range(files)
    ]


@settings(max_examples=30)
@given(
    st.integers(3, 5),
    st.lists(st.integers(5, 14), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(0, 5),
)
def test_folds_share_no_subject_and_test_every_file_once(
    folds: int, counts: list[int], files: int, seed: int
) -> None:
    records = archive({"abc"[k]: count for k, count in enumerate(counts)}, files)
    rounds = folds_of(records, folds, seed)
    assert rounds == folds_of(records, folds, seed)
    tested: Counter[str] = Counter()
    for round_ in rounds:
        assert [record.path for record in round_] == [record.path for record in records]
        splits = defaultdict(set)
        for record in round_:
            splits[record.subject].add(record.split)
        assert all(len(own) == 1 for own in splits.values())
        assert set(SPLITS) == {record.split for record in round_}
        tested.update(record.path for record in round_ if record.split == "test")
    assert tested == Counter(record.path for record in records)


def test_validation_of_a_round_is_the_test_of_the_next() -> None:
    rounds = folds_of(archive({"a": 9, "b": 9}), 3, 1)
    for this, following in zip(rounds, [*rounds[1:], rounds[0]], strict=True):
        assert [r.split == "val" for r in this] == [r.split == "test" for r in following]


def test_classes_are_spread_evenly() -> None:
    rounds = folds_of(archive({"many": 50, "few": 10}, files=2), 5)
    for round_ in rounds:
        counts = Counter(record.label for record in round_ if record.split == "test")
        assert counts == {"many": 20, "few": 4}


def test_other_seeds_make_other_folds() -> None:
    records = archive({"a": 20, "b": 20})
    assert folds_of(records, 5, 0) != folds_of(records, 5, 1)


def test_splits_of_the_records_are_replaced() -> None:
    records = [Record(r.path, r.label, r.subject, "unused") for r in archive({"a": 6})]
    assert {record.split for record in folds_of(records, 3)[0]} == set(SPLITS)


@pytest.mark.parametrize(
    ("records", "folds", "error", "message"),
    [
        (
            archive({"a": 9, "b": 4, "c": 2}),
            5,
            ManifestError,
            "5 folds need 5 subjects .* b 4, c 2; take fewer",
        ),
        # Files of one subject are no subjects.
        (archive({"a": 9, "b": 2}, files=4), 3, ManifestError, "b 2"),
        ([*archive({"a": 9}), Record("x.nii", None, "sub-x")], 3, ManifestError, "no label, such as x.nii"),
        (archive({"a": 9}), 2, ValueError, "folds must be at least 3"),
    ],
)
def test_what_cannot_be_folded_is_named(
    records: list[Record], folds: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        folds_of(records, folds)
