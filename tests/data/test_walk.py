from __future__ import annotations

from collections import Counter
from pathlib import Path

from fastflow.data.inventory import Inventory
from fastflow.data.walk import find_files, walk_files
from tests.data.places import touch


def counted(root: Path) -> tuple[list[str], Counter[str]]:
    inventory = Inventory()
    found = [str(Path(path).relative_to(root)) for path in walk_files(root, passed=inventory.leave_out)]
    return found, inventory.left_out


def test_endings_in_any_case_are_read_and_others_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "b.NII.GZ", "c.Nii.gz", "d.PNG", "e.MGZ")
    touch(
        tmp_path,
        "f.hdr",
        "f.img",
        "g.nii.bz2",
        "h.NII.ZST",
        "deep/er/i.dcm",
        "i.DCM",
        "j.jpg",
        "IM0001",
        "k.xyz",
    )
    found, left_out = counted(tmp_path)
    assert found == ["a.nii", "b.NII.GZ", "c.Nii.gz", "d.PNG", "e.MGZ"]
    assert left_out == {
        ".hdr": 1,
        ".img": 1,
        ".nii.bz2": 1,
        ".nii.zst": 1,
        ".dcm": 2,
        ".jpg": 1,
        "other": 2,
    }


def test_sidecars_make_no_noise_and_hidden_files_are_counted_where_they_look_like_images(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "a.nii", "a.json", "A.BVAL", "participants.tsv", "README", "notes.txt", "CHANGES")
    touch(tmp_path, "._a.nii", ".b.dcm", ".DS_Store", ".git/annex/x.nii", "__MACOSX/._a.nii")
    assert counted(tmp_path) == (["a.nii"], {"hidden": 3})


def test_folders_are_no_files_of_other_endings(tmp_path: Path) -> None:
    touch(tmp_path, "scan.dcm/a.nii", "scan.img/b.dcm")
    assert counted(tmp_path) == (["scan.dcm/a.nii"], {".dcm": 1})


def test_what_is_not_entered_is_not_counted(tmp_path: Path) -> None:
    touch(tmp_path, "in/a.dcm", "out/b.dcm")
    inventory = Inventory()
    assert not list(walk_files(tmp_path, lambda parts: parts[0] == "in", inventory.leave_out))
    assert inventory.examples == {".dcm": [str(tmp_path / "in/a.dcm")]}


def test_found_files_are_sorted_and_visible(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii", "a/c.png", "a.nii.gz", ".b.nii", "c.json")
    (tmp_path / "folder.nii").mkdir()
    assert [str(p.relative_to(tmp_path)) for p in find_files(tmp_path)] == ["a/c.png", "a.nii.gz", "b.nii"]
    hidden = tmp_path / ".hidden"
    touch(hidden, "a.nii")
    assert find_files(hidden) == [hidden / "a.nii"]
