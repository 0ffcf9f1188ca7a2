"""The plan of a run, without running it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from os import PathLike

from fastflow.archive.decode import file_state
from fastflow.archive.inputs import Shard, inputs_of
from fastflow.archive.options import RunOptions
from fastflow.archive.prepare import load_settings
from fastflow.data.endings import ending_of
from fastflow.data.inventory import Inventory
from fastflow.readout import ARGMAX

MAX_SHOWN_PATHS = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """The inputs and the model of a run that is not begun.

    Attributes:
        total: inputs.
        bytes: of the files.
        kinds: inputs by ending of their name.
        missing: inputs that are no file.
        first: paths of the first inputs.
        class_names: of the model.
        slices: which slices of a volume.
        inventory: the inputs as used, and what was left out beside them.
    """

    total: int
    bytes: int
    kinds: dict[str, int]
    missing: int
    first: tuple[str, ...]
    class_names: tuple[str, ...]
    slices: str
    inventory: Inventory = dataclasses.field(default_factory=Inventory)


def plan(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    *,
    manifest: str | PathLike[str] | None = None,
    split: str | None = None,
    shard: str | Shard | None = None,
    slices: str | None = None,
    engine: str = "auto",
    readout: str = ARGMAX,
) -> Plan:
    """List the inputs and load the model, as `classify` would, and write nothing.

    Raises:
        ManifestError: the inputs name nothing.
        CheckpointError: the model folder is not usable.
        ExportError: the export folder is not usable.
        ReadoutError: the model has no read-out for these slices.
        ValueError: an argument does not fit.
    """
    options = RunOptions(
        manifest=manifest,
        split=split,
        shard=shard,
        slices=slices,
        engine=engine,
        device="cpu",
        readout=readout,
    )
    settings = load_settings(model_folder, options)
    total = size = missing = 0
    kinds: Counter[str] = Counter()
    first: list[str] = []
    inventory = Inventory()
    for item in inputs_of(inputs, manifest, split, options.part).counted(inventory):
        total += 1
        bytes_here, _ = file_state(item.path)
        size += max(0, bytes_here) if os.path.isfile(item.path) else 0
        missing += not os.path.isfile(item.path)
        name = os.path.basename(item.path)
        kinds[ending_of(name) or os.path.splitext(name)[1] or "(none)"] += 1
        if len(first) < MAX_SHOWN_PATHS:
            first.append(item.path)
    return Plan(
        total,
        size,
        dict(sorted(kinds.items())),
        missing,
        tuple(first),
        settings.class_names,
        settings.preprocess.slices,
        inventory,
    )
