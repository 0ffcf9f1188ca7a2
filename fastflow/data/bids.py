"""The files of a BIDS dataset that slices can be taken from. Torch-free.

Source: Brain Imaging Data Structure 1.10, "Common principles" and the pages of the data types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow.data.endings import ending_of
from fastflow.data.manifest import walk_files

# These folders hold single images; the volumes of series (func, dwi, perf, fmap) suit no model here.
DATATYPES = ("anat", "pet")
# Files with these suffixes lie among the images and are none of anatomy.
NOT_IMAGES = ("mask", "defacemask", "dseg", "probseg")


def is_bids(root: str | PathLike[str]) -> bool:
    """Whether a folder describes itself as a BIDS dataset of raw data."""
    try:
        description = json.loads((Path(root) / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    # A dataset of derivatives has its images wherever its pipeline put them, and is searched like a folder.
    return (
        isinstance(description, dict)
        and "BIDSVersion" in description
        and description.get("DatasetType", "raw") == "raw"
    )


def iterate_bids(root: str | PathLike[str]) -> Iterator[str]:
    """Anatomical and PET images below the subjects of a BIDS dataset, sorted.

    They are ``sub-*/[ses-*/]{anat,pet}/*_<suffix>.nii[.gz]``. Files of other data types, masks, and other
    folders are passed over. A folder on the way that cannot be listed is given like a file, so that its
    reader says so.
    """
    for path in walk_files(root, _enters):
        parts = Path(path).relative_to(root).parts
        if not ending_of(path) or (
            len(parts) > 2 and parts[-2] in DATATYPES and _suffix(parts[-1]) not in NOT_IMAGES
        ):
            yield path


def _enters(parts: tuple[str, ...]) -> bool:
    return parts[0].startswith("sub-") and all(
        part.startswith("ses-") or part in DATATYPES for part in parts[1:]
    )


def _suffix(name: str) -> str:
    return name.split(".")[0].rsplit("_", 1)[-1]
