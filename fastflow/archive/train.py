"""Training a model on an archive: from a manifest to a calibrated model folder."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastflow.archive.options import pick_device
from fastflow.data.endings import is_image
from fastflow.data.manifest import Record, class_names, index_folder, read_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import SliceSet, load_slices
from fastflow.data.volume import read_volume
from fastflow.errors import ManifestError, VolumeError
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import score_slices, volume_log_probs
from fastflow.training.calibration import fit_temperature
from fastflow.training.trainer import EpochRecord, TrainConfig, train


@dataclasses.dataclass(frozen=True)
class Trained:
    """The result of training.

    Attributes:
        model: in evaluation mode, calibrated where there was a validation set; also in its folder.
        history: one record per epoch.
        errors: files that could not be read and were left out.
    """

    model: MagicFlow
    history: list[EpochRecord]
    errors: list[VolumeError]


def read_records(path: str | PathLike[str]) -> list[Record]:
    """The records of a manifest, or of a folder laid out as ``split/class/file``.

    Raises:
        ManifestError: it cannot be read.
    """
    return index_folder(path) if Path(path).is_dir() else read_manifest(path)


def recipe(preset: str, task: str, **changes: Any) -> TrainConfig:
    """How a preset is trained by default, with single fields replaced.

    Raises:
        ValueError: a field is out of range.
    """
    return TrainConfig.demo(**changes) if preset == "demo" else TrainConfig.paper(task, **changes)


def train_on_archive(
    records: Sequence[Record],
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
) -> Trained:
    """Train on the split ``train``, choose the epoch and fit the temperature on ``val``, ignore other splits.

    The first volume's voxel size and grid become the model's: what lies on another one is an error, in
    training and afterwards, since a density model punishes any background that it has not seen.

    Args:
        records: labelled files with splits.
        folder: receives the model.
        preset: a name of `FlowConfig.preset`.
        slices: see `Preprocess`.
        config: how to train; the published recipe when None.
        flow_changes: fields of the preset to replace.
        application_mask: PNG of the `custom` masks; the shipped one when None.
        workers: processes that read files.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        reading: called with the number of files read and their total.
        progress: called after each epoch.

    Raises:
        ManifestError: there is no training file, or none can be read.
        ValueError: a label occurs in ``val`` only, or a setting does not fit.
    """
    config = config or TrainConfig()
    pick_device(device)
    splits = {
        name: [r for r in records if r.split == name and r.label is not None] for name in ("train", "val")
    }
    if not splits["train"]:
        raise ManifestError("no labelled entry has the split 'train'; `fastflow index` assigns splits")
    names = class_names(splits["train"])
    flow = FlowConfig.preset(preset, len(names), **{"class_names": names, **(flow_changes or {})})
    preprocess = preprocess_like(splits["train"], (flow.input_shape[1], flow.input_shape[2]), slices)
    sets, errors = _load(splits, preprocess, names, workers, reading)
    torch.manual_seed(config.seed)
    model = MagicFlow(flow, application_mask)
    model.metadata["preprocess"] = preprocess.to_dict()
    history = train(model, sets["train"], sets.get("val"), config, folder, progress=progress, device=device)
    if "val" in sets:
        calibrate(model, sets["val"])
        model.save(folder)
    return Trained(model, history, errors)


def preprocess_like(records: Sequence[Record], size: tuple[int, int], slices: str) -> Preprocess:
    """Preprocessing with the first readable volume's voxel size and grid as a condition; PNGs set none."""
    for record in records:
        if is_image(record.path):
            continue
        with contextlib.suppress(VolumeError):
            volume = read_volume(record.path)
            x, y, z = volume.data.shape
            return Preprocess(size, slices, volume.spacing, (x, y, z))
    return Preprocess(size, slices)


def _load(
    splits: Mapping[str, Sequence[Record]],
    preprocess: Preprocess,
    names: Sequence[str],
    workers: int,
    reading: Callable[[int, int], None] | None,
) -> tuple[dict[str, SliceSet], list[VolumeError]]:
    total, before = sum(map(len, splits.values())), 0
    sets: dict[str, SliceSet] = {}
    errors: list[VolumeError] = []
    for name, records in splits.items():
        offset = before

        def report(done: int, offset: int = offset) -> None:
            if reading is not None:
                reading(offset + done, total)

        data, bad = load_slices(records, preprocess, names, workers, report)
        errors += bad
        before += len(records)
        if len(data):
            sets[name] = data
    if "train" not in sets:
        raise ManifestError(
            f"none of the {len(splits['train'])} training files can be used; the first: {errors[0]}"
        )
    return sets, errors


def calibrate(model: MagicFlow, val_set: SliceSet) -> None:
    """Fit `model.temperature` on whole volumes, as `classify` scores them.

    Their likelihoods are kept in the model's metadata: they tell what is typical of volumes that
    are prepared alike.
    """
    log_probs = volume_log_probs(score_slices(model, val_set.images), val_set.volumes)
    model.temperature = fit_temperature(log_probs, val_set.volume_labels)
    counts = np.bincount(val_set.volumes, minlength=len(val_set.paths))
    each = np.sort(log_probs.max(axis=1) / counts)
    slices = model.metadata.get("preprocess", {}).get("slices")
    model.metadata["validation"] = {"slices": slices, "log_prob": [round(float(value), 3) for value in each]}
