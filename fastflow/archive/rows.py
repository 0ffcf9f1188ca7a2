"""The rows of a run: their settings, and how log-likelihoods become a row. Torch-free."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastflow.archive.batches import ScoredInput
from fastflow.archive.journal import Row
from fastflow.archive.options import RunOptions
from fastflow.archive.scorers import Export
from fastflow.data.preprocess import GREY_LEVEL, Preprocess
from fastflow.data.training_images import UNLIKE_TRAINING, TrainingImages, training_images
from fastflow.decision import (
    ATYPICAL,
    NOT_FINITE,
    READOUT_SLICES,
    DecisionRule,
    accepted_range,
    check_prior,
    decide,
)
from fastflow.errors import FastflowError, VolumeError
from fastflow.novelty import (
    UNKNOWN_SCANNER,
    KnownScanners,
    check_reject_below,
    known_scanners,
    scanner_flags,
)
from fastflow.readout import ARGMAX, GAUSSIAN, GaussianReadout, chosen_readout

if TYPE_CHECKING:
    from fastflow.models.magic_flow import MagicFlow

STATUSES = ("ok", "flagged", "error")

# Codes of rows beside those of `fastflow.data.volume`: errors first, then the flags.
CODES = {
    "likelihood": NOT_FINITE,
    "worker": "the process that was reading the file died",
    "timeout": "the file could not be read in time",
    UNLIKE_TRAINING: "the image has other grey levels, grain, layout or share of negative voxels "
    "than the images of training",
    "atypical": "the likelihood is beyond that of every validation volume, "
    f"or the typicality p-value is below {ATYPICAL}",
    READOUT_SLICES: "the read-out decides on another number of slices than it was fitted to",
    UNKNOWN_SCANNER: "the p-value of a scanner that the model was trained on is below --reject-below",
}
FLAGS = (UNLIKE_TRAINING, "atypical", READOUT_SLICES, UNKNOWN_SCANNER)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings that a run's rows depend on, beside the files. A run is only resumed with equal ones.

    Attributes:
        model_hash: of the model's ``config.json``, which names the hash of its weights.
        class_names: K names.
        temperature: of the posterior.
        prior: (K,) probabilities, None for uniform ones.
        preprocess: the model's, with this run's slices.
        combine: ``"sum"`` or ``"mean"`` of the slices' log-likelihoods.
        id_from: see `Item.id`.
        dims: D, elements of an image.
        validation: sorted log-likelihoods a slice of validation volumes under their predicted label, None
            where unknown.
        images: statistics of the images of training, None where unknown.
        accepted: see `DecisionRule`.
        readout: see `DecisionRule`.
        scanners: how the scanners of training look, None where unknown or of other slices.
        reject_below: the p-value of a known scanner below which a row is flagged; None flags none.
    """

    model_hash: str
    class_names: tuple[str, ...]
    temperature: float
    prior: tuple[float, ...] | None
    preprocess: Preprocess
    combine: str
    id_from: str
    dims: int
    validation: tuple[float, ...] | None
    images: TrainingImages | None = None
    accepted: tuple[float, float] | None = None
    readout: GaussianReadout | None = None
    scanners: KnownScanners | None = None
    reject_below: float | None = None

    @property
    def rule(self) -> DecisionRule:
        """How log-likelihoods become a decision."""
        return DecisionRule(
            self.temperature, self.prior, self.combine, self.validation, self.accepted, self.readout
        )

    @property
    def constant(self) -> dict[str, Any]:
        """Columns that are the same in every row."""
        prior = "uniform" if self.prior is None else " ".join(f"{p:.10g}" for p in self.prior)
        return {
            "readout": ARGMAX if self.readout is None else GAUSSIAN,
            "temperature": self.temperature if self.readout is None else self.readout.temperature,
            "prior": prior,
            "model_hash": self.model_hash,
        }


def make_row(scored: ScoredInput, settings: Settings) -> Row:
    """The journal's row of an input."""
    row: Row = {
        "path": scored.item.id(settings.id_from),
        "size": scored.size,
        "mtime_ns": scored.mtime_ns,
        "label": scored.item.label,
        "seconds": round(scored.seconds, 6),
    }
    if isinstance(scored.result, VolumeError):
        return row | _error(scored.result.code, scored.result.message)
    try:
        decision = decide(scored.result, settings.rule)
    except FloatingPointError as error:
        return row | _error("likelihood", str(error))
    scanner_p = None
    if settings.scanners is not None:
        scanner_p = settings.scanners.p_of_volume(scored.result, scored.correlations, scored.grain)
    unknown = scanner_flags(scanner_p, settings.reject_below)
    flags = (*scored.flags, *unlike_training(scored, settings), *decision.flags, *unknown)
    return row | {
        "status": "flagged" if flags else "ok",
        "error_code": ";".join(code for code, _ in flags) or None,
        "error_message": "; ".join(message for _, message in flags) or None,
        "predicted": settings.class_names[decision.label_index],
        "argmax": settings.class_names[decision.argmax_index],
        "margin": decision.margin,
        "bits_per_dim": -(decision.slice_log_prob / settings.dims + math.log(GREY_LEVEL)) / math.log(2.0),
        "typicality": decision.typicality,
        "scanner_p": scanner_p,
        "logp": decision.log_probs.tolist(),
        "posterior": decision.posterior.tolist(),
    }


