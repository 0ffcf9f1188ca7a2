"""The preparation of a run: the model or the export, the settings, and a runner.

Torch-free until a model is loaded.
"""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fastflow.archive.batches import Runner, local_runner
from fastflow.archive.options import ONNX, RAY, RunOptions, pick_device
from fastflow.archive.rows import Settings, settings_of_export, settings_of_model
from fastflow.archive.scorers import ExportScorer, ModelScorer, OnnxScorer, read_export

if TYPE_CHECKING:
    from fastflow.models.magic_flow import MagicFlow


@dataclasses.dataclass(frozen=True)
class PreparedRun:
    """A run that could begin.

    Attributes:
        settings: of its rows.
        runner: reads and scores.
        precision: in which the model computes.
        device: on which it computes.
        versions: of the library that computes.
    """

    settings: Settings
    runner: Runner
    precision: str
    device: str
    versions: dict[str, str]


def prepare(folder: str | PathLike[str], options: RunOptions) -> PreparedRun:
    """Load the model, or of engine ``"onnx"`` the export, and a runner for it.

    Raises:
        CheckpointError: the model folder is not usable.
        ExportError: the export folder is not usable.
        ValueError: an option does not fit.
    """
    if options.engine == ONNX:
        return _prepare_export(folder, options)
    from fastflow.models.magic_flow import MagicFlow

    model = MagicFlow.load(folder, pick_device(options.device))
    settings = settings_of_model(model, Path(folder), options)
    runner = _runner_of_model(model, folder, settings, options)
    return PreparedRun(settings, runner, options.precision, str(model.device), {"torch": version("torch")})


def load_settings(folder: str | PathLike[str], options: RunOptions) -> Settings:
    """The settings that `prepare` would find, and its errors, except those of a model's engine."""
    if options.engine == ONNX:
        return _prepare_export(folder, options).settings
    from fastflow.models.magic_flow import MagicFlow

    return settings_of_model(MagicFlow.load(folder), Path(folder), options)


def _prepare_export(folder: str | PathLike[str], options: RunOptions) -> PreparedRun:
    export = read_export(folder)
    settings = settings_of_export(export, options)
    if options.precision not in ("float32", export.precision):
        raise ValueError(
            f"precision {options.precision!r} was asked for, "
            f"but {folder} was exported in {export.precision}: "
            f"export the model with --precision {options.precision}"
        )
    scorer = OnnxScorer(folder, options.device)
    runner = local_runner(
        ExportScorer(scorer),
        settings.preprocess,
        options.batch_size,
        options.num_workers,
        # Exports of older versions have no such output.
        latents=settings.scanners is not None and scorer.latent_blocks > 0,
    )
    return PreparedRun(settings, runner, export.precision, scorer.device, {"onnxruntime": scorer.version})


def _runner_of_model(
    model: MagicFlow, folder: str | PathLike[str], settings: Settings, options: RunOptions
) -> Runner:
    batch_size, workers, precision = options.batch_size, options.num_workers, options.precision
    preprocess, latents = settings.preprocess, settings.scanners is not None
    if options.engine == RAY:
        from fastflow.archive.ray_runner import ray_runner

        return ray_runner(folder, preprocess, batch_size, workers, precision, options.device, latents)
    from fastflow.models.scoring import LabelScorer

    scorer = ModelScorer(LabelScorer(model, precision, options.engine))
    return local_runner(scorer, preprocess, batch_size, workers, latents)
