from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastflow.archive.index import describe_classes, index_archive, write_index
from fastflow.data.manifest import Record, index_folder, read_manifest, write_manifest
from fastflow.errors import ManifestError, OutputFolderError
from tests.data.places import describe, touch

FRACTIONS = {"train": 0.6, "val": 0.2, "test": 0.2}


def test_folder_becomes_a_manifest_split_by_subject(scans: Path, tmp_path: Path) -> None:
    written = index_archive(scans, tmp_path / "m.jsonl", FRACTIONS)
    records = read_manifest(tmp_path / "m.jsonl")
    assert [(r.label, r.subject, r.split) for r in records] == [
        (r.label, r.subject, r.split) for r in written
    ]
    counts = {
        (label, split): sum(r.label == label and r.split == split for r in records)
        for label in ("flat", "striped")
        for split in FRACTIONS
    }
    assert set(counts.values()) == {6, 2}
    assert index_archive(scans, tmp_path / "again.csv", FRACTIONS, seed=1) != written


def test_splits_that_are_there_stay_unless_asked(scans: Path, tmp_path: Path) -> None:
    records = [dataclasses.replace(r, split="train") for r in index_folder(scans)]
    write_manifest(records, tmp_path / "m.csv")
    assert {r.split for r in index_archive(tmp_path / "m.csv", tmp_path / "n.csv", FRACTIONS)} == {"train"}
    assert {
        r.split for r in index_archive(tmp_path / "m.csv", tmp_path / "n.csv", FRACTIONS, resplit=True)
    } == set(FRACTIONS)


def test_subject_in_two_splits_is_refused(scans: Path, tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, subject="sub-1", split="train" if i else "test")
        for i, r in enumerate(index_folder(scans))
    ]
    write_manifest(records, tmp_path / "m.csv")
    with pytest.raises(ManifestError, match="subject 'sub-1' is in the splits 'test'"):
        index_archive(tmp_path / "m.csv", tmp_path / "n.csv", FRACTIONS)
    assert not (tmp_path / "n.csv").exists()


def test_half_assigned_splits_are_refused(scans: Path, tmp_path: Path) -> None:
    records = [
        dataclasses.replace(r, split="train" if i else None) for i, r in enumerate(index_folder(scans))
    ]
    write_manifest(records, tmp_path / "m.csv")
    with pytest.raises(ManifestError, match=r"sub-000_T1w\.nii\.gz has no split"):
        index_archive(tmp_path / "m.csv", tmp_path / "n.csv", FRACTIONS)


def test_scans_of_a_patient_stay_together_whatever_the_column_is_called(tmp_path: Path) -> None:
    for i, column in enumerate(("Subject", "participant_id", " Patient ID ")):
        rows = [f"{label}{n}.nii,{label},{label}-{n // 2}" for label in "AB" for n in range(14)]
        (tmp_path / "m.csv").write_text(f"path,label,{column}\n" + "\n".join(rows))
        records = index_archive(tmp_path / "m.csv", tmp_path / f"{i}.csv", FRACTIONS)
        splits: dict[str, set[str | None]] = {}
        for record in records:
            splits.setdefault(record.subject, set()).add(record.split)
        assert len(splits) == 14 and all(len(found) == 1 for found in splits.values())


def test_split_folders_are_split_anew_where_a_subject_is_in_two(tmp_path: Path) -> None:
    root = touch(tmp_path / "d", "Training/A/1.png", "Testing/A/1.png", "valid/B/2.png", "Training/B/3.png")
    with pytest.raises(ManifestError, match=r"subject '1' is in the splits 'test' .*--resplit"):
        index_archive(root, tmp_path / "m.csv", FRACTIONS)
    records = index_archive(root, tmp_path / "m.csv", FRACTIONS, resplit=True)
    assert sorted((record.label, record.subject) for record in records) == [
        *[("A", "1"), ("A", "1")],
        *[("B", "2"), ("B", "3")],
    ]
    assert len({record.split for record in records if record.subject == "1"}) == 1


