"""Do the graphs of an export decide as the model does? Log-odds are compared, on real slices: they decide.

The reference is the model in float64. The model in float32 is measured beside the graphs: this shows which
part of an error is the price of float32, and which comes from the export.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from fastflow.data.preprocess import to_unit_range
from fastflow.decision import readout_logits
from fastflow.errors import ExportError
from fastflow.models.checkpoint import CONFIG
from fastflow.models.flow import Flow
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import LabelScorer, score_slices
from fastflow.numerics import LOG_2PI
from fastflow.readout import readout_of
from fastflow.runtime.export_folder import Export, read_export
from fastflow.runtime.scorer import OnnxScorer
from fastflow.runtime.sessions import import_onnxruntime, is_memory_error, open_session

from .correlation_errors import correlation_errors
from .images import SLICES as SLICES
from .images import anatomy_slices
from .images import load_images as load_images

# Largest errors of a log-odds in nats, by precision.
LIMITS = {"float32": 0.02, "mixed": 0.1}
# Half a grey level where 256 levels span [-1, 1], so that an 8-bit picture is off by one level at the most.
PIXEL_LIMIT = 1.0 / 255.0
# Root mean square, relative to the latent's own; a latent with its elements in wrong places is off by about
# 1.4.
LATENT_LIMIT = 0.01
# Correlations within a latent lie in [-1, 1], those of scans of one scanner within some hundredths.
CORRELATION_LIMIT = 0.005
BATCH_SIZES = (1, 2, 3, 5)
# This many images go through the graphs other than the scorer, each under every label.
MAX_LABELLED_IMAGES = 2


@dataclasses.dataclass(frozen=True)
class Parity:
    """How graphs compare with their model in float64.

    Attributes:
        images: number of images compared.
        source: where they come from, ``"given"`` or ``"packaged anatomy"``.
        limit: largest accepted error of log-odds, nats.
        graphs: for each graph its errors: ``log_odds_error`` (nats; the largest, over images and pairs of
            labels). ``score`` also has its root mean square, ``agreement`` (share of images whose likeliest
            label is the model's) and ``batch_difference`` (nats; between the same image in batches of other
            sizes), and of a model with a read-out ``readout_log_odds_error`` (nats; of single images) and
            ``readout_limit``, which is `limit` times what the read-out makes of such an error, and where it
            gives correlations within the latent their ``correlation_error``; ``sample`` has the
            ``pixel_error`` in [-1, 1], ``latent`` the ``latent_error`` (root mean square, relative),
            ``attribution`` the ``map_error`` (nats, of an element).
        float32: the same errors of the PyTorch model in float32.
        smallest_gap: nats between the two likeliest labels, the smallest of the images; infinite where there
            is one label.
        provider: the provider of ONNX Runtime that computed the graphs.
        onnxruntime: the version of ONNX Runtime.
    """

    images: int
    source: str
    limit: float
    graphs: dict[str, dict[str, float]]
    float32: dict[str, float]
    smallest_gap: float
    provider: str
    onnxruntime: str

    @property
    def failure(self) -> str:
        """The errors beyond their limits, in words; empty where there are none."""
        found = []
        for name, errors in self.graphs.items():
            # "Not less or equal" in place of "greater", so that NaN does not pass.
            error = errors.get("log_odds_error", 0.0)
            if not error <= self.limit:
                found.append(f"{name}: log-odds are off by {error:.3g} nats, {self.limit:g} are accepted")
            error = errors.get("batch_difference", 0.0)
            if not error <= self.limit:
                found.append(f"{name}: batches of other sizes differ by {error:.3g} nats")
            error, accepted = errors.get("readout_log_odds_error", 0.0), errors.get("readout_limit", 0.0)
            if not error <= accepted:
                found.append(
                    f"{name}: the read-out's log-odds are off by {error:.3g} nats, "
                    f"{accepted:.3g} are accepted"
                )
            share = errors.get("agreement", 1.0)
            if not share >= 1.0:
                found.append(
                    f"{name}: the likeliest label is the model's in {share:.2%} of {self.images} images"
                )
            for key, limit in (
                ("pixel_error", PIXEL_LIMIT),
                ("latent_error", LATENT_LIMIT),
                ("map_error", self.limit),
                ("correlation_error", CORRELATION_LIMIT),
            ):
                error = errors.get(key, 0.0)
                if not error <= limit:
                    kind = key.replace("_", " ")
                    found.append(f"{name}: its {kind} is {error:.3g}, {limit:.3g} is accepted")
        return "; ".join(found)

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit."""
        return not self.failure

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values; an infinite gap becomes None, as JSON has no infinity."""
        gap = self.smallest_gap if math.isfinite(self.smallest_gap) else None
        return {**dataclasses.asdict(self), "smallest_gap": gap, "passed": self.passed}


def verify(
    folder: str | PathLike[str],
    model: MagicFlow | str | PathLike[str],
    images: NDArray[np.uint8] | None = None,
    *,
    limit: float | None = None,
    providers: str | Sequence[str] = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Parity:
    """Check an export and compare its graphs with the model.

    Args:
        folder: the export.
        model: the model that was exported, or its folder.
        images: (N, C, H, W) uint8, N >= 1; coronal slices of the heads that ship with the package when None.
        limit: largest error of a log-odds in nats; that of the precision in `LIMITS` when None.
        providers: see `fastflow.runtime.scorer.OnnxScorer`.
        progress: called with the number of comparisons done and their total.

    Returns:
        The errors; `Parity.passed` says whether they are within their limits.

    Raises:
        ExportError: the folder is no export, or damaged, or of another model, or a graph is not valid ONNX or
            fails when run.
        ValueError: the images or the limit do not fit.
    """
    folder = Path(folder)
    export = read_export(folder)
    document = export.document
    model = _check_model(document, model, folder)
    limit = LIMITS[document["precision"]] if limit is None else limit
    if not limit > 0:
        raise ValueError(f"limit must be positive, got {limit}")
    source = "packaged anatomy" if images is None else "given"
    images = anatomy_slices(model.config.input_shape) if images is None else images
    if images.dtype != np.uint8 or images.shape[1:] != model.config.input_shape or not len(images):
        wanted = ", ".join(map(str, model.config.input_shape))
        raise ValueError(f"images must be (N, {wanted}) uint8, N >= 1, got {images.shape} {images.dtype}")
    graphs: dict[str, str] = document["graphs"]
    paths = {name: _check_graph(export, name) for name in graphs}
    tell = progress or (lambda done, total: None)
    steps = len(graphs) + 1
    tell(0, steps)
    exact = LabelScorer(copy.deepcopy(model).double(), engine="eager")
    want = score_slices(exact, images)
    float32 = compare(score_slices(model, images), want)
    errors: dict[str, dict[str, float]] = {}
    provider = ""
    for done, name in enumerate(graphs, start=1):
        tell(done, steps)
        if name == "score":
            scorer = OnnxScorer(folder, providers)
            errors[name], provider = _compare_scores(scorer, images, want, limit), scorer.provider
            errors[name] |= correlation_errors(scorer, exact, images[:MAX_LABELLED_IMAGES])
        else:
            graph, few = _GraphRunner(paths[name], providers), slice(MAX_LABELLED_IMAGES)
            errors[name] = _COMPARISONS[name](graph, exact.model, images[few], want[few])
            provider = graph.provider
    tell(steps, steps)
    ranked = np.sort(want, axis=1)
    gap = float((ranked[:, -1] - ranked[:, -2]).min()) if want.shape[1] > 1 else float("inf")
    version = import_onnxruntime().__version__
    return Parity(len(images), source, limit, errors, float32, gap, provider, version)


def compare(got: NDArray[np.float64], want: NDArray[np.float64]) -> dict[str, float]:
    """Errors of the log-odds between any two labels, in nats, and agreement, of log-likelihoods (N, K)."""
    error = got - want
    log_odds_error = error.max(axis=1) - error.min(axis=1)
    return {
        "log_odds_error": float(log_odds_error.max()),
        "log_odds_error_rms": float(np.sqrt((log_odds_error**2).mean())),
        "agreement": float((got.argmax(axis=1) == want.argmax(axis=1)).mean()),
    }


def _check_model(document: dict[str, Any], model: MagicFlow | str | PathLike[str], folder: Path) -> MagicFlow:
    if isinstance(model, MagicFlow):
        return model
    loaded = MagicFlow.load(model)
    recorded = json.loads((Path(model) / CONFIG).read_text(encoding="utf-8"))["sha256"]
    if recorded != document["weights_sha256"]:
        raise ExportError(
            f"{folder} is an export of weights {document['weights_sha256'][:16]}, "
            f"but {model} has {recorded[:16]}"
        )
    return loaded


def _check_graph(export: Export, name: str) -> Path:
    """A graph's file, whose hash and form have been checked."""
    path = export.file(name)
    try:
        # The checker finds external data only where it is given the path.
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        if any(file.is_symlink() or file.stat().st_nlink > 1 for file in path.parent.iterdir()):
            raise ExportError(
                f"{path}: it or a file beside it is a link, which the checker of graphs does not follow: "
                f"copy the folder with cp -L and compare the copy ({error})"
            ) from error
        raise ExportError(f"{path} is not a valid ONNX graph: {error}") from error
    return path


