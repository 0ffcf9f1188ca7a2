"""The files of a BIDS dataset that slices can be taken from. Torch-free.

Source: Brain Imaging Data Structure 1.10, "Common principles" and the pages of the data types.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow.data.endings import ending_of
from fastflow.data.inventory import REASONS
from fastflow.data.walk import Passed, walk_files

# These folders hold single images; the volumes of series (func, dwi, perf, fmap) suit no model here.
DATATYPES = ("anat", "pet")
# Files with these suffixes lie among the images and are none of anatomy.
NOT_IMAGES = ("mask", "defacemask", "dseg", "probseg")
_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")


def is_bids(root: str | PathLike[str]) -> bool:
    """Whether a folder describes itself as a BIDS dataset of raw data."""
    # A dataset of derivatives has its images wherever its pipeline put them, and is searched like a folder.
    return dataset_type(root) == "raw"


def dataset_type(root: str | PathLike[str]) -> str | None:
    """The DatasetType that a folder's ``dataset_description.json`` gives, ``"raw"`` where it gives none.

    None where the folder is no BIDS dataset.
    """
    try:
        description = json.loads((Path(root) / "dataset_description.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(description, dict) or "BIDSVersion" not in description:
        return None
    return str(description.get("DatasetType", "raw"))


def is_dataset(root: str | PathLike[str]) -> bool:
    """Whether a folder is a BIDS dataset, raw or of derivatives, whose images lie below subjects."""
    kind = dataset_type(root)
    return kind == "raw" or (kind is not None and any(subjects_in(root)))


def subjects_in(root: str | PathLike[str]) -> Iterator[str]:
    """The names of the folders of BIDS subjects in a folder; none where it cannot be listed."""
    with contextlib.suppress(OSError), os.scandir(root) as entries:
        yield from (entry.name for entry in entries if _SUBJECT.fullmatch(entry.name) and entry.is_dir())


def iterate_bids(root: str | PathLike[str], passed: Passed | None = None) -> Iterator[str]:
    """Anatomical and PET images below the subjects of a BIDS dataset, sorted.

    They are ``sub-*/[ses-*/]{anat,pet}/*_<suffix>.nii[.gz]``. Files of other data types, masks, and other
    folders are passed over. A folder on the way that cannot be listed is given like a file, so that its
    reader says so.

    Args:
        root: the dataset.
        passed: called as by `walk_files`; files of other data types and masks are ``"not_image"``. Nothing is
            said about files outside of the subjects.
    """

    def of_subjects(reason: str, path: str, hint: str | None) -> None:
        assert passed is not None
        if len(Path(path).relative_to(root).parts) > 1:
            passed(reason, path, hint)

    enters = _enters if passed is None else _enters_subjects
    for path in walk_files(root, enters, None if passed is None else of_subjects):
        parts = Path(path).relative_to(root).parts
        is_wanted = _is_image(parts) if ending_of(path) else not parts or _enters(parts)
        if is_wanted:
            yield path
        elif passed is not None:
            of_subjects("not_image", path, REASONS["not_image"])


def _is_image(parts: tuple[str, ...]) -> bool:
    return len(parts) > 2 and _enters(parts[:-1]) and parts[-2] in DATATYPES and is_anatomy(parts[-1])


def is_anatomy(name: str) -> bool:
    """Whether a file's suffix is that of an image, and not of a mask or a segmentation."""
    return _suffix(name) not in NOT_IMAGES


def _enters_subjects(parts: tuple[str, ...]) -> bool:
    return parts[0].startswith("sub-")


def _enters(parts: tuple[str, ...]) -> bool:
    return _enters_subjects(parts) and all(part.startswith("ses-") or part in DATATYPES for part in parts[1:])


def _suffix(name: str) -> str:
    return name.split(".")[0].rsplit("_", 1)[-1]
