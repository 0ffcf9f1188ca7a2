"""Training a model on an archive: from a manifest to a calibrated model folder."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflow._files import write_text
from fastflow.archive.model_folder import INVENTORY, model_folder
from fastflow.archive.options import pick_device
from fastflow.archive.training_data import TRAIN, VAL, UsableFiles, choose, load_chosen
from fastflow.data.grids import majority_grid
from fastflow.data.inventory import Inventory
from fastflow.data.listing import Listing, list_records
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import SliceSet
from fastflow.data.training_images import TrainingImages
from fastflow.decision import range_around
from fastflow.errors import VolumeError
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import score_slices, volume_log_probs
from fastflow.training.calibration import fit_temperature
from fastflow.training.devices import Ranks, joined
from fastflow.training.trainer import EpochRecord, TrainConfig, train


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        model: in evaluation mode, calibrated where there was a validation set; also in its folder.
        history: one record per epoch.
        errors: files that could not be read and were left out.
        inventory: everything that was found, and why files were left out.
        is_first: whether this process is the first of a training on several devices, or the only one.
    """

    model: MagicFlow
    history: list[EpochRecord]
    errors: list[VolumeError]
    inventory: Inventory
    is_first: bool = True


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
    reading: Callable[[int, int], None] | None = None,
    progress: Callable[[EpochRecord], None] | None = None,
    counted: Callable[[UsableFiles], None] | None = None,
    overwrite: bool = False,
    lock: bool = True,
) -> Trained:
    """Train on the split ``train``, choose the epoch and fit the temperature on ``val``, ignore other splits.

    The voxel size and grid of most training volumes become the model's: what lies on another one is an error,
    in training and afterwards, since a density model punishes any background that it has not seen.

    With several devices (`TrainConfig.devices`), the first process reads, writes and calibrates; the model
    that the others return is not calibrated.

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
        reading: called with the number of files read and their total.
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
        OtherProcessError: another process of a training on several devices has failed.
    """
    config = config or TrainConfig()
    pick_device(device)
    chosen = choose(records)
    names = chosen.class_names
    flow = FlowConfig.preset(preset, len(names), **{"class_names": names, **(flow_changes or {})})
    size = (flow.input_shape[1], flow.input_shape[2])
    # Settings are tried out before files are read.
    Preprocess(size, slices)
    with joined(config, device) as ranks, _folder_of(ranks, folder, overwrite, lock) as work:
        torch.manual_seed(config.seed)
        model = MagicFlow(flow, application_mask)

        def read() -> tuple[dict[str, SliceSet], UsableFiles]:
            preprocess = preprocess_like(chosen.splits[TRAIN], size, slices, workers)
            sets, usable = load_chosen(chosen, preprocess, workers, reading)
            if counted is not None:
                counted(usable)
            usable.check()
            write_text(work / INVENTORY, json.dumps(usable.inventory.to_dict(), indent=1) + "\n")
            model.metadata["preprocess"] = preprocess.to_dict()
            model.metadata["training_data"] = usable.to_dict()
            describe_images(model, sets)
            return sets, usable

        # Volumes are decoded once, by the first of the ranks, which sends the slices to the others.
        sets, usable = ranks.from_first(read)
        history = train(
            model, sets[TRAIN], sets.get(VAL), config, work, progress=progress, device=device, ranks=ranks
        )
        if VAL in sets and ranks.is_first:
            calibrate(model, sets[VAL])
            model.save(work)
    return Trained(model, history, list(usable.errors), usable.inventory, ranks.is_first)


def _folder_of(
    ranks: Ranks, folder: str | PathLike[str], overwrite: bool, lock: bool
) -> AbstractContextManager[Path]:
    """The folder that a training writes into; the first rank alone checks, holds and makes it."""
    return model_folder(folder, overwrite, lock) if ranks.is_first else nullcontext(Path(folder))


def preprocess_like(
    records: Sequence[Record], size: tuple[int, int], slices: str, workers: int = 1
) -> Preprocess:
    """Preprocessing with the voxel size and grid of most volumes as a condition; PNG files set none.

    Args:
        records: of volumes and PNG files, in any order.
        size: (H, W) of the model's image.
        slices: see `Preprocess`.
        workers: processes that read headers where there are many.

    Raises:
        ManifestError: no grid is that of more than half of the volumes.
    """
    grid = majority_grid([record.path for record in records], workers)
    return Preprocess(size, slices) if grid is None else Preprocess(size, slices, grid.spacing, grid.shape)


def describe_images(model: MagicFlow, sets: Mapping[str, SliceSet]) -> None:
    """Keep the statistics of the images of `train` and `val` in the model, which tell images unlike them."""
    used = [sets[name] for name in ("train", "val") if name in sets]
    images = TrainingImages.of_sets(used, model.metadata["preprocess"]["slices"])
    if images is not None:
        model.metadata["images"] = images.to_dict()


def calibrate(model: MagicFlow, val_set: SliceSet) -> None:
    """Fit `model.temperature` on whole volumes, as `classify` scores them; of one class, it stays as it is.

    Their likelihoods are kept in the model's metadata: they tell what is typical of volumes that
    are prepared alike. A volume whose likelihood is not finite is left out, with a warning.

    Raises:
        FloatingPointError: no volume has a finite one.
    """
    log_probs = volume_log_probs(score_slices(model, val_set.images), val_set.volumes)
    finite = np.asarray(np.isfinite(log_probs).all(axis=1))
    if not finite.all():
        name = val_set.paths[int(np.flatnonzero(~finite)[0])]
        bad = f"{np.count_nonzero(~finite)} of {len(finite)} validation volumes, such as {name}"
        if not finite.any():
            raise FloatingPointError(f"{bad}: log-likelihoods are not finite; lower the learning rate")
        warnings.warn(f"{bad}, have no finite log-likelihood, and calibrate nothing", stacklevel=2)
        log_probs = log_probs[finite]
    # The posterior of one class is 1 at any temperature.
    if model.config.num_classes > 1:
        model.temperature = fit_temperature(log_probs, val_set.volume_labels[finite])
    counts = np.bincount(val_set.volumes, minlength=len(val_set.paths))[finite]
    each = np.sort(log_probs.max(axis=1) / counts)
    slices = model.metadata.get("preprocess", {}).get("slices")
    accepted = range_around(each.tolist())
    model.metadata["validation"] = {
        "slices": slices,
        "log_prob": [round(float(value), 3) for value in each],
        "accepted": [round(value, 3) for value in accepted],
    }
