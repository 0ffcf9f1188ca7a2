"""Which files of a BIDS dataset are images that a slice can be taken from. Torch-free.

Source: Brain Imaging Data Structure 1.10, "Common principles" and the pages of the data types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow.data.manifest import SUFFIXES, walk_files

# Single images. Series (func, dwi, perf, fmap) hold hundreds of volumes that no model here is trained on.
DATATYPES = ("anat", "pet")
# Not images of anatomy, though they lie among them.
NOT_IMAGES = ("mask", "defacemask", "dseg", "probseg")


def is_bids(root: str | PathLike[str]) -> bool:
    """Whether a folder says of itself that it is a BIDS dataset of raw data."""
    try:
        description = json.loads((Path(root) / "dataset_description.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    # A dataset of derivatives keeps its images wherever its pipeline put them: it is searched as any folder.
    return isinstance(description, dict) and "BIDSVersion" in description and description.get("DatasetType", "raw") == "raw"


def iterate_bids(root: str | PathLike[str]) -> Iterator[str]:
    """Anatomical and PET images below the subjects of a BIDS dataset, sorted: ``sub-*/[ses-*/]{anat,pet}/*_<suffix>.nii[.gz]``.

    Files of other data types, masks, and other folders are passed over; a folder on the way that cannot be listed is given.
    """
    for path in walk_files(root, _enters):
        parts = Path(path).relative_to(root).parts
        if not path.endswith(SUFFIXES) or (len(parts) > 2 and parts[-2] in DATATYPES and _suffix(parts[-1]) not in NOT_IMAGES):
            yield path


def _enters(parts: tuple[str, ...]) -> bool:
    return parts[0].startswith("sub-") and all(part.startswith("ses-") or part in DATATYPES for part in parts[1:])


def _suffix(name: str) -> str:
    return name.split(".")[0].rsplit("_", 1)[-1]
