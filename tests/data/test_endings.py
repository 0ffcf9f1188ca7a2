from __future__ import annotations

import pytest

from fastflow.data.endings import HINTS, ending_of, is_image, unread_ending_of, without_ending


@pytest.mark.parametrize(
    ("name", "ending", "stem"),
    [
        ("a/sub-01.nii.gz", ".nii.gz", "a/sub-01"),
        ("B2.NII.GZ", ".nii.gz", "B2"),
        ("b3.Nii.gz", ".nii.gz", "b3"),
        ("1.2.840.nii", ".nii", "1.2.840"),
        ("b8.PNG", ".png", "b8"),
        ("x.mgz", ".mgz", "x"),
        ("x.gz", None, "x.gz"),
        ("nii", None, "nii"),
        ("", None, ""),
    ],
)
def test_endings_are_known_in_any_case(name: str, ending: str | None, stem: str) -> None:
    assert ending_of(name) == ending and unread_ending_of(name) is None
    assert without_ending(name) == stem
    assert is_image(name) == (ending == ".png")


def test_endings_that_are_not_read_have_hints() -> None:
    for ending, hint in HINTS.items():
        assert ending_of(f"a{ending}") is None and unread_ending_of(f"A{ending.upper()}") == ending and hint
    assert unread_ending_of("notes.txt") is None and unread_ending_of("a.nii.gz") is None
