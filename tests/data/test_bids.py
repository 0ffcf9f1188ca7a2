from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fastflow.archive.inputs import Inputs
from fastflow.data import walk
from fastflow.data.bids import is_bids, iterate_bids
from fastflow.data.inventory import Inventory
from fastflow.errors import ManifestError

IMAGES = [
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_run-2_T2w.nii",
    "sub-02/ses-a/anat/sub-02_ses-a_FLAIR.nii.gz",
    "sub-02/ses-a/pet/sub-02_ses-a_pet.nii.gz",
]
OTHERS = [
    "sub-01/func/sub-01_task-rest_bold.nii.gz",
    "sub-01/dwi/sub-01_dwi.nii.gz",
    "sub-01/anat/sub-01_T1w_mask.nii.gz",
    "sub-01/anat/sub-01_dseg.nii.gz",
    "sub-01/anat/sub-01_T1w.json",
    "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz",
    "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
    "template/anat/T1w.nii.gz",
    "logo.png",
]


def dataset(root: Path, files: list[str], **description: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "dataset_description.json").write_text(
        json.dumps({"Name": "n", "BIDSVersion": "1.10.0"} | description)
    )
    return root


def test_anatomy_and_pet_of_the_subjects(tmp_path: Path) -> None:
    root = dataset(tmp_path, IMAGES + OTHERS)
    assert is_bids(root)
    assert [str(Path(path).relative_to(root)) for path in iterate_bids(root)] == sorted(IMAGES)
    assert [item.name for item in Inputs((str(root),))] == sorted(IMAGES)
    # A part of it is a folder like any other.
    assert len(list(Inputs((str(root / "sub-01"),)))) == 6


def test_what_is_passed_over_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = dataset(tmp_path, [*IMAGES, *OTHERS, "sub-01/anat/a.dcm"])
    inventory = Inventory()
    assert len(list(Inputs((str(root),)).counted(inventory))) == inventory.used == len(IMAGES)
    assert inventory.left_out == {"not_image": 4, ".dcm": 1}
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).endswith("func"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refusing)
    # A folder that cannot hold an image is no input, also where it cannot be listed.
    assert len(list(Inputs((str(root),)))) == len(IMAGES)


def test_what_is_no_raw_dataset(tmp_path: Path) -> None:
    assert not is_bids(tmp_path)
    assert not is_bids(dataset(tmp_path / "a", IMAGES, DatasetType="derivative"))
    for content in ("[]", "{}", "not json", "\xff"):
        (tmp_path / "dataset_description.json").write_bytes(content.encode("latin-1"))
        assert not is_bids(tmp_path)


def test_a_dataset_without_images_says_so(tmp_path: Path) -> None:
    root = dataset(tmp_path, OTHERS)
    with pytest.raises(ManifestError, match="no anatomical or PET image of this BIDS dataset"):
        list(Inputs((str(root),)))


def test_folders_that_cannot_be_listed_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = dataset(tmp_path, IMAGES + OTHERS)
    listed, scandir = [], os.scandir

    def refusing(path: str) -> object:
        listed.append(os.path.relpath(path, root))
        if path.endswith(("sub-02", "sub-01/anat", "derivatives", "func")):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(walk.os, "scandir", refusing)
    assert [os.path.relpath(path, root) for path in iterate_bids(root)] == ["sub-01/anat", "sub-02"]
    # Nor is what cannot hold an image looked into.
    assert listed == [".", "sub-01", "sub-01/anat", "sub-02"]
