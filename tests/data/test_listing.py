from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastflow.data.listing import Listing, list_records
from fastflow.errors import ManifestError
from tests.data.places import describe, touch


def listed(path: Path, content: str, label: str | None = None) -> Listing:
    path.write_text(content, encoding="utf-8")
    return list_records(path, label)


def test_a_manifest_with_other_names(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii", "c.nii")
    listing = listed(
        tmp_path / "m.TSV",
        "File Name\tClass\tParticipant_ID\tSet\nb.nii\t old  age \tP1\tValidation\na.nii\tN/A\tP2\tTRAINING\n"
        "c.nii\tyoung\t\tunseen_head\n",
    )
    assert [(r.label, r.subject, r.split) for r in listing.records] == [
        ("old age", "P1", "val"),
        (None, "P2", "train"),
        ("young", "c", "unseen_head"),
    ]
    assert listing.inventory.line() == "3 files found: 3 used, none left out"
    assert listing.warnings == (
        f"{tmp_path / 'm.TSV'}: 1 of 3 entries have no label, and training leaves them out",
    )
    assert not listing.other_columns


def test_a_file_that_is_named_twice_is_used_once(tmp_path: Path) -> None:
    touch(tmp_path, "d/a.nii", "b.nii")
    (tmp_path / "link.nii").symlink_to("b.nii")
    rows = "path,label\nd/a.nii,x\n./d/a.nii,x\nd/../d//a.nii,x\nb.nii,y\nlink.nii,y\n"
    listing = listed(tmp_path / "m.csv", rows)
    assert [Path(record.path).name for record in listing.records] == ["a.nii", "b.nii"]
    assert listing.inventory.left_out == {"duplicate": 3} and listing.inventory.found == 5
    assert listing.inventory.examples["duplicate"][0].endswith("a.nii (line 3)")
    with pytest.raises(ManifestError, match=r"line 3: .*a\.nii has the label 'y', but 'x' in line 2"):
        listed(tmp_path / "m.csv", "path,label\nd/a.nii,x\n./d/a.nii,y\n")
    # Another spelling is found, also of a file that is not there.
    with pytest.raises(ManifestError, match=r"line 3: .*gone\.nii has the label 'y', but 'x' in line 2"):
        listed(tmp_path / "m.csv", "path,label\nd/gone.nii,x\nd/../d/gone.nii,y\n")
    with pytest.raises(ManifestError, match=r"line 3: .* has the split 'test', but 'train' in line 2"):
        listed(tmp_path / "m.csv", "path,split\nd/a.nii,train\nd/a.nii,Testing\n")
    with pytest.raises(ManifestError, match=r"link\.nii is the same file as .* label 'x', not 'y'"):
        listed(tmp_path / "m.csv", "path,label\nb.nii,x\nlink.nii,y\n")


def test_what_may_not_be_meant_is_said(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    listing = listed(
        tmp_path / "m.csv",
        "path,label,subject,age\na.nii,AD,P1,3\nb.nii,ad,p1,4\ngone\\c.nii,AD,P3,5\nd.nii,AD,P4,6\n",
    )
    assert listing.other_columns == ("age",) and listing.inventory.used == 4
    assert list(listing.warnings) == [
        f"{tmp_path / 'm.csv'} names files that are not there: {tmp_path}/gone\\c.nii and 1 more; on this "
        "system folders are separated by /",
        "the classes 'AD' and 'ad' differ in case or separators only",
        "the subjects 'P1' and 'p1' differ in case only",
    ]


def test_another_column_can_be_the_label(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii")
    unlabelled = listed(tmp_path / "m.csv", "path,diagnosis\na.nii,MCI\n")
    assert unlabelled.records[0].label is None
    hint = "the manifest has no column 'label'; --label NAME takes one of diagnosis"
    assert unlabelled.inventory.hints["no_label"] == hint and unlabelled.warnings == (hint,)
    assert (
        listed(tmp_path / "m.csv", "path,diagnosis,label\na.nii,MCI,x\n", "Diagnosis").records[0].label
        == "MCI"
    )
    assert listed(tmp_path / "m.csv", "path,label\na.nii,MCI\n", "none").records[0].label is None
    with pytest.raises(ManifestError, match="line 1: no column 'dx'; there are path, label"):
        listed(tmp_path / "m.csv", "path,label\na.nii,MCI\n", "dx")
    with pytest.raises(ManifestError, match="'Participant' names subjects, which are no classes"):
        listed(tmp_path / "m.csv", "path,participant\na.nii,MCI\n", "Participant")


def test_windows_paths_are_read_where_the_file_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "d/sub-01/a.nii", "c\\d.nii")
    listing = listed(tmp_path / "m.csv", "path\nd\\sub-01\\a.nii\nc\\d.nii\n")
    assert [(record.path, record.subject) for record in listing.records] == [
        (str(tmp_path / "d/sub-01/a.nii"), "sub-01"),
        (str(tmp_path / "c\\d.nii"), "c\\d"),
    ]


def test_letters_in_another_form_of_unicode_are_found(tmp_path: Path) -> None:
    touch(tmp_path, unicodedata.normalize("NFD", "café/ü.nii"), "é.nii")
    listing = listed(tmp_path / "m.csv", "path\ncafé/ü.nii\ne\u0301.nii\nö.nii\n")
    assert [os.path.isfile(record.path) for record in listing.records] == [True, True, False]
    assert listing.records[2].path == str(tmp_path / "ö.nii")


def test_entries_without_a_label_are_said(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.nii")
    listing = listed(tmp_path / "m.csv", "path,label\na.nii,x\nb.nii,n/a\n")
    assert listing.warnings == (
        f"{tmp_path / 'm.csv'}: 1 of 2 entries have no label, and training leaves them out",
    )
    assert listing.inventory.used == 2
    # The first object of JSON lines need not have every key.
    rows = '{"path": "a.nii", "age": 3}\n{"path": "b.nii", "label": "x"}\n'
    assert "1 of 2 entries" in listed(tmp_path / "m.jsonl", rows).warnings[0]


def test_tables_behind_links_without_content_are_named(tmp_path: Path) -> None:
    dataset = touch(describe(tmp_path / "ds"), "sub-01/anat/sub-01_T1w.nii")
    (dataset / "participants.tsv").symlink_to(".git/annex/objects/x")
    with pytest.raises(ManifestError, match=r"participants\.tsv: the file that this link names is missing"):
        list_records(dataset, "g")


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert listed(tmp_path / "m.csv", "path\n~/a.nii\n").records[0].path == str(tmp_path / "home/a.nii")


def test_folders_and_datasets(tmp_path: Path) -> None:
    touch(tmp_path / "classes", "A/a.nii", "a/b.nii", "a/c.dcm")
    listing = list_records(tmp_path / "classes")
    assert [record.label for record in listing.records] == ["A", "a"]
    assert listing.warnings == ("the classes 'A' and 'a' differ in case or separators only",)
    assert listing.inventory.left_out == {".dcm": 1}
    with pytest.raises(
        ManifestError, match=r"a label field \(--label g\) belongs to BIDS datasets and manifests"
    ):
        list_records(tmp_path / "classes", "g")
    dataset = touch(tmp_path / "ds", "sub-01/anat/sub-01_T1w.nii")
    (dataset / "participants.tsv").write_text("participant_id\tg\nsub-01\tx\n")
    with pytest.raises(ManifestError, match="'sub-01' are subjects, not classes"):
        list_records(dataset)
    # It is read as a dataset where that is asked for.
    assert [record.label for record in list_records(dataset, "g").records] == ["x"]
    with pytest.raises(ManifestError, match="--label"):
        list_records(describe(dataset))
    # Derivatives without subjects are a folder like any other.
    touch(describe(tmp_path / "derived", DatasetType="derivative"), "A/a.nii")
    assert [record.label for record in list_records(tmp_path / "derived").records] == ["A"]


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere: there is no such file or folder; a manifest ends in"):
        list_records(tmp_path / "nowhere")
    with pytest.raises(ManifestError, match="a table of BIDS is no manifest, give the dataset's folder"):
        listed(tmp_path / "participants.tsv", "participant_id\tage\nsub-01\t3\n")
    with pytest.raises(ManifestError, match="which names a file: write the names of the columns above it"):
        listed(tmp_path / "m.csv", "A/a.nii,A\n")
    with pytest.raises(ManifestError, match="has no entries"):
        listed(tmp_path / "m.csv", "path,label\n,\n")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["A", "B"]),
            st.sampled_from(["a.nii", "b.PNG", "c.dcm", "d.hdr", "e", "._f.nii", "g.json", "../h.mgz"]),
            st.sampled_from(["file", "folder", "link", "gone"]),
        ),
        max_size=12,
    )
)
def test_used_and_left_out_are_what_was_found(tmp_path: Path, entries: list[tuple[str, str, str]]) -> None:
    root = Path(os.path.join(tmp_path, str(len(list(tmp_path.iterdir())))))
    touch(root, "A/first.nii")
    names = {"A/first.nii"}
    for folder, name, kind in entries:
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            continue
        if kind == "folder":
            path.mkdir()
        elif kind == "file":
            path.touch()
        else:
            path.symlink_to(root / "A/first.nii" if kind == "link" and folder == "A" else root / "nowhere")
        if not name.endswith(".json") and (kind != "folder" or name.endswith((".nii", ".PNG", ".mgz"))):
            names.add(os.path.relpath(path, root))
    listing = list_records(root)
    assert listing.inventory.found == len(names), (names, listing.inventory)
    assert listing.inventory.used == len(listing.records)
