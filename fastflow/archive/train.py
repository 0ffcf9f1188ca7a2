"""Training a model on an archive: from a manifest to a calibrated model folder."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from fastflow._files import write_text
from fastflow.archive.calibrate import calibrate as calibrate
from fastflow.archive.model_folder import INVENTORY, model_folder
from fastflow.archive.options import pick_device
from fastflow.archive.training_data import TRAIN, VAL, Reading, UsableFiles, choose, load_chosen
from fastflow.data.grids import majority_grid, read_grids
from fastflow.data.inventory import Inventory
from fastflow.data.listing import Listing, list_records
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess
from fastflow.data.slice_cache import SliceCache
from fastflow.data.slices import SliceSet
from fastflow.data.training_images import TrainingImages
from fastflow.errors import VolumeError
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.training.trainer import EpochRecord, TrainConfig, train


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        model: in evaluation mode, calibrated where there was a validation set; also in its folder.
        history: one record per epoch.
        errors: files that could not be read and were left out.
        inventory: everything that was found, and why files were left out.
    """

    model: MagicFlow
    history: list[EpochRecord]
    errors: list[VolumeError]
    inventory: Inventory


def read_records(path: str | PathLike[str]) -> list[Record]:
    """The records of `fastflow.data.listing.list_records`, which also counts what it leaves out.

    Raises:
        ManifestError: the manifest or folder cannot be read.
    """
    return list_records(path).records


def recipe(preset: str, task: str, **changes: Any) -> TrainConfig:
    """How a preset is trained by default, with single fields replaced.

    Raises:
        ValueError: a field is out of range.
    """
    return TrainConfig.demo(**changes) if preset == "demo" else TrainConfig.paper(task, **changes)


def train_on_archive(
    records: Listing | Sequence[Record],
    folder: str | PathLike[str],
    preset: str = "demo",
    slices: str = "center",
    config: TrainConfig | None = None,
    flow_changes: Mapping[str, Any] | None = None,
    application_mask: str | None = None,
    workers: int = 1,
    device: str = "auto",
    reading: Callable[[int, int], None] | Reading | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
    counted: Callable[[UsableFiles], None] | None = None,
    overwrite: bool = False,
    lock: bool = True,
) -> Trained:
    """Train on the split ``train``, choose the epoch and calibrate on ``val``, ignore other splits.

    The voxel size and grid of most training volumes become the model's: what lies on another one is an error,
    in training and afterwards, since a density model punishes any background that it has not seen.

    The folder is held from before the first volume is read to the end. An earlier model in it stays as it is
    until the new one is finished; until then, history and checkpoints lie in ``unfinished/`` inside it.

    Args:
        records: labelled files with splits; a `Listing` also says what was found and left out.
        folder: receives the model, ``history.jsonl``, ``checkpoints/`` and ``inventory.json``, the count of
            what was found.
        preset: a name of `FlowConfig.preset`.
        slices: see `Preprocess`.
        config: how to train; the published recipe when None.
        flow_changes: fields of the preset to replace.
        application_mask: PNG of the `custom` masks; the shipped one when None.
        workers: processes that read files.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        reading: called with the number of files read and their total, or a `Reading`, which also has a cache.
        progress: called after each epoch.
        counted: called before the first epoch with what was found and what of it can be used, also where
            that is too little.
        overwrite: replace an earlier model or unfinished training; other files are never replaced.
        lock: keep other runs out of the folder.

    Raises:
        ManifestError: there is no training file, the training volumes share no grid, a subject is in two
            splits, a label occurs in ``val`` only, or none of the files of a split or of a class of ``train``
            can be used.
        OutputFolderError: the folder holds something else, or another run writes into it.
        ValueError: a setting does not fit.
        OSError: the folder cannot be written into.
    """
    config = config or TrainConfig()
    pick_device(device)
    chosen = choose(records)
    names = chosen.class_names
    flow = FlowConfig.preset(preset, len(names), **{"class_names": names, **(flow_changes or {})})
    size = (flow.input_shape[1], flow.input_shape[2])
    # Settings are tried out before files are read.
    Preprocess(size, slices)
    with model_folder(folder, overwrite, lock) as work:
        torch.manual_seed(config.seed)
        model = MagicFlow(flow, application_mask)
        cache = reading.cache if isinstance(reading, Reading) else None
        preprocess = preprocess_like(chosen.splits[TRAIN], size, slices, workers, cache)
        sets, usable = load_chosen(chosen, preprocess, workers, reading)
        if counted is not None:
            counted(usable)
        usable.check()
        write_text(work / INVENTORY, json.dumps(usable.inventory.to_dict(), indent=1) + "\n")
        model.metadata["preprocess"] = preprocess.to_dict()
        model.metadata["training_data"] = usable.to_dict()
        describe_images(model, sets)
        history = train(model, sets[TRAIN], sets.get(VAL), config, work, progress=progress, device=device)
        if VAL in sets:
            calibrate(model, sets[VAL], sets[TRAIN], config.calibration_volumes, config.seed)
            model.save(work)
    return Trained(model, history, list(usable.errors), usable.inventory)


def preprocess_like(
    records: Sequence[Record],
    size: tuple[int, int],
    slices: str,
    workers: int = 1,
    cache: SliceCache | None = None,
) -> Preprocess:
    """Preprocessing with the voxel size and grid of most volumes as a condition; PNG files set none.

    Args:
        records: of volumes and PNG files, in any order.
        size: (H, W) of the model's image.
        slices: see `Preprocess`.
        workers: processes that read headers where there are many.
        cache: has the grids of files whose headers need not be read.

    Raises:
        ManifestError: no grid is that of more than half of the volumes.
    """
    read = read_grids if cache is None else cache.read_grids
    grid = majority_grid([record.path for record in records], workers, read)
    return Preprocess(size, slices) if grid is None else Preprocess(size, slices, grid.spacing, grid.shape)


def describe_images(model: MagicFlow, sets: Mapping[str, SliceSet]) -> None:
    """Keep the statistics of the images of `train` and `val` in the model, which tell images unlike them."""
    used = [sets[name] for name in ("train", "val") if name in sets]
    images = TrainingImages.of_sets(used, model.metadata["preprocess"]["slices"])
    if images is not None:
        model.metadata["images"] = images.to_dict()
