from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastflow.archive.training_data import Chosen, Reading, UsableFiles, choose, load_chosen
from fastflow.data.inventory import Inventory
from fastflow.data.listing import Listing
from fastflow.data.manifest import Record, index_folder
from fastflow.data.preprocess import Preprocess
from fastflow.data.slice_cache import SliceCache
from fastflow.errors import ManifestError

GRID = Preprocess((16, 16), "center", (2.0, 2.0, 2.0), (14, 9, 15))


def record(name: str, label: str | None = "A", split: str | None = "train") -> Record:
    return Record(f"{name}.nii", label, name, split)


def usable_of(records: list[Record], preprocess: Preprocess = GRID) -> UsableFiles:
    return load_chosen(choose(records), preprocess)[1]


def scans_of(scans: Path, count: int, split: str = "train") -> list[Record]:
    """The first so many scans of each of the two classes."""
    return [dataclasses.replace(r, split=split) for i, r in enumerate(index_folder(scans)) if i % 10 < count]


def test_everything_is_counted_by_reason() -> None:
    records = [
        *(record(f"a{i}") for i in range(3)),
        record("b", "B"),
        record("v", split="val"),
        record("t", split="test"),
        record("h", split="holdout"),
        record("n", None),
        record("s", split=None),
    ]
    listed = Inventory(used=len(records))
    listed.leave_out(".dcm", "x.dcm")
    chosen = choose(Listing(records, listed))
    assert chosen.class_names == ("A", "B")
    assert {name: len(part) for name, part in chosen.splits.items()} == {"train": 4, "val": 1}
    assert chosen.inventory.line() == (
        "10 files found: 5 used, 5 left out "
        "(.dcm 1, no_label 1, no_split 1, split 'holdout' 1, split 'test' 1)"
    )
    assert "no_label 1 (a class name is needed): n.nii" in (chosen.inventory.details())
    # The caller's own count is not touched.
    assert (listed.used, listed.found) == (9, 10)


def test_words_of_the_listing_are_passed_on(scans: Path) -> None:
    records = [*scans_of(scans, 5), record("n", None)]
    listed = Inventory(used=len(records), hints={"no_label": "name the column"})
    chosen = choose(Listing(records, listed, ("the classes 'a' and 'A' differ in case only",)))
    assert load_chosen(chosen, GRID)[1].warnings() == [
        "the classes 'a' and 'A' differ in case only",
        "left out: no_label 1 (name the column): n.nii",
    ]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "A", "B"]), st.sampled_from([None, "train", "val", "test", "dev", "x"])
        ),
        max_size=30,
    )
)
def test_used_and_left_out_are_what_was_found(rows) -> None:
    records = [record(f"f{i}", label, split) for i, (label, split) in enumerate(rows)]
    records += [record("a"), record("b", "B")]
    unlabelled = [r for r in records if r.split == "val"]
    if unlabelled and all(r.label is None for r in unlabelled):
        with pytest.raises(ManifestError, match="files of the split 'val' has a label"):
            choose(records)
        return
    chosen = choose(records)
    assert chosen.inventory.found == len(records)
    assert chosen.inventory.used == sum(map(len, chosen.splits.values()))


def test_splits_without_end_are_not_all_named() -> None:
    records = [record("a"), *(record(f"f{i}", split=f"part {i}") for i in range(100))]
    inventory = choose(records).inventory
    assert len(inventory.left_out) == 9 and inventory.left_out["other splits"] == 92


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([record("a", split=None)], r"no labelled entry has the split 'train'.*left out \(no_split 1\)"),
        ([record("a", None)], r"needs its name as a label too.*left out \(no_label 1\) \(no_label: a class"),
        ([record("a"), record("v", "B", "val")], "label 'B' of v.nii occurs in the split 'val' only"),
        ([record("a"), record("v", None, "val")], "none of the 1 files of the split 'val' has a label"),
        (
            [record("a"), dataclasses.replace(record("t", split="test"), subject="a")],
            r"subject 'a' is in the splits 'train' \(a.nii\) and 'test' \(t.nii\)",
        ),
        (
            [record("a"), dataclasses.replace(record("t", None, "test"), subject="a")],
            "subject 'a' is in the splits",
        ),
    ],
)
def test_what_cannot_be_trained_on_stops_before_anything_is_read(records, message) -> None:
    with pytest.raises(ManifestError, match=message):
        choose(records)


def test_files_without_a_split_are_nobodys_test() -> None:
    other = dataclasses.replace(record("s", split=None), subject="a")
    assert choose([record("a"), other]).inventory.left_out == {"no_split": 1}


