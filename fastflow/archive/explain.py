"""Explanations of single slices: likelihood attribution maps as pictures and arrays."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastflow._files import write_bytes, write_text
from fastflow._places import Kind, check_place, held, telling_what_stays, without_mark
from fastflow.archive.inputs import gather_listing
from fastflow.archive.names import files_in_table, replace_files, stem_of, unique_names, write_table
from fastflow.archive.options import pick_device
from fastflow.archive.rows import class_names, images_of, preprocess_of
from fastflow.data.inventory import Inventory
from fastflow.data.listing import Listing
from fastflow.data.slices import iterate_measured
from fastflow.data.words import class_indices, find_class
from fastflow.decision import DecisionRule, decide
from fastflow.errors import VolumeError
from fastflow.evaluation.figures import Explanation, attribution_figure, png
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import from_uint8
from fastflow.readout import ARGMAX, GAUSSIAN, GaussianReadout, chosen_readout

TABLE, INVENTORY = "explanations.csv", "inventory.json"
DECIDED = ("predicted", "argmax", "readout")
COLUMNS = ("name", "input", "label", *DECIDED, "status", "error_code", "error_message")
ENDINGS = (".png", ".npz")
KIND = Kind(
    "earlier explanations",
    "explanations need a folder of their own",
    "replace them (--overwrite) or name another folder",
)
# An input has the first status while it was not reached, the second where it is not explained at all.
PENDING, LEFT_OUT = "pending", "left_out"


@dataclasses.dataclass(frozen=True)
class Explained:
    """The result of explaining inputs.

    Attributes:
        rows: one for each input, with the columns of ``explanations.csv``.
        errors: of the files that could not be read.
        inventory: all inputs that were found, and why some were left out.
        left_out: in words, what was left out before any file was read.
    """

    rows: list[dict[str, Any]]
    errors: list[VolumeError]
    inventory: Inventory
    left_out: list[str]


@torch.no_grad()
def explain_slice(
    model: MagicFlow,
    image: NDArray[np.uint8],
    label: int | None = None,
    truth: int | None = None,
    name: str = "",
    readout: GaussianReadout | None = None,
) -> Explanation:
    """Attribute the likelihood of a slice, and its log-odds against the strongest rival, to its pixels.

    The maps are of likelihoods with a read-out too, which chooses the two labels that are compared.

    Args:
        model: in evaluation mode.
        image: (1, H, W) uint8.
        label: the label to explain; the one that is decided on when None.
        truth: the true label, where known.
        name: of the picture.
        readout: decides on label and rival, without a prior; None where the likelihoods do.

    Raises:
        ValueError: the shape or the label does not fit.
    """
    if image.shape != model.config.input_shape or image.dtype != np.uint8:
        raise ValueError(f"image must be {model.config.input_shape} uint8, got {image.shape} {image.dtype}")
    classes = model.config.num_classes
    if label is not None and not 0 <= label < classes:
        raise ValueError(f"label must lie in 0 to {classes - 1}, got {label}")
    x = from_uint8(torch.from_numpy(image[None]).to(model.device))
    log_probs = model.log_prob_all(x)[0].double().cpu().numpy()
    ranked = log_probs if readout is None else readout.discriminants(log_probs)
    label = int(ranked.argmax()) if label is None else label
    others = np.where(np.arange(classes) == label, -np.inf, ranked)
    rival = int(others.argmax()) if classes > 1 else label
    maps, const = model.attribution(
        x.expand(2, -1, -1, -1), torch.tensor([label, rival], device=model.device)
    )
    pixels = maps.double().sum(dim=1).cpu().numpy()
    return Explanation(
        image.max(axis=0),
        log_probs,
        label,
        rival,
        pixels[0],
        pixels[0] - pixels[1],
        float(const[0]),
        truth=truth,
        name=name,
    )


def explain(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    label: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
    lock: bool = True,
    readout: str = ARGMAX,
) -> list[VolumeError]:
    """Explain the middle slice of each file, as `explain_inputs` does.

    Returns:
        The errors of the files that could not be read.
    """
    done = explain_inputs(
        inputs,
        model_folder,
        out,
        label,
        limit,
        device,
        progress,
        overwrite=overwrite,
        lock=lock,
        readout=readout,
    )
    return done.errors


def explain_inputs(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    label: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
    *,
    overwrite: bool = False,
    lock: bool = True,
    readout: str = ARGMAX,
) -> Explained:
    """Explain the middle slice of each file: ``NAME.png``, and ``NAME.npz`` with the maps in nats per pixel.

    ``explanations.csv`` has a row for each input, which says what its NAME is, and ``inventory.json`` how
    many were found and why some are left out; of those, the table names the first of each reason.

    Args:
        inputs: files, folders, manifests.
        model_folder: the model.
        out: the folder of the results.
        label: class to explain; the one that is decided on for each slice when None.
        limit: explain only so many inputs.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        progress: called with the number of inputs done and their total.
        overwrite: replace earlier explanations in `out`. Other files in it stay.
        lock: hold the folder; without it, the caller sees to it that nothing else writes there.
        readout: ``"argmax"``, or ``"gaussian"``: the model's read-out decides on label and rival. A row is
            flagged where it was fitted to several slices, since the middle one alone is explained.

    Raises:
        ValueError: the label is no class of the model.
        ReadoutError: the model has no such read-out.
        ManifestError: the inputs name nothing.
        OutputFolderError: `out` holds other files, or earlier explanations and `overwrite` is not set;
            or another run writes there.
        OSError: `out` cannot be written, or the disk is full. What was written stays.
    """
    model = MagicFlow.load(model_folder, pick_device(device))
    chosen = None if label is None else find_class(label, class_names(model))
    rule = DecisionRule(readout=chosen_readout(readout, model.metadata, class_names(model), None))
    listing = _listed(inputs, limit)
    result = Explained(_first_rows(listing), [], listing.inventory, listing.inventory.details())
    folder = Path(out)
    with (
        held(folder, lambda: check_place(folder, KIND, without_mark(TABLE), overwrite), lock),
        telling_what_stays(folder, lambda: _what_stays(result)),
    ):
        mine = _files(files_in_table(folder / TABLE, "name"))
        wanted = _files(row["name"] for row in result.rows if "name" in row)
        replace_files(folder, mine, wanted, KIND)
        # The table comes first: it says whose the files are, also of a run that is killed.
        _write_tables(folder, result)
        try:
            _explain_all(model, listing, chosen, rule, folder, result, progress)
        except BaseException:
            with contextlib.suppress(OSError):
                _write_tables(folder, result)
            raise
        _write_tables(folder, result)
    return result


def _listed(inputs: Iterable[str | PathLike[str]], limit: int | None) -> Listing:
    """The inputs, of which those beyond a limit are left out."""
    listing = gather_listing(inputs)
    records, inventory = listing.records, listing.inventory
    for record in records[len(records) if limit is None else limit :]:
        inventory.drop("limit", record.path)
    return Listing(records[:limit], inventory)


def _first_rows(listing: Listing) -> list[dict[str, Any]]:
    """Rows of the inputs that will be explained, then of those that are known to be left out."""
    names = unique_names([stem_of(record.path) for record in listing.records])
    pending = [
        {"name": name, "input": record.path, "label": record.label, "status": PENDING}
        for name, record in zip(names, listing.records, strict=True)
    ]
    return pending + [
        {"input": path, "status": LEFT_OUT, "error_code": reason}
        for reason, paths in sorted(listing.inventory.examples.items())
        for path in paths
    ]


def _explain_all(
    model: MagicFlow,
    listing: Listing,
    label: int | None,
    rule: DecisionRule,
    folder: Path,
    result: Explained,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Explain all inputs, and fill in their rows."""
    classes, records = class_names(model), listing.records
    known = class_indices(classes)
    preprocess, training = preprocess_of(model), images_of(model)
    images = iterate_measured([record.path for record in records], preprocess)
    # Rows of what is left out come last.
    explained = zip(records, result.rows, images, strict=False)
    for done, (record, row, image) in enumerate(explained, start=1):
        if isinstance(image, VolumeError):
            result.errors.append(image)
            listing.inventory.drop(image.code, record.path)
            row |= {"status": "error", "error_code": image.code, "error_message": image.message}
        else:
            truth = known.get(record.label or "")
            slices, measured = image
            middle = slices[len(slices) // 2]
            explanation = explain_slice(model, middle, label, truth, row["name"], rule.readout)
            _write(folder, row["name"], explanation, classes)
            unlike = () if training is None else training.flags(measured, record.path, preprocess.slices)
            row |= _decided(explanation, rule, classes, unlike)
        if progress is not None:
            progress(done, len(records))


def _decided(
    explanation: Explanation, rule: DecisionRule, classes: Sequence[str], flags: tuple[tuple[str, str], ...]
) -> dict[str, Any]:
    """The columns that the likelihoods of a slice decide."""
    predicted = argmax = int(explanation.log_probs.argmax())
    try:
        decision = decide(explanation.log_probs[None], rule)
    except FloatingPointError as error:
        flags += (("likelihood", str(error)),)
    else:
        predicted, argmax, flags = decision.label_index, decision.argmax_index, flags + decision.flags
    return {
        "predicted": classes[predicted],
        "argmax": classes[argmax],
        "readout": ARGMAX if rule.readout is None else GAUSSIAN,
        "status": "flagged" if flags else "ok",
        "error_code": ";".join(code for code, _ in flags) or None,
        "error_message": "; ".join(message for _, message in flags) or None,
    }


def _files(names: Iterable[str]) -> list[str]:
    return [f"{name}{ending}" for name in names for ending in ENDINGS]


def _what_stays(result: Explained) -> str:
    done = sum(row["status"] in ("ok", "flagged") for row in result.rows)
    return f"{done} of {result.inventory.found} inputs are explained, and their files stay"


def _write_tables(folder: Path, result: Explained) -> None:
    write_table(folder / TABLE, COLUMNS, result.rows)
    write_text(folder / INVENTORY, json.dumps(result.inventory.to_dict(), indent=1) + "\n")


def _write(folder: Path, name: str, explanation: Explanation, classes: Sequence[str]) -> None:
    picture, arrays = _files([name])
    write_bytes(folder / picture, png(attribution_figure([explanation], tuple(classes))))
    buffer = io.BytesIO()
    fields = {field.name: getattr(explanation, field.name) for field in dataclasses.fields(explanation)}
    fields["truth"] = -1 if explanation.truth is None else explanation.truth
    np.savez_compressed(buffer, **fields, class_names=np.array(classes))
    write_bytes(folder / arrays, buffer.getvalue())
