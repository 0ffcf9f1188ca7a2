"""Classification of many files by likelihood: one row per input, always, in the order of the inputs."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastflow._files import write_text
from fastflow.data.manifest import Record, find_files, read_manifest, subject_of
from fastflow.data.preprocess import Preprocess, slice_indices
from fastflow.data.slices import iterate_images
from fastflow.errors import FastflowError, ManifestError, VolumeError
from fastflow.evaluation.classification import classification_metrics
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import LabelScorer, posterior_from_log_probs, score_slices

MANIFESTS = (".csv", ".jsonl")
COLUMNS = ("path", "status", "error_code", "error_message", "label", "predicted", "margin")
FORMULA = ("=", "+", "-", "@", "\t")

# Longer than any axis: how many slices a specification asks for does not depend on the volume.
MANY = 1 << 20

Image = NDArray[np.uint8]


@dataclasses.dataclass(frozen=True)
class Row:
    """What is known about one input.

    Attributes:
        record: the input.
        log_probs: (K,) nats, summed over the volume's slices; None where the input cannot be used.
        posterior: (K,), None likewise.
        margin: log-odds between the best and the second label under the posterior, nats; NaN where there is none.
        error: why not, None where it can.
    """

    record: Record
    log_probs: NDArray[np.float64] | None = None
    posterior: NDArray[np.float64] | None = None
    margin: float = math.nan
    error: VolumeError | None = None

    @property
    def predicted(self) -> int:
        """Index of the most probable label."""
        if self.posterior is None:
            raise ValueError(f"{self.record.path} has no posterior")
        return int(self.posterior.argmax())


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        rows: one per input, in order.
        class_names: K names.
        out: the CSV file.
    """

    rows: tuple[Row, ...]
    class_names: tuple[str, ...]
    out: str

    @property
    def failed(self) -> int:
        """Number of inputs that could not be used."""
        return sum(row.error is not None for row in self.rows)

    def labelled(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(labels, predictions) of the inputs that were classified and whose label the model knows."""
        known = {name: k for k, name in enumerate(self.class_names)}
        pairs = [(known[row.record.label], row.predicted) for row in self.rows if row.error is None and row.record.label in known]
        labels, predictions = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        return labels, predictions


def gather(inputs: Iterable[str | PathLike[str]], split: str | None = None) -> list[Record]:
    """The files that `inputs` mean.

    Args:
        inputs: files, folders (searched for .nii, .nii.gz and .png) and manifests (.csv, .jsonl). A file that does not
            exist is kept: it becomes an error row.
        split: take only this split of manifests.

    Raises:
        ManifestError: no input, a folder without files, a manifest that cannot be read or has nothing in the split.
    """
    records: list[Record] = []
    for path in map(Path, inputs):
        if path.is_dir():
            found = [Record(str(file), None, subject_of(file)) for file in find_files(path)]
            if not found:
                raise ManifestError(f"{path}: no .nii, .nii.gz or .png file below this folder")
        elif path.suffix in MANIFESTS:
            found = [record for record in read_manifest(path) if split is None or record.split == split]
            if not found:
                raise ManifestError(f"{path}: no entry is in the split {split!r}")
        else:
            found = [Record(str(path), None, subject_of(path))]
        records += found
    if not records:
        raise ManifestError("nothing to classify: give files, folders or a manifest")
    return records


def classify(
    inputs: Iterable[str | PathLike[str]],
    model_folder: str | PathLike[str],
    out: str | PathLike[str],
    prior: Sequence[float] | None = None,
    batch_size: int = 16,
    workers: int = 1,
    device: str = "auto",
    split: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    precision: str = "float32",
    engine: str = "auto",
) -> Summary:
    """Classify files and write one CSV row per input.

    Columns: path, status (ok or error), error_code, error_message, label (where known), predicted, margin (posterior log-odds
    between the best and the second label, nats), ``logp_<class>`` (nats, summed over slices) and ``posterior_<class>``. Text
    that a spreadsheet would take for a formula gets a leading apostrophe. A bad file costs an error row and changes no other row.

    Args:
        inputs: files, folders, manifests; see `gather`.
        model_folder: a model that was trained here, so that it knows its preprocessing.
        out: the CSV file, replaced atomically at the end.
        prior: (K,) probabilities of the labels; uniform when None.
        batch_size: slices per pass.
        workers: processes that read files.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        split: take only this split of manifests.
        progress: called with the number of inputs done and their total.
        precision: see `fastflow.models.scoring.LabelScorer`.
        engine: see `fastflow.models.scoring.LabelScorer`; ``"compile"`` pays from thousands of slices on.

    Raises:
        ManifestError: the inputs name nothing.
        CheckpointError: the model folder is not usable.
        ValueError: the prior, the batch size, the precision or the engine does not fit.
        RuntimeError: ``engine="compile"`` without a C++ compiler.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    model = MagicFlow.load(model_folder, pick_device(device))
    names = class_names(model)
    # A prior of the wrong length must not wait for the first volume.
    posterior_from_log_probs(torch.zeros(1, len(names)), model.temperature, prior)
    preprocess = preprocess_of(model)
    scorer = LabelScorer(model, precision, engine)
    records = gather(inputs, split)
    rows: list[Row] = []
    for row in score_records(scorer, records, preprocess, prior, batch_size, workers):
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(records))
    write_text(out, format_csv(rows, names))
    return Summary(tuple(rows), names, str(out))