def test_table_says_how_many_files_of_each_class_can_be_used(scans: Path) -> None:
    records = [
        *scans_of(scans, 5),
        record("/nowhere/x", "flat"),
        *(r for i, r in enumerate(scans_of(scans, 10, "val")) if i % 10 >= 8),
    ]
    usable = usable_of(records)
    assert usable.lines() == [
        "15 files found: 14 used, 1 left out (missing 1)",
        "grid: 14 x 9 x 15 voxels of 2 x 2 x 2 mm",
        "train: 10 of 11 files can be used (flat 5 of 6, striped 5)",
        "val: 4 of 4 files can be used (flat 2, striped 2)",
    ]
    assert usable.warnings() == []
    usable.check()
    assert usable.to_dict() == {
        "files": {"train": {"flat": 5, "striped": 5}, "val": {"flat": 2, "striped": 2}},
        "left_out": {"missing": 1},
    }


def test_doubts_are_no_errors(scans: Path) -> None:
    records = [
        *scans_of(scans, 4)[:6],
        *scans_of(scans, 10, "val")[8:10],
        record("/nowhere/v", "striped", "val"),
        record("t", split="test"),
        record("h", split="Test2"),
    ]
    usable = usable_of(records)
    usable.check()
    assert usable.warnings() == [
        "left out: split 'Test2' 1 (training uses the splits train and val): h.nii",
        "class 'flat' has 4 training files: expect little of it",
        "class 'striped' has 2 training files: expect little of it",
        "class 'striped' is not validated: missing 1 of the split 'val'",
    ]


def test_a_class_without_a_file_stops(scans: Path) -> None:
    other = dataclasses.replace(GRID, grid=(14, 9, 16))
    records = scans_of(scans, 2)
    lost = [record(f"/nowhere/{i}", "dotted") for i in range(3)]
    with pytest.raises(ManifestError) as error:
        usable_of([*records, *lost]).check()
    assert "of 1 of 3 classes: 3 of 3 files of class 'dotted': missing 3 (the first: /nowhere/0.nii: " in str(
        error.value
    )
    with pytest.raises(
        ManifestError, match=r"none of the 4 training files can be used; .*\(in all: grid_mismatch 4\)"
    ):
        usable_of(records, other).check()


def test_a_split_without_a_file_stops(scans: Path) -> None:
    usable = usable_of([*scans_of(scans, 2), record("/nowhere/v", "flat", "val")])
    assert usable.lines()[-1] == "val: 0 of 1 files can be used (flat 0 of 1)"
    with pytest.raises(ManifestError, match="none of the 1 files of the split 'val' can be used; the first"):
        usable.check()


def test_pictures_have_no_grid(tmp_path: Path) -> None:
    usable = usable_of([record("/nowhere/x")], Preprocess((16, 16)))
    assert not any(line.startswith("grid") for line in usable.lines())


def test_no_validation_is_no_empty_split(scans: Path) -> None:
    sets, usable = load_chosen(Chosen({"train": scans_of(scans, 1), "val": []}, Inventory(used=2)), GRID)
    assert list(sets) == ["train"] == list(usable.splits)
    usable.check()


# -- the cache -----------------------------------------------------------------------------------------------


def test_a_cache_changes_no_count_no_error_and_no_slice(scans: Path, tmp_path: Path) -> None:
    records = [*scans_of(scans, 4), record("gone"), *scans_of(scans, 5, "val")[4::5]]
    chosen, told = choose(records), []
    plain_sets, plain = load_chosen(chosen, GRID)
    for reused in (0, len(records) - 1):
        reading = Reading(lambda done, total: told.append((done, total)), SliceCache(tmp_path / "cache"))
        sets, usable = load_chosen(chosen, GRID, reading=reading)
        assert usable.reused == (reused, len(records)) and plain.reused is None
        # Errors are compared by their words, as two exceptions are never equal.
        assert (usable.lines(), usable.warnings(), usable.to_dict()) == (
            plain.lines(),
            plain.warnings(),
            plain.to_dict(),
        )
        assert usable.inventory == plain.inventory
        assert list(map(str, usable.errors)) == list(map(str, plain.errors)) != []
        assert sets.keys() == plain_sets.keys() == {"train", "val"}
        for name, data in plain_sets.items():
            for field in ("images", "labels", "volumes", "measured"):
                assert np.array_equal(getattr(sets[name], field), getattr(data, field))
    assert told == 2 * [(i, len(records)) for i in range(1, len(records) + 1)]


def test_the_splits_of_another_fold_share_the_cache(scans: Path, tmp_path: Path) -> None:
    cache = SliceCache(tmp_path / "cache")
    load_chosen(choose(scans_of(scans, 6)), GRID, reading=Reading(cache=cache))
    other = [
        dataclasses.replace(r, split="val" if i % 6 == 2 else "train")
        for i, r in enumerate(scans_of(scans, 6))
    ]
    sets, usable = load_chosen(choose(other), GRID, reading=Reading(cache=cache))
    assert usable.reused == (12, 12)
    expected = load_chosen(choose(other), GRID)[0]
    for name, data in expected.items():
        assert np.array_equal(sets[name].images, data.images) and sets[name].paths == data.paths
