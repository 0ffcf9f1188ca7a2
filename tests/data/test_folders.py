from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from fastflow.data.folders import index_folder, list_folder
from fastflow.data.inventory import Inventory
from fastflow.errors import ManifestError
from tests.data.places import touch


def listed(root: Path, *names: str) -> list[tuple[str, str | None, str | None]]:
    """(file, label, split) of the records of a folder with these files."""
    records, _ = list_folder(touch(root, *names), Inventory())
    return [(str(Path(record.path).relative_to(root)), record.label, record.split) for record in records]


def test_published_layout_of_images(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/old/a.png",
        "train/young/b.png",
        "val/old/c.png",
        "validation/old/d.png",
        "test/young/e.png",
    )
    records = index_folder(tmp_path)
    assert [(Path(r.path).name, r.label, r.subject, r.split) for r in records] == [
        ("e.png", "young", "e", "test"),
        ("a.png", "old", "a", "train"),
        ("b.png", "young", "b", "train"),
        ("c.png", "old", "c", "val"),
        ("d.png", "old", "d", "val"),
    ]
    assert all(Path(record.path).is_file() for record in records)


def test_class_folders_of_volumes(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "old/sub-01/anat/sub-01_ses-2_T1w.nii.gz",
        "old/sub-01/anat/extra.nii",
        "young/1.2.840.nii.gz",
    )
    touch(tmp_path, "young/notes.txt", "young/.hidden.nii", ".cache/old/x.nii")
    assert [(Path(r.path).name, r.label, r.subject, r.split) for r in index_folder(tmp_path)] == [
        ("extra.nii", "old", "sub-01", None),
        ("sub-01_ses-2_T1w.nii.gz", "old", "sub-01", None),
        ("1.2.840.nii.gz", "young", "1.2.840", None),
    ]


def test_folders_above_the_root_name_no_subject(tmp_path: Path) -> None:
    root = tmp_path / "sub-study" / "archive"
    touch(root, "old/a.nii", "old/b.nii")
    assert [record.subject for record in index_folder(root)] == ["a", "b"]


def test_folders_that_are_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no such folder"):
        index_folder(tmp_path / "none")
    with pytest.raises(ManifestError, match=r"no \.nii, \.nii\.gz, \.mgz, \.mgh, \.png file"):
        index_folder(tmp_path)
    touch(tmp_path, "train/a.png")
    with pytest.raises(ManifestError, match=r"a\.png: lies in no class folder"):
        index_folder(tmp_path)


def test_split_folders_of_any_name_are_splits(tmp_path: Path) -> None:
    assert listed(tmp_path, "Training/glioma/a.nii", "Testing/notumor/b.nii", "Valid_set/glioma/c.nii") == [
        ("Testing/notumor/b.nii", "notumor", "test"),
        ("Training/glioma/a.nii", "glioma", "train"),
        ("Valid_set/glioma/c.nii", "glioma", "val"),
    ]


def test_splits_may_lie_below_classes(tmp_path: Path) -> None:
    assert listed(tmp_path, "old/train/a.nii", "old/test/sub-1/b.nii", "young/Training/c.nii") == [
        ("old/test/sub-1/b.nii", "old", "test"),
        ("old/train/a.nii", "old", "train"),
        ("young/Training/c.nii", "young", "train"),
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/A/a.nii", "test/A/b.nii", "extra/A/c.nii"], "'test', 'train' are splits, 'extra' are none"),
        (["train/A/a.nii", "control/b.nii"], "'train' are splits, 'control' are none"),
        (["A/train/a.nii", "A/extra/b.nii"], "in 'A' are splits \\('train'\\), beside 'extra'"),
        (["A/train/a.nii", "B/b.nii"], "in 'A', 'B' are splits \\('train'\\), beside other files"),
        (["data/train/A/a.nii", "data/test/A/b.nii"], "all files lie in 'data', .*: give .*/data$"),
        (["train/a.png", "test/b.png"], r"test/b\.png: lies in no class folder"),
        (["a.nii"], r"a\.nii: lies in no class folder"),
        (["none/a.nii", "B/b.nii"], "the class folder 'none' has a name that means 'no class'"),
        (["sub-01/anat/a.nii", "sub-02/anat/b.nii"], "'sub-01', 'sub-02' are subjects, not classes"),
        (["sub-A/a.nii", "sub-B/b.nii"], "'sub-A', 'sub-B' are subjects"),
        (["sub-01/a.nii", "template/b.nii"], "'sub-01' are subjects"),
        (["sub-A/ses-1/a.nii", "template/b.nii"], "'sub-A' are subjects"),
        (["patient 1/a.nii", "Patient_2/b.nii"], "'Patient_2', 'patient 1' are subjects"),
        (["train/sub-01/a.nii", "test/sub-02/b.nii"], "'sub-01', 'sub-02' are subjects"),
        (["anat/a.nii", "func/b.nii"], "'anat', 'func' are parts of a subject"),
    ],
)
def test_folders_that_could_be_read_in_two_ways(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ManifestError, match=message) as caught:
        listed(tmp_path, *names)
    assert str(tmp_path) in str(caught.value)


