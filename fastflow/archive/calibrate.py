"""Calibrating a model on volumes: temperature, Gaussian read-out, and how far both can be believed."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.archive.locks import locked
from fastflow.archive.options import pick_device
from fastflow.archive.rows import class_names, preprocess_of
from fastflow.archive.training_data import TRAIN, VAL
from fastflow.data.manifest import Record
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import SliceSet, load_slices
from fastflow.decision import posterior, range_around
from fastflow.errors import ManifestError, OutputFolderError, ReadoutError, VolumeError
from fastflow.evaluation.metrics import probability_metrics
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import score_slices, volume_log_probs
from fastflow.readout import GAUSSIAN
from fastflow.training.calibration import MIN_TEMPERATURE, fit_temperature
from fastflow.training.readout_fit import VolumeScores, cross_fitted, fit_readout, folds_of_groups

FORMAT = 1
# More training volumes of a class make its mean no better that matters, and each is scored under all labels.
CALIBRATION_VOLUMES = 60
FIGURES = ("balanced_accuracy", "ece", "nll")


def calibrate(
    model: MagicFlow,
    val_set: SliceSet,
    train_set: SliceSet | None = None,
    volumes: int = CALIBRATION_VOLUMES,
    seed: int = 0,
) -> None:
    """Fit `model.temperature` and the read-out on whole volumes, as `classify` scores them.

    The temperature is that of the sums of this choice of slices. Likelihoods are kept in the metadata
    (``validation``): they tell what is typical of volumes that are prepared alike. ``readout`` there is the
    read-out, and ``calibration`` says what both are worth on validation volumes that they were not fitted to,
    or why there is no read-out. A volume whose likelihood is not finite is left out, with a warning. Of one
    class, the temperature stays as it is and there is no read-out.

    Args:
        model: in evaluation mode.
        val_set: volumes that it was not trained on.
        train_set: volumes that it was trained on; the read-out is fitted to validation alone when None.
        volumes: training volumes of each class that are scored for the read-out at most, drawn by the seed;
            none where it is 0.
        seed: of the draw, and of the parts of cross-fitting.

    Raises:
        FloatingPointError: no validation volume has a finite likelihood.
    """
    held_out = _scored(model, val_set, "validation")
    if held_out is None:
        raise FloatingPointError(
            f"{len(val_set.paths)} of {len(val_set.paths)} validation volumes, such as {val_set.paths[0]}: "
            "log-likelihoods are not finite; lower the learning rate"
        )
    slices = model.metadata.get("preprocess", {}).get("slices")
    each = np.sort(held_out.log_probs.max(axis=1) / held_out.counts)
    model.metadata["validation"] = {
        "slices": slices,
        "log_prob": [round(float(value), 3) for value in each],
        "accepted": [round(value, 3) for value in range_around(each.tolist())],
    }
    model.metadata.pop("readout", None)
    # The posterior of one class is 1 at any temperature.
    if model.config.num_classes == 1:
        model.metadata.pop("calibration", None)
        return
    model.temperature = fit_temperature(held_out.log_probs, held_out.labels)
    training = None
    if train_set is not None and volumes > 0:
        chosen = drawn(train_set.volume_labels, volumes, seed)
        training = _scored(model, train_set.subset(chosen.tolist()), "training")
    _fit_readout(model, held_out, training, slices, seed)


def _fit_readout(
    model: MagicFlow, held_out: VolumeScores, training: VolumeScores | None, slices: str | None, seed: int
) -> None:
    """Put the read-out and the figures of all ways to decide into the model's metadata."""
    fold = folds_of_groups(held_out, np.ones(len(held_out), dtype=bool), seed)
    tempered = cross_fitted(held_out.log_probs, held_out.labels, fold, MIN_TEMPERATURE)
    names = class_names(model)
    report: dict[str, Any] = {
        "format": FORMAT,
        "slices": slices,
        "volumes": len(held_out),
        "training_volumes": 0 if training is None else len(training),
        "subjects": len(np.unique(held_out.groups)),
        "folds": int(fold.max()) + 1,
        "argmax": _figures(held_out.labels, posterior(held_out.log_probs)),
        "temperature": _figures(held_out.labels, tempered),
        "no_readout": None,
    }
    try:
        fit = fit_readout(held_out, training, names, slices, seed)
    except ReadoutError as error:
        report["no_readout"] = str(error)
    else:
        report[GAUSSIAN] = _figures(held_out.labels, fit.probabilities)
        model.metadata["readout"] = fit.readout.to_dict()
    model.metadata["calibration"] = report


