from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fastflow.archive.index import index_archive
from fastflow.data.manifest import index_folder, read_manifest, write_manifest
from fastflow.errors import ManifestError

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