def unlike_training(scored: ScoredInput, settings: Settings) -> tuple[tuple[str, str], ...]:
    """The flag of an image that is unlike those of training, as (code, message)."""
    if settings.images is None:
        return ()
    return settings.images.flags(scored.measured, scored.item.path, settings.preprocess.slices)


def _error(code: str, message: str) -> Row:
    return {"status": "error", "error_code": code, "error_message": message}


# -- the settings of a model or an export --------------------------------------------------------------------


def class_names(model: MagicFlow) -> tuple[str, ...]:
    """The model's class names, or "0" to "K-1"."""
    return model.config.class_names or tuple(str(k) for k in range(model.config.num_classes))


def preprocess_of(model: MagicFlow) -> Preprocess:
    """How the model's training data were prepared.

    Raises:
        FastflowError: the model does not know.
    """
    if "preprocess" not in model.metadata:
        raise FastflowError(
            "the model does not say how its images were prepared: "
            "set model.metadata['preprocess'] = Preprocess(...).to_dict() and save it again"
        )
    return Preprocess.from_dict(model.metadata["preprocess"])


def images_of(model: MagicFlow) -> TrainingImages | None:
    """Statistics of the images that the model was trained on; None where it has none.

    Raises:
        FastflowError: they are of another format, or are damaged.
    """
    try:
        return training_images(model.metadata)
    except ValueError as error:
        raise FastflowError(f"the model's metadata cannot be used: {error}") from error


def scanners_of(model: MagicFlow) -> KnownScanners | None:
    """How the scanners that the model was trained on look; None where it does not know.

    Raises:
        FastflowError: they are of another format, or are damaged.
    """
    try:
        return known_scanners(model.metadata)
    except ValueError as error:
        raise FastflowError(f"the model's metadata cannot be used: {error}") from error


def settings_of_model(model: MagicFlow, folder: Path, options: RunOptions) -> Settings:
    """The settings of a run with a model.

    Args:
        model: the model.
        folder: that it was loaded from.
        options: of the run.

    Raises:
        FastflowError: the model does not know how images are prepared, its statistics cannot be used, or it
            has no such read-out for these slices.
        ValueError: an option does not fit the model.
    """
    from fastflow.models.checkpoint import CONFIG

    validation = model.metadata.get("validation") or {}
    return _with_options(
        Settings(
            _hash_of(folder / CONFIG),
            class_names(model),
            model.temperature,
            None,
            preprocess_of(model),
            options.combine,
            options.id_from,
            model.config.num_dims,
            tuple(validation.get("log_prob") or ()),
            images_of(model),
            accepted_range(validation),
            scanners=scanners_of(model),
        ),
        validation.get("slices"),
        options,
        model.metadata,
    )


def settings_of_export(export: Export, options: RunOptions) -> Settings:
    """The settings of a run with an export.

    Raises:
        ExportError: the model does not know how images are prepared.
        ReadoutError: it has no such read-out for these slices.
        ValueError: an option does not fit the model.
    """
    return _with_options(
        Settings(
            _hash_of(export.path),
            export.class_names,
            export.temperature,
            None,
            export.own_preprocess,
            options.combine,
            options.id_from,
            export.dims,
            export.validation or (),
            export.images,
            export.accepted,
            scanners=export.scanners,
        ),
        export.validation_slices,
        options,
        export.document,
    )


def _with_options(
    own: Settings, validation_slices: str | None, options: RunOptions, metadata: Mapping[str, Any]
) -> Settings:
    """The model's own settings with the options' prior, slices and read-out."""
    # A prior of the wrong length must not wait for the first volume.
    prior = (
        None if options.prior is None else tuple(check_prior(options.prior, len(own.class_names)).tolist())
    )
    preprocess = own.preprocess
    if options.slices is not None:
        preprocess = dataclasses.replace(preprocess, slices=options.slices)
    if validation_slices not in (None, preprocess.slices) and options.readout == ARGMAX:
        warnings.warn(
            f"slices {preprocess.slices!r}: the temperature was fitted to sums over {validation_slices!r}, "
            "so that posterior and margin are not calibrated",
            stacklevel=2,
        )
    # Other slices have other likelihoods.
    comparable = own.validation and validation_slices == preprocess.slices
    validation = own.validation if comparable else None
    check_reject_below(options.reject_below, own.scanners, preprocess.slices)
    same = own.scanners is not None and own.scanners.slices == preprocess.slices
    return dataclasses.replace(
        own,
        prior=prior,
        preprocess=preprocess,
        validation=validation,
        readout=chosen_readout(options.readout, metadata, own.class_names, preprocess.slices),
        scanners=own.scanners if same else None,
        reject_below=options.reject_below,
    )


def _hash_of(document: Path) -> str:
    return hashlib.sha256(document.read_bytes()).hexdigest()[:16]