def test_the_count_stands_beside_the_manifest(tmp_path: Path) -> None:
    root = touch(tmp_path / "d", "A/a.nii", "B/b.nii", "B/c.dcm")
    (root / "C").mkdir()
    (root / "C/gone.nii").symlink_to("../.git/annex/objects/x")
    listing = write_index(root, tmp_path / "m.csv", FRACTIONS)
    counts = json.loads((tmp_path / "m.csv.inventory.json").read_text())
    assert counts["source"] == str(root)
    assert (counts["found"], counts["used"], counts["left_out"]) == (4, 2, {".dcm": 1, "no_content": 1})
    assert counts["examples"][".dcm"] == [str(root / "B/c.dcm")]
    assert listing.inventory.used == len(read_manifest(tmp_path / "m.csv")) == 2


def test_a_manifest_is_replaced_only_when_asked(tmp_path: Path) -> None:
    root, out = touch(tmp_path / "d", "A/a.nii"), tmp_path / "m.csv"
    out.write_text("mine")
    with pytest.raises(OutputFolderError, match=r"m\.csv: there is such a file; replace it \(--overwrite\)"):
        write_index(root, out, FRACTIONS)
    assert out.read_text() == "mine" and not (tmp_path / "m.csv.inventory.json").exists()
    write_index(root, out, FRACTIONS, overwrite=True)
    assert read_manifest(out)[0].label == "A"
    with pytest.raises(ManifestError, match=r"ends in \.csv, \.tsv or \.jsonl"):
        write_index(root, tmp_path / "m.txt", FRACTIONS)


def test_labels_of_a_dataset_become_classes(tmp_path: Path) -> None:
    images = [f"sub-{i:02d}/anat/sub-{i:02d}_T1w.nii.gz" for i in range(12)]
    root = touch(describe(tmp_path / "ds"), *images)
    rows = "".join(f"sub-{i:02d}\t{'AD' if i % 2 else 'CN'}\n" for i in range(12))
    (root / "participants.tsv").write_text("participant_id\tdx\n" + rows)
    records = index_archive(root, tmp_path / "m.tsv", FRACTIONS, label="dx")
    assert {record.label for record in records} == {"AD", "CN"} and len(records) == 12
    assert {record.split for record in read_manifest(tmp_path / "m.tsv")} == set(FRACTIONS)
    with pytest.raises(ManifestError, match=r"participants\.tsv has dx"):
        index_archive(root, tmp_path / "n.tsv", FRACTIONS)


def test_warnings_name_what_training_will_miss(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(
        "path,label,split,age\na.nii,A,train,1\nb.nii,A,val,2\nc.nii,B,training,3\nd.nii,B,trian,4\n"
    )
    listing = write_index(tmp_path / "m.csv", tmp_path / "n.csv", FRACTIONS)
    text = "\n".join(listing.warnings)
    assert "the split 'trian' (1 files) is none of train, val, test: training does not use it" in text
    assert "the class 'A' has files in train, val only, none in trian" in text
    assert "the class 'B' has files in train, trian only, none in val" in text
    assert "does not keep the columns age" in text


def test_splits_that_no_subject_fell_to_are_named(tmp_path: Path) -> None:
    listing = write_index(touch(tmp_path / "d", "A/a.nii", "B/b.nii"), tmp_path / "m.csv", FRACTIONS)
    assert [message[:32] for message in listing.warnings] == [
        "no subject fell to the split 'va",
        "no subject fell to the split 'te",
    ]


def test_table_of_classes_and_splits() -> None:
    records = [
        *[Record(f"{i}", "flat", "s", "val") for i in range(12)],
        *[Record("", label, "s", split) for label, split in (("b", "train"), (None, "x"), ("b", None))],
    ]
    assert describe_classes(records) == [
        "  class       train  val  x  (no split)",
        "  b               1    0  0           1",
        "  flat            0   12  0           0",
        "  (no label)      0    0  1           0",
    ]
