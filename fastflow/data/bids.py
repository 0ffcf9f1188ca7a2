"""Which files of a BIDS dataset are images that a slice can be taken from. Torch-free.

Source: Brain Imaging Data Structure 1.10, "Common principles" and the pages of the data types.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from os import PathLike
from pathlib import Path

from fastflow.data.manifest import walk_files

# Single images. Series (func, dwi, perf, fmap) hold hundreds of volumes that no model here is trained on.
DATATYPES = ("anat", "pet")
# Not images of anatomy, though they lie among them.
NOT_IMAGES = ("mask", "defacemask", "dseg", "probseg")
# Folders of a dataset that hold no raw data of its own.
ASIDE = ("derivatives", "sourcedata", "code", "stimuli", "phenotype")


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

    Files of other data types, masks, and the folders `ASIDE` are passed over.
    """
    for path in walk_files(root, _enters):
        parts = Path(path).relative_to(root).parts
        suffix = parts[-1].split(".")[0].rsplit("_", 1)[-1]
        if parts[0].startswith("sub-") and len(parts) > 1 and parts[-2] in DATATYPES and suffix not in NOT_IMAGES:
            yield path


def _enters(parts: tuple[str, ...]) -> bool:
    return parts[0] not in ASIDE