def drawn(labels: NDArray[np.int64], volumes: int, seed: int) -> NDArray[np.int64]:
    """Numbers of at most so many volumes of each class, sorted.

    Args:
        labels: (V,) integers.
        volumes: of each class at most.
        seed: of the draw.
    """
    random = np.random.default_rng(seed)
    chosen = [
        random.permutation(np.flatnonzero(labels == label))[:volumes]
        for label in np.unique(labels[labels >= 0])
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.zeros(0, dtype=np.int64)


def calibration_lines(metadata: Mapping[str, Any]) -> list[str]:
    """The figures of a model's calibration, a line for each way to decide."""
    report = metadata.get("calibration")
    if report is None:
        return []
    lines = [
        f"calibration on {report['volumes']} validation volumes of {report['subjects']} subjects, "
        "each judged by what others were fitted to:"
    ]
    for name, text in (
        ("argmax", "argmax, raw"),
        ("temperature", "argmax, tempered"),
        (GAUSSIAN, "Gaussian read-out"),
    ):
        if name in report:
            values = report[name]
            lines.append(
                f"  {text:<18} balanced accuracy {values['balanced_accuracy']:.3f}, "
                f"NLL {values['nll']:.3f}, ECE {values['ece']:.3f}"
            )
    return lines + ([f"  {report['no_readout']}"] if report["no_readout"] else [])


def calibrate_model(
    folder: str | PathLike[str],
    records: Sequence[Record],
    slices: str | None = None,
    volumes: int = CALIBRATION_VOLUMES,
    seed: int = 0,
    workers: int = 1,
    device: str = "auto",
    overwrite: bool = False,
    lock: bool = True,
    reading: Callable[[int, int], None] | None = None,
) -> tuple[MagicFlow, list[VolumeError]]:
    """Calibrate a model that is there anew, and save it in its folder; its weights stay as they are.

    Args:
        folder: the model.
        records: labelled files; the splits ``val`` and ``train`` are used.
        slices: a choice of slices that becomes the model's; its own when None.
        volumes: see `calibrate`.
        seed: see `calibrate`.
        workers: processes that read files.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        overwrite: the model's ``config.json`` is replaced; it must be set.
        lock: keep other runs out of the folder.
        reading: called with the number of files read and their total.

    Returns:
        `(model, errors)`: the model, and the files that could not be read and were left out.

    Raises:
        OutputFolderError: `overwrite` is not set, or another run holds the folder.
        ManifestError: there is no validation file that can be used, a label is none of the model's, or a
            subject is in both splits.
        CheckpointError: the folder is no model.
        FloatingPointError: no validation volume has a finite likelihood.
    """
    model = MagicFlow.load(folder, pick_device(device))
    if not overwrite:
        raise OutputFolderError(
            f"{Path(folder)}: holds a finished model, whose temperature and read-out would be replaced; "
            "replace them (--overwrite) or copy the model first"
        )
    names = class_names(model)
    used = _chosen(records, names)
    preprocess = preprocess_of(model)
    if slices is not None:
        preprocess = dataclasses.replace(preprocess, slices=slices)
    with locked(folder, lock):
        labels = np.array([names.index(str(record.label)) for record in used[TRAIN]], dtype=np.int64)
        splits = {VAL: used[VAL], TRAIN: [used[TRAIN][i] for i in drawn(labels, volumes, seed)]}
        sets, errors = _loaded(splits, preprocess, names, workers, reading)
        if VAL not in sets:
            raise ManifestError(f"none of the {len(used[VAL])} validation files can be used: {errors[0]}")
        model.metadata["preprocess"] = preprocess.to_dict()
        calibrate(model, sets[VAL], sets.get(TRAIN), volumes, seed)
        model.save(folder)
    return model, errors


def _loaded(
    splits: Mapping[str, Sequence[Record]],
    preprocess: Preprocess,
    names: Sequence[str],
    workers: int,
    reading: Callable[[int, int], None] | None,
) -> tuple[dict[str, SliceSet], list[VolumeError]]:
    """The slices of the splits of which any file can be read, and the errors of the others."""
    total, before = sum(map(len, splits.values())), 0
    sets: dict[str, SliceSet] = {}
    errors: list[VolumeError] = []
    for split, records in splits.items():

        def report(done: int, offset: int = before) -> None:
            if reading is not None:
                reading(offset + done, total)

        data, bad = load_slices(records, preprocess, names, workers, report)
        before += len(records)
        errors += bad
        if len(data):
            sets[split] = data
    return sets, errors


def _chosen(records: Sequence[Record], names: Sequence[str]) -> dict[str, list[Record]]:
    """The labelled records of both splits.

    Raises:
        ManifestError: they do not fit the model or each other.
    """
    used = {
        split: [record for record in records if record.split == split and record.label is not None]
        for split in (VAL, TRAIN)
    }
    if not used[VAL]:
        raise ManifestError("no labelled entry has the split 'val'; `fastflow index` assigns splits")
    for record in used[VAL] + used[TRAIN]:
        if record.label not in names:
            raise ManifestError(
                f"{record.path} has label {record.label!r}, the model knows {', '.join(names)}"
            )
    both = {record.subject for record in used[VAL]} & {record.subject for record in used[TRAIN]}
    if both:
        raise ManifestError(
            f"subject {min(both)!r} is in the splits 'train' and 'val': a validation volume would be "
            "judged by its own training"
        )
    return used


def _figures(labels: NDArray[Any], probabilities: NDArray[np.float64]) -> dict[str, float]:
    metrics = probability_metrics(labels, probabilities)
    return {name: round(float(metrics[name]), 6) for name in FIGURES}


def _scored(model: MagicFlow, data: SliceSet, kind: str) -> VolumeScores | None:
    """The volumes that have a finite likelihood; None where there is none."""
    log_probs = volume_log_probs(score_slices(model, data.images), data.volumes)
    finite = np.asarray(np.isfinite(log_probs).all(axis=1))
    if not finite.all():
        name = data.paths[int(np.flatnonzero(~finite)[0])]
        bad = f"{np.count_nonzero(~finite)} of {len(finite)} {kind} volumes, such as {name}"
        if not finite.any():
            return None
        warnings.warn(f"{bad}, have no finite log-likelihood, and calibrate nothing", stacklevel=3)
    counts = np.bincount(data.volumes, minlength=len(data.paths))
    subjects = np.array(data.subjects)
    return VolumeScores(log_probs[finite], counts[finite], data.volume_labels[finite], subjects[finite])