def pick_device(name: str) -> str:
    """The device that ``"auto"`` means here.

    Raises:
        ValueError: the name is none of the accepted ones, or there is no such device.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


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
            "the model does not say how its images were prepared: set model.metadata['preprocess'] = Preprocess(...).to_dict() "
            "and save it again"
        )
    return Preprocess.from_dict(model.metadata["preprocess"])


def score_records(
    scorer: LabelScorer,
    records: Sequence[Record],
    preprocess: Preprocess,
    prior: Sequence[float] | None = None,
    batch_size: int = 16,
    workers: int = 1,
) -> Iterator[Row]:
    """A row for each record, in order; files are read ahead of the model by `workers` processes."""
    each = len(slice_indices(preprocess.slices, MANY))
    chunk: list[tuple[Record, Image | VolumeError, int]] = []
    used = 0
    results = iterate_images([record.path for record in records], preprocess, workers)
    for record, result in zip(records, results, strict=True):
        slots = 1 if record.path.lower().endswith(".png") else each
        if chunk and used + slots > batch_size:
            yield from _score(scorer, chunk, prior, batch_size)
            chunk, used = [], 0
        chunk.append((record, result, slots))
        used += slots
    if chunk:
        yield from _score(scorer, chunk, prior, batch_size)


def _score(
    scorer: LabelScorer, chunk: Sequence[tuple[Record, Image | VolumeError, int]], prior: Sequence[float] | None, batch_size: int
) -> Iterator[Row]:
    """Rows of one batch. A file has its slots in it whether it can be read or not, and every batch is full: the last bits of a
    sum depend on the place in the batch, so a bad file must not move another's slices.
    """
    starts = np.cumsum([0, *(slots for *_, slots in chunk)])
    images = np.zeros((max(batch_size, int(starts[-1])), *scorer.model.config.input_shape), dtype=np.uint8)
    for start, (_, image, slots) in zip(starts, chunk, strict=False):
        if not isinstance(image, VolumeError):
            images[start : start + slots] = image
    scores = score_slices(scorer, images, len(images))
    for start, (record, image, slots) in zip(starts, chunk, strict=False):
        yield _row(scorer.model, record, image, scores[start : start + slots].sum(axis=0), prior)


def _row(
    model: MagicFlow, record: Record, image: Image | VolumeError, log_probs: NDArray[np.float64], prior: Sequence[float] | None
) -> Row:
    if isinstance(image, VolumeError):
        return Row(record, error=image)
    if not np.isfinite(log_probs).all():
        message = "the model gives it a log-likelihood that is not finite"
        return Row(record, error=VolumeError(record.path, "likelihood", message))
    posterior = posterior_from_log_probs(torch.from_numpy(log_probs)[None], model.temperature, prior)[0].numpy()
    return Row(record, log_probs, posterior, margin(log_probs, model.temperature, prior))


def format_csv(rows: Iterable[Row], names: Sequence[str]) -> str:
    """The rows as CSV text."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"logp_{name}" for name in names), *(f"posterior_{name}" for name in names)])
    for row in rows:
        writer.writerow(_cells(row, names))
    return buffer.getvalue()


def _cells(row: Row, names: Sequence[str]) -> list[str]:
    path, label = _safe(row.record.path), _safe(row.record.label or "")
    if row.error is not None or row.log_probs is None or row.posterior is None:
        code, message = (row.error.code, row.error.message) if row.error else ("", "")
        return [path, "error", _safe(code), _safe(message), label, "", "", *[""] * (2 * len(names))]
    # Ten digits: more than a float32 likelihood has.
    numbers = [f"{value:.10g}" for value in (row.margin, *row.log_probs, *row.posterior)]
    return [path, "ok", "", "", label, _safe(names[row.predicted]), *numbers]


def margin(log_probs: NDArray[np.float64], temperature: float = 1.0, prior: Sequence[float] | None = None) -> float:
    """Posterior log-odds between the best and the second label, nats, also where the probabilities round to 1 and 0."""
    if len(log_probs) < 2:
        return math.inf
    with np.errstate(divide="ignore"):
        logits = log_probs / temperature + (0.0 if prior is None else np.log(prior))
    second, best = np.sort(logits)[-2:]
    return float(best - second)


def _safe(text: str) -> str:
    # The csv module leaves a carriage return unquoted, and readers take it for the end of the row.
    text = text.replace("\r", "\\r")
    return f"'{text}" if text.startswith(FORMULA) else text


def parse_prior(text: str | None) -> list[float] | None:
    """Numbers separated by commas.

    Raises:
        ValueError: they are not numbers.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"prior must be numbers separated by commas, got {text!r}") from None


def describe(summary: Summary) -> str:
    """The outcome of a run in a few lines: counts, and accuracy with per-class recall where labels are known."""
    lines = [
        f"{summary.out}: {len(summary.rows)} inputs, {len(summary.rows) - summary.failed} classified, {summary.failed} failed"
    ]
    labels, predictions = summary.labelled()
    if len(labels):
        metrics = classification_metrics(labels, predictions, len(summary.class_names), summary.class_names)
        lines.append(f"accuracy {metrics['accuracy']:.3f}, balanced {metrics['balanced_accuracy']:.3f} ({len(labels)} labelled)")
        recalls = {name: recall for name, recall in metrics["per_class_recall"].items() if recall is not None}
        lines += [f"  {name}\trecall {recall:.3f}" for name, recall in recalls.items()]
    return "\n".join(lines)
