"""Training a model on an archive: from a manifest to a calibrated model folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Unpack

import torch

from fastflow._files import write_text
from fastflow.archive.calibrate import calibrate as calibrate
from fastflow.archive.model_folder import INVENTORY, UNFINISHED, model_folder, read_history
from fastflow.archive.options import pick_device
from fastflow.archive.scanners import describe_scanners
from fastflow.archive.training_data import TRAIN, VAL, Reading, UsableFiles, choose, load_chosen
from fastflow.archive.training_run import TrainingRun, TrainingRunFields
from fastflow.data.grids import majority_grid, read_grids
from fastflow.data.inventory import Inventory
from fastflow.data.listing import Listing, list_records
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess
from fastflow.data.slice_cache import SliceCache
from fastflow.data.slices import SliceSet
from fastflow.data.training_images import TrainingImages
from fastflow.errors import TrainingInterrupted, VolumeError
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.training.devices import Ranks, joined
from fastflow.training.fingerprint import (
    architecture_fingerprint,
    ranks_fingerprint,
    settings_fingerprint,
)
from fastflow.training.logs import check_tensorboard
from fastflow.training.state import check_fingerprint, has_state, is_complete
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
    run: TrainingRun | None = None,
    **options: Unpack[TrainingRunFields],
) -> Trained:
    """Train on the split ``train``, choose the epoch and calibrate on ``val``, ignore other splits.

    The voxel size and grid of most training volumes become the model's: what lies on another one is an error,
    in training and afterwards, since a density model punishes any background that it has not seen.

    With several devices (`TrainConfig.devices`), the first process reads, writes and calibrates; the model
    that the others return is not calibrated.

    The folder is held from before the first volume is read to the end. An earlier model in it stays as it is
    until the new one is finished; until then, history, checkpoints and the state that a stopped training goes
    on from lie in ``unfinished/`` inside it.

    Args:
        records: labelled files with splits; a `Listing` also says what was found and left out.
        folder: receives the model, ``history.jsonl``, ``steps.csv``, ``checkpoints/`` and ``inventory.json``,
            the count of what was found.
        preset: a name of `FlowConfig.preset`.
        slices: see `Preprocess`.
        config: how to train; the published recipe when None.
        flow_changes: fields of the preset to replace.
        application_mask: PNG of the `custom` masks; the shipped one when None.
        workers: processes that read files.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        run: how the training is run and watched.
        options: fields of `run`, each by its name.

    Raises:
        ManifestError: there is no training file, the training volumes share no grid, a subject is in two
            splits, a label occurs in ``val`` only, or none of the files of a split or of a class of ``train``
            can be used.
        OutputFolderError: the folder holds something else, or another run writes into it.
        ResumeError: there is nothing to resume, or data or settings differ from those of the training that is
            to be resumed; no step was taken.
        ValueError: a setting does not fit.
        OSError: the folder cannot be written into.
        TrainingInterrupted: a signal stopped the training; there is a state to go on from.
        OtherProcessError: another process of a training on several devices has failed.
    """
    config = config or TrainConfig()
    run = dataclasses.replace(run or TrainingRun(), **options)
    if run.tensorboard:
        check_tensorboard()
    pick_device(device)
    chosen = choose(records)
    names = chosen.class_names
    flow = FlowConfig.preset(preset, len(names), **{"class_names": names, **(flow_changes or {})})
    size = (flow.input_shape[1], flow.input_shape[2])
    # Settings are tried out before files are read.
    Preprocess(size, slices)
    with _stopped_in_words(Path(folder)), joined(config, device) as ranks:
        with _folder_of(ranks, folder, run) as work:
            torch.manual_seed(config.seed)
            model = MagicFlow(flow, application_mask)

            def read() -> tuple[dict[str, SliceSet], UsableFiles, bool]:
                if run.resume:
                    # The settings are compared before files are read, and all else before the first step.
                    check_fingerprint(work, settings_fingerprint(config), run.allow_changes)
                    check_fingerprint(work, architecture_fingerprint(model))
                    check_fingerprint(work, ranks_fingerprint(ranks.world_size))
                cache = run.reading.cache if isinstance(run.reading, Reading) else None
                preprocess = preprocess_like(chosen.splits[TRAIN], size, slices, workers, cache)
                sets, usable = load_chosen(chosen, preprocess, workers, run.reading)
                if run.counted is not None:
                    run.counted(usable)
                usable.check()
                model.metadata["preprocess"] = preprocess.to_dict()
                model.metadata["training_data"] = usable.to_dict()
                was_complete = is_complete(work)
                if not was_complete:
                    write_text(work / INVENTORY, json.dumps(usable.inventory.to_dict(), indent=1) + "\n")
                    describe_images(model, sets)
                return sets, usable, was_complete

            # Volumes are decoded once, by the first of the ranks, which sends the slices to the others.
            sets, usable, was_complete = ranks.from_first(read)
            # A training that was stopped while its files were moved has nothing left to learn.
            if not was_complete:
                control = dataclasses.replace(run, keep_state=True)
                _train_and_calibrate(model, sets, config, work, device, ranks, control)
        if was_complete and ranks.is_first:
            model = MagicFlow.load(folder)
        history = ranks.from_first(lambda: read_history(folder))
    return Trained(model, history, list(usable.errors), usable.inventory, ranks.is_first)


def _train_and_calibrate(
    model: MagicFlow,
    sets: Mapping[str, SliceSet],
    config: TrainConfig,
    work: Path,
    device: str,
    ranks: Ranks,
    control: TrainingRun,
) -> None:
    """Leave a calibrated model in a folder; the first rank alone calibrates it."""
    validation, notify = sets.get(VAL), control.progress
    train(model, sets[TRAIN], validation, config, work, None, notify, device, control=control, ranks=ranks)
    if validation is not None and ranks.is_first:
        calibrate(model, validation, sets[TRAIN], config.calibration_volumes, config.seed)
        describe_scanners(model, sets)
        model.save(work)


def _folder_of(
    ranks: Ranks, folder: str | PathLike[str], run: TrainingRun
) -> contextlib.AbstractContextManager[Path]:
    """The folder that a training writes into; the first rank alone checks, holds and makes it."""
    if ranks.is_first:
        return model_folder(folder, run.overwrite, run.lock, run.resume)
    return contextlib.nullcontext(Path(folder) / UNFINISHED)


@contextlib.contextmanager
def _stopped_in_words(folder: Path) -> Iterator[None]:
    """Say at Ctrl-C what there is to go on from."""
    try:
        yield
    except TrainingInterrupted:
        raise
    except KeyboardInterrupt as stop:
        if has_state(folder / UNFINISHED) or is_complete(folder / UNFINISHED):
            message = f"stopped; --resume (resume=True) goes on with the training in {folder / UNFINISHED}"
            raise TrainingInterrupted(signal.SIGINT, message) from stop
        raise


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
