"""Labelled files with splits, from a manifest, a folder of classes or a BIDS dataset."""

from __future__ import annotations

import dataclasses
from os import PathLike
from pathlib import Path

from fastflow.data.inventory import Inventory
from fastflow.data.manifest import Record, index_folder, read_manifest


@dataclasses.dataclass(frozen=True)
class Listing:
    """The files of a source.

    Attributes:
        records: those that can be used, as far as their names and rows tell.
        inventory: how many were found, and why some are no records. ``inventory.used == len(records)``.
    """

    records: list[Record]
    inventory: Inventory


def list_records(source: str | PathLike[str], label: str | None = None) -> Listing:
    """List a manifest, a folder of ``class/file`` or ``split/class/file``, or a BIDS dataset.

    Args:
        source: the manifest or folder.
        label: of a BIDS dataset, the field that holds the class.

    Raises:
        ManifestError: it cannot be read.
    """
    records = index_folder(source) if Path(source).is_dir() else read_manifest(source)
    return Listing(records, Inventory(used=len(records)))
