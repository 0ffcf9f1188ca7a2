from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fastflow.data.records import Record, class_names, split_by_subject, subject_of


@pytest.mark.parametrize(
    ("path", "subject"),
    [
        ("sub-01_ses-1_T1w.nii.gz", "sub-01"),
        ("sub-A7/anat/T1w.nii.gz", "sub-A7"),
        ("sub-01/sub-02_T1w.nii.gz", "sub-02"),
        ("group_sub-03_T1w.nii", "sub-03"),
        ("mysub-project/scan.nii.gz", "scan"),
        ("scan.v1.nii.gz", "scan.v1"),
        ("scan.v2.png", "scan.v2"),
        ("1.2.840.113619.nii", "1.2.840.113619"),
    ],
)
def test_subject_of(path: str, subject: str) -> None:
    assert subject_of(path) == subject
    assert subject_of(Path("/data") / path) == subject


# -- classes and splits --------------------------------------------------------------------------------------


def test_class_names_are_sorted_and_unique() -> None:
    assert class_names([Record(str(i), label, "s") for i, label in enumerate(["b", None, "a", "b"])]) == (
        "a",
        "b",
    )
    assert class_names([]) == ()


def archive(subjects: dict[str, int], files: int = 2) -> list[Record]:
    people = [(label, f"{label}{n}") for label, count in subjects.items() for n in range(count)]
    return [
        Record(f"{label}/{subject}_{i}.nii", label, subject)
        for label, subject in people
        for i in range(files)
    ]


FRACTIONS = {"train": 0.7, "val": 0.1, "test": 0.2}


def test_each_label_is_split_alike() -> None:
    records = split_by_subject(archive({"a": 100, "b": 20}), FRACTIONS, seed=1)
    assert Counter((r.label, r.split) for r in records) == {
        ("a", "train"): 140,
        ("a", "val"): 20,
        ("a", "test"): 40,
        ("b", "train"): 28,
        ("b", "val"): 4,
        ("b", "test"): 8,
    }


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["a", "b", None])), min_size=1, max_size=40),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_a_subject_is_in_one_split(
    files: list[tuple[int, str | None]], weights: list[int], seed: int
) -> None:
    assume(sum(weights) > 0)
    records = [Record(f"{i}.nii", label, f"sub-{number}", "old") for i, (number, label) in enumerate(files)]
    fractions = {f"part{i}": weight / sum(weights) for i, weight in enumerate(weights)}
    result = split_by_subject(records, fractions, seed)
    assert [(r.path, r.label, r.subject) for r in result] == [(r.path, r.label, r.subject) for r in records]
    splits: dict[str, set[str | None]] = {}
    for record in result:
        splits.setdefault(record.subject, set()).add(record.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {record.split for record in result} <= {name for name, share in fractions.items() if share > 0}
    assert split_by_subject(records, fractions, seed) == result


def test_the_seed_decides_and_the_order_of_files_does_not() -> None:
    records = archive({"a": 30, "b": 30}, files=1)
    first = split_by_subject(records, FRACTIONS, seed=3)
    assert split_by_subject(records, FRACTIONS, seed=4) != first
    backwards = split_by_subject(records[::-1], FRACTIONS, seed=3)
    assert backwards[::-1] == first


@pytest.mark.parametrize(
    "fractions", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}, {"a": 0.6, "b": 0.6}]
)
def test_fractions_that_do_not_fit(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fractions must not be negative and sum to 1, got"):
        split_by_subject(archive({"a": 3}), fractions)