def test_classes_that_look_a_little_like_subjects(tmp_path: Path) -> None:
    found = listed(tmp_path, "sub-acute/x.nii", "chronic/y.nii", "0/a.nii", "patient/p.nii")
    assert [label for _, label, _ in found] == ["0", "chronic", "patient", "sub-acute"]


def test_names_of_folders_have_one_form(tmp_path: Path) -> None:
    decomposed = unicodedata.normalize("NFD", "café")
    found = listed(tmp_path, "café/a.nii", f"{decomposed}/b.nii", "old  age/c.nii")
    assert {label for _, label, _ in found} == {"café", "old age"}


def test_folders_without_files_decide_nothing(tmp_path: Path) -> None:
    found = listed(tmp_path, "train/A/a.nii", "extra/notes.txt", "more/A/b.dcm", "._x/y.nii")
    assert found == [("train/A/a.nii", "A", "train")]


def test_classes_without_a_file_are_named(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "train/A/a.nii",
        "train/B/b.dcm",
        "val/A/c.nii",
        "val/C/x/d.jpg",
        "val/e.jpg",
        "f.dcm",
        "g/h.txt",
    )
    _, warnings = list_folder(tmp_path, Inventory())
    assert warnings == [f"{tmp_path}: no file of the class {name!r} can be used" for name in "BC"]


def test_files_outside_of_class_folders_are_counted(tmp_path: Path) -> None:
    inventory = Inventory()
    records, _ = list_folder(touch(tmp_path, "train/A/a.nii", "train/logo.png", "top.nii"), inventory)
    assert len(records) == inventory.used == 1
    assert inventory.left_out == {"no_class_folder": 2}
    with pytest.raises(ManifestError, match="lies in no class folder"):
        index_folder(tmp_path)


def test_files_that_cannot_be_seen_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "A/a.nii", "A/folder.nii/inner.nii", "B/b.nii", "C/c.nii", "D/d.nii")
    (tmp_path / "A/gone.nii").symlink_to("../.git/annex/objects/x")
    (tmp_path / "A/loop.nii").symlink_to("loop.nii")
    os.mkfifo(tmp_path / "A/pipe.nii")
    scandir, stat = os.scandir, os.stat

    def refusing_to_list(path: str) -> object:
        if path.endswith("/B"):
            raise PermissionError(13, "Permission denied", path)
        if path.endswith("/C"):
            raise OSError(5, "Input/output error", path)
        return scandir(path)

    def refusing_to_look(path: str, **options: object) -> object:
        if str(path).endswith("d.nii"):
            raise PermissionError(13, "Permission denied", path)
        return stat(path, **options)

    monkeypatch.setattr(os, "scandir", refusing_to_list)
    monkeypatch.setattr(os, "stat", refusing_to_look)
    inventory = Inventory()
    records, warnings = list_folder(tmp_path, inventory)
    assert [Path(record.path).name for record in records] == ["a.nii", "inner.nii"]
    assert warnings == [f"{tmp_path}: no file of the class {name!r} can be used" for name in "BCD"]
    assert inventory.left_out == {"no_content": 2, "not_a_file": 2, "no_permission": 2, "unreadable": 1}
    assert inventory.found == 9 and inventory.examples["no_permission"] == [
        str(tmp_path / "B"),
        str(tmp_path / "D/d.nii"),
    ]


def test_nothing_that_can_be_used_says_what_was_found(tmp_path: Path) -> None:
    touch(tmp_path, "A/a.dcm", "A/b.DCM")
    with pytest.raises(
        ManifestError, match=r"file below this folder; left out were \.dcm 2: DICOM: convert it"
    ):
        listed(tmp_path)


def test_one_file_by_two_links(tmp_path: Path) -> None:
    touch(tmp_path, "train/A/a.nii", "test/A/b.nii")
    (tmp_path / "train/A/again.nii").symlink_to("a.nii")
    inventory = Inventory()
    assert len(list_folder(tmp_path, inventory)[0]) == 2
    assert inventory.left_out == {"duplicate": 1}
    os.link(tmp_path / "train/A/a.nii", tmp_path / "test/A/leak.nii")
    with pytest.raises(ManifestError, match=r"train/A/a\.nii is the same file as .*leak\.nii.* split 'test'"):
        listed(tmp_path)
    (tmp_path / "test/A/leak.nii").rename(tmp_path / "train/A/third.nii")
    (tmp_path / "train/B").mkdir()
    (tmp_path / "train/B/a.nii").symlink_to("../A/a.nii")
    with pytest.raises(ManifestError, match=r"same file as .* label 'A', not 'B'"):
        listed(tmp_path)
