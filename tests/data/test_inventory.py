from __future__ import annotations

from fastflow.data.inventory import MAX_EXAMPLES, Inventory


def test_used_and_left_out_are_what_was_found() -> None:
    inventory = Inventory(used=3)
    for i in range(MAX_EXAMPLES + 2):
        inventory.leave_out(".dcm", f"{i}.dcm", "convert it")
    inventory.drop("blank", "a.nii")
    assert inventory.found == 2 + (MAX_EXAMPLES + 2) + 1 and inventory.used == 2
    assert inventory.line() == "10 files found: 2 used, 8 left out (.dcm 7, blank 1)"
    assert inventory.details() == [
        ".dcm 7 (convert it): 0.dcm, 1.dcm, 2.dcm, 3.dcm, 4.dcm and 2 more",
        "blank 1: a.nii",
    ]
    assert inventory.to_dict()["left_out"] == {".dcm": 7, "blank": 1}


def test_nothing_left_out_is_said() -> None:
    assert Inventory(used=1).line() == "1 file found: 1 used, none left out"