def _compare_scores(
    scorer: OnnxScorer, images: NDArray[np.uint8], want: NDArray[np.float64], limit: float
) -> dict[str, float]:
    few = images[: max(BATCH_SIZES)]
    try:
        got = scorer.score(images)
        # The same images in batches of each size, each batch from the first image on.
        others = [scorer.run(to_unit_range(few[:size])) for size in BATCH_SIZES if size <= len(few)]
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    differences = [got[: len(other)] - other for other in others]
    batch = max(float((d.max(axis=1) - d.min(axis=1)).max()) for d in differences)
    found = {**compare(got, want), "batch_difference": batch}
    readout = readout_of(scorer.document, scorer.class_names)
    if readout is not None:
        difference = compare(readout_logits(got, readout), readout_logits(want, readout))
        found["readout_log_odds_error"] = difference["log_odds_error"]
        # A read-out weighs log-likelihoods, and their errors with them.
        found["readout_limit"] = limit * max(1.0, readout.gain)
    return found


def _every_label(model: Flow, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Each image once for each label, (N K, C, H, W), and these labels, (N K,)."""
    labels = model.config.num_classes
    return np.repeat(to_unit_range(images), labels, axis=0), np.tile(np.arange(labels), len(images))


class _GraphRunner:
    """Runs a graph of any inputs and outputs.

    Args:
        path: its file.
        providers: see `fastflow.runtime.scorer.OnnxScorer`.
    """

    def __init__(self, path: Path, providers: str | Sequence[str]) -> None:
        self._path = path
        self._session = open_session(path, providers)
        self.provider: str = self._session.get_providers()[0]

    def __call__(self, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """The outputs for inputs by name, (N, ...) each.

        Raises:
            ExportError: ONNX Runtime fails.
            MemoryError: it needs more memory than there is.
        """
        try:
            return list(self._session.run(None, inputs))
        except Exception as error:
            # ONNX Runtime's errors have no base class but Exception.
            message = f"{self._path}: ONNX Runtime cannot run it: {error}"
            raise (MemoryError if is_memory_error(error) else ExportError)(message) from error

    def in_batches(self, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
        """The same outputs, computed in batches of all sizes."""
        outputs, first, count = [], 0, len(next(iter(inputs.values())))
        for size in itertools.cycle(BATCH_SIZES):
            if first >= count:
                break
            batch = {name: values[first : first + size] for name, values in inputs.items()}
            outputs.append(self(**batch))
            first += size
        return [np.concatenate(parts) for parts in zip(*outputs, strict=True)]


def _compare_latent(
    graph: _GraphRunner, model: Flow, images: NDArray[np.uint8], want: NDArray[np.float64]
) -> dict[str, float]:
    x, y = _every_label(model, images)
    z, logdet = graph.in_batches(image=x, label=y)
    z = z.astype(np.float64)
    log_probs = logdet - 0.5 * (z**2 + LOG_2PI).sum(axis=1)
    with torch.no_grad():
        exact = model(torch.from_numpy(x[:1]).double(), torch.from_numpy(y[:1]))[0].numpy()
    return {
        "log_odds_error": compare(log_probs.reshape(want.shape), want)["log_odds_error"],
        "latent_error": float(np.sqrt(((z[:1] - exact) ** 2).mean() / (exact**2).mean())),
    }


def _compare_map(
    graph: _GraphRunner, model: Flow, images: NDArray[np.uint8], want: NDArray[np.float64]
) -> dict[str, float]:
    x, y = _every_label(model, images)
    attribution, constant = graph.in_batches(image=x, label=y)
    log_probs = attribution.astype(np.float64).sum(axis=(1, 2, 3)) + constant
    with torch.no_grad():
        exact = model.attribution(torch.from_numpy(x[:1]).double(), torch.from_numpy(y[:1]))[0].numpy()
    return {
        "log_odds_error": compare(log_probs.reshape(want.shape), want)["log_odds_error"],
        "map_error": float(np.abs(attribution[:1] - exact).max()),
    }


def _compare_sample(
    graph: _GraphRunner, model: Flow, images: NDArray[np.uint8], want: NDArray[np.float64]
) -> dict[str, float]:
    x = to_unit_range(images)
    y = np.arange(len(x)) % model.config.num_classes
    with torch.no_grad():
        z = model(torch.from_numpy(x).double(), torch.from_numpy(y))[0].float().numpy()
    decoded = (graph(z=z, label=y)[0], graph.in_batches(z=z, label=y)[0])
    return {"pixel_error": max(float(np.abs(image - x).max()) for image in decoded)}


_COMPARISONS = {"latent": _compare_latent, "attribution": _compare_map, "sample": _compare_sample}
