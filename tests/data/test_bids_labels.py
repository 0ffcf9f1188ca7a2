from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastflow.data.bids_labels import list_bids
from fastflow.data.inventory import Inventory
from fastflow.errors import ManifestError
from tests.data.places import describe, touch

IMAGES = (
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-02/anat/sub-02_T1w.nii.gz",
    "sub-03/ses-a/anat/sub-03_ses-a_T2w.nii",
)
PARTICIPANTS = "participant_id\tage\tgroup\tSex\nsub-01\t61\tpatient\tM\n02\t64\t n/a \tF\n"


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Three subjects, two of which are in the table of participants, one without its prefix."""
    (touch(describe(tmp_path / "ds"), *IMAGES) / "participants.tsv").write_text(PARTICIPANTS)
    return tmp_path / "ds"


def labels(root: Path, field: str | None) -> tuple[dict[str, str | None], dict[str, int]]:
    inventory = Inventory()
    records, _ = list_bids(root, field, inventory)
    assert inventory.used == len(records) and all(record.split is None for record in records)
    return {record.subject: record.label for record in records}, dict(inventory.left_out)


def test_labels_of_participants(dataset: Path) -> None:
    assert labels(dataset, "group") == ({"sub-01": "patient"}, {"no_label": 2})
    assert labels(dataset, "sex") == ({"sub-01": "M", "sub-02": "F"}, {"no_label": 1})
    assert labels(dataset, "none") == (dict.fromkeys(("sub-01", "sub-02", "sub-03")), {})


def test_subjects_are_never_classes(dataset: Path) -> None:
    message = "the subjects of a BIDS dataset are no classes: .*--label.*participants.tsv has age, group, Sex"
    with pytest.raises(ManifestError, match=message):
        labels(dataset, None)
    with pytest.raises(
        ManifestError, match=r"sidecar has the field 'dx'; participants.tsv has age, group, Sex"
    ):
        labels(dataset, "dx")


def test_labels_of_sessions_are_taken_where_participants_have_none(dataset: Path) -> None:
    (dataset / "sub-03/sub-03_sessions.tsv").write_text(
        "session_id\tdx\tgroup\nses-a\tMCI\tx\nses-b\tAD\ty\n"
    )
    assert labels(dataset, "dx") == ({"sub-03": "MCI"}, {"no_label": 2})
    # The table of participants decides for the whole dataset.
    assert labels(dataset, "group") == ({"sub-01": "patient"}, {"no_label": 2})


def test_labels_of_sidecars_are_inherited(dataset: Path) -> None:
    files = {
        "T1w.json": {"Manufacturer": "GE", "MagneticFieldStrength": 3.0, "Notes": ["x"]},
        "T2w.json": {"MagneticFieldStrength": 3},
        "task-x_T1w.json": {"Manufacturer": "of another task"},
        "sub-02/anat/sub-02_T1w.json": {"Manufacturer": "Siemens"},
        "sub-03/sub-03_T2w.json": {"Manufacturer": None},
        "sub-03/ses-a/sub-03_ses-b_T2w.json": {"Manufacturer": "of another session"},
    }
    for name, fields in files.items():
        (dataset / name).write_text(json.dumps(fields))
    assert labels(dataset, "Manufacturer") == ({"sub-01": "GE", "sub-02": "Siemens"}, {"no_label": 1})
    assert set(labels(dataset, "MagneticFieldStrength")[0].values()) == {"3"}
    with pytest.raises(ManifestError, match="the sidecars have Manufacturer, MagneticFieldStrength;"):
        labels(dataset, None)
    with pytest.raises(
        ManifestError, match=r"the field 'Notes' of its sidecar must be a string, got \['x'\]"
    ):
        labels(dataset, "Notes")
    (dataset / "T2w.json").write_text("{")
    with pytest.raises(ManifestError, match=r"T2w\.json: the sidecar cannot be read"):
        labels(dataset, "Manufacturer")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("participant_id\tg\nsub-01\tA\n01\tB\n", "line 3: sub-01 has the g 'B', and 'A' above"),
        ("name\tg\nsub-01\tA\n", "no column 'participant_id'; there are name, g"),
        ("participant_id\tg\tG\nsub-01\tA\tB\n", None),
        ("participant_id\tg\tg\nsub-01\tA\tB\n", "the column 'g' stands twice"),
        ("participant_id\tg\nsub-01\tn/a\n", "none of its 3 images has a value of the field 'g'"),
        ("participant_id\tg\nsub-01\n", "line 2: has another number of fields"),
    ],
)
def test_tables_that_do_not_say_it(dataset: Path, table: str, message: str | None) -> None:
    (dataset / "participants.tsv").write_text(table)
    if message is None:
        assert labels(dataset, "g")[0] == {"sub-01": "A"}
        return
    with pytest.raises(ManifestError, match=message):
        labels(dataset, "g")


def test_derivatives_have_the_participants_of_their_dataset(dataset: Path) -> None:
    derived = touch(dataset / "derivatives/p", "sub-01/anat/sub-01_desc-preproc_T1w.nii.gz")
    describe(derived, DatasetType="derivative")
    assert labels(derived, "group") == ({"sub-01": "patient"}, {})


def test_what_is_no_image_to_be_classified_is_counted(dataset: Path) -> None:
    touch(
        dataset,
        "sub-01/anat/sub-01_T1w_mask.nii.gz",
        "sub-01/func/sub-01_task-x_bold.nii.gz",
        "sub-01/anat/a.dcm",
    )
    touch(dataset, "derivatives/x/sub-01/anat/y.nii", "sourcedata/z.dcm", "logo.png", "sub-04/anat/notes.txt")
    assert labels(dataset, "group")[1] == {"no_label": 2, "not_image": 2, ".dcm": 1}
    _, warnings = list_bids(dataset, "group", Inventory())
    assert warnings == [f"{dataset}: subjects without an image: sub-04"]


def test_a_dataset_without_images_says_what_it_has(tmp_path: Path) -> None:
    touch(describe(tmp_path), "sub-01/func/sub-01_bold.nii.gz")
    with pytest.raises(ManifestError, match=r"no anatomical or PET image of this BIDS dataset .*not_image 1"):
        labels(tmp_path, "group")
