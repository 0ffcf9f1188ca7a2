"""Do the graphs of an export decide as the model does? Compared are log-odds, since these decide, on real slices.

What is compared with is the model in float64. Its own float32 is measured beside the graphs, so that one sees what of an error is
the price of float32 and what comes from the export.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from scipy import ndimage

from fastflow.data.anatomy import HEADS, load_head
from fastflow.data.preprocess import Preprocess, pad_evenly, to_unit_range
from fastflow.data.slices import coronal_slices, read_image
from fastflow.errors import ExportError, VolumeError
from fastflow.models.checkpoint import CONFIG
from fastflow.models.folded import LOG_2PI
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import LabelScorer, score_slices

from ._folder import Export, read_export
from ._session import import_onnxruntime, is_memory_error, open_session
from .runtime import OnnxScorer

# Nats of a log-odds, by precision.
LIMITS = {"float32": 0.02, "mixed": 0.1}
# Of the [-1, 1] that 256 grey levels take: half a level, so that an 8-bit picture is off by one at the most.
PIXEL_LIMIT = 1.0 / 255.0
BATCHES = (1, 2, 3, 5)
SLICES = 16
# Images that go through the graphs that are no scorer, each under every label.
FEW = 2
# Root mean square, relative to the latent's own: one whose elements stand elsewhere is off by about 1.4.
LATENT_LIMIT = 0.01


@dataclasses.dataclass(frozen=True)
class Parity:
    """How graphs compare with their model in float64.

    Attributes:
        images: how many were compared, and ``source`` of what.
        source: ``"given"`` or ``"packaged anatomy"``.
        limit: of the errors of log-odds, nats.
        graphs: for each graph its errors: ``log_odds_error`` (nats; the largest, over images and pairs of labels), of ``score``
            also its root mean square, ``agreement`` (share of images whose likeliest label is the model's) and
            ``batch_difference`` (nats; between the same image in batches of other sizes); of ``sample`` the ``pixel_error``
            in [-1, 1], of ``latent`` the ``latent_error`` (root mean square, relative), of ``attribution`` the ``map_error``
            (nats, of an element).
        float32: the same of the PyTorch model in float32.
        smallest_gap: nats between the two likeliest labels, the smallest of the images.
        provider: of ONNX Runtime, which computed the graphs.
        onnxruntime: its version.
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
        """What is out of its limit, in words; empty where nothing is."""
        found = []
        for name, errors in self.graphs.items():
            # Not "greater", or NaN would pass.
            if not errors.get("log_odds_error", 0.0) <= self.limit:
                found.append(f"{name}: log-odds are off by {errors['log_odds_error']:.3g} nats, {self.limit:g} are accepted")
            if not errors.get("batch_difference", 0.0) <= self.limit:
                found.append(f"{name}: batches of other sizes differ by {errors['batch_difference']:.3g} nats")
            if not errors.get("agreement", 1.0) >= 1.0:
                found.append(f"{name}: the likeliest label is the model's in {errors['agreement']:.2%} of {self.images} images")
            for key, limit in (("pixel_error", PIXEL_LIMIT), ("latent_error", LATENT_LIMIT), ("map_error", self.limit)):
                if not errors.get(key, 0.0) <= limit:
                    what = key.replace("_", " ")
                    found.append(f"{name}: its {what} is {errors[key]:.3g}, {limit:.3g} is accepted")
        return "; ".join(found)

    @property
    def passed(self) -> bool:
        """Whether everything is within its limit."""
        return not self.failure

    def to_dict(self) -> dict[str, Any]:
        """A dictionary of JSON values."""
        return {**dataclasses.asdict(self), "passed": self.passed}


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
        model: the model that it is of, or its folder.
        images: (N, C, H, W) uint8, N >= 1; coronal slices of the heads that ship with the package when None.
        limit: largest error of a log-odds in nats; that of the precision in `LIMITS` when None.
        providers: see `fastflow.export.runtime.OnnxScorer`.
        progress: called with the number of comparisons done and their total.

    Returns:
        The errors; `Parity.passed` says whether they are within their limits.

    Raises:
        ExportError: the folder is no export, or damaged, or of another model, or a graph is not valid ONNX or fails when run.
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
    tell(0, len(graphs) + 1)
    exact = LabelScorer(copy.deepcopy(model).double(), engine="eager")
    want = score_slices(exact, images)
    float32 = compare(score_slices(model, images), want)
    errors: dict[str, dict[str, float]] = {}
    provider = ""
    for done, name in enumerate(graphs, start=1):
        tell(done, len(graphs) + 1)
        if name == "score":
            scorer = OnnxScorer(folder, providers)
            errors[name], provider = _compare_scores(scorer, images, want), scorer.provider
        else:
            graph = _Runnable(paths[name], providers)
            errors[name], provider = _COMPARE[name](graph, exact.model, images[:FEW], want[:FEW]), graph.provider
    tell(len(graphs) + 1, len(graphs) + 1)
    ranked = np.sort(want, axis=1)
    gap = float((ranked[:, -1] - ranked[:, -2]).min()) if want.shape[1] > 1 else float("inf")
    return Parity(len(images), source, limit, errors, float32, gap, provider, import_onnxruntime().__version__)


def compare(got: NDArray[np.float64], want: NDArray[np.float64]) -> dict[str, float]:
    """Errors of log-likelihoods (N, K) as they matter: of the log-odds between any two labels, in nats; and agreement."""
    error = got - want
    spread = error.max(axis=1) - error.min(axis=1)
    return {
        "log_odds_error": float(spread.max()),
        "log_odds_error_rms": float(np.sqrt((spread**2).mean())),
        "agreement": float((got.argmax(axis=1) == want.argmax(axis=1)).mean()),
    }


def anatomy_slices(shape: Sequence[int], count: int = SLICES) -> NDArray[np.uint8]:
    """Coronal slices of the heads that ship with the package, stretched to an image size: (count, C, H, W) uint8."""
    channels, height, width = shape
    each = -(-count // len(HEADS))
    slices = []
    for name in HEADS:
        t1 = load_head(name).t1
        middle = t1.shape[1] // 2
        planes = coronal_slices(t1, [middle + 3 * (i - each // 2) for i in range(each)])
        scaled = np.clip(planes * (255.0 / np.percentile(t1[t1 > 0], 99.9)), 0.0, 255.0)
        factor = min(height / planes.shape[1], width / planes.shape[2])
        stretched = ndimage.zoom(scaled, (1.0, factor, factor), order=1)[:, :height, :width]
        slices.append(pad_evenly(np.rint(stretched).astype(np.uint8), (height, width)))
    return np.repeat(np.concatenate(slices)[:count, None], channels, axis=1)


def _check_model(document: dict[str, Any], model: MagicFlow | str | PathLike[str], folder: Path) -> MagicFlow:
    if isinstance(model, MagicFlow):
        return model
    loaded = MagicFlow.load(model)
    recorded = json.loads((Path(model) / CONFIG).read_text(encoding="utf-8"))["sha256"]
    if recorded != document["weights_sha256"]:
        raise ExportError(f"{folder} is an export of weights {document['weights_sha256'][:16]}, but {model} has {recorded[:16]}")
    return loaded


def _check_graph(export: Export, name: str) -> Path:
    """A graph's file, whose hash and form have been checked."""
    path = export.file(name)
    try:
        # By its path, or external data would not be found.
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"{path} is not a valid ONNX graph: {error}") from error
    return path


def _compare_scores(scorer: OnnxScorer, images: NDArray[np.uint8], want: NDArray[np.float64]) -> dict[str, float]:
    few = images[: max(BATCHES)]
    try:
        got = scorer.score(images)
        # The same image in batches of all sizes, each from the start.
        others = [scorer.run(to_unit_range(few[:size])) for size in BATCHES if size <= len(few)]
    except RuntimeError as error:
        raise ExportError(str(error)) from error
    differences = [got[: len(other)] - other for other in others]
    batch = max(float((d.max(axis=1) - d.min(axis=1)).max()) for d in differences)
    return {**compare(got, want), "batch_difference": batch}


def _every_label(model: MagicFlow, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images as rows, one for each label, and the labels."""
    labels = model.config.num_classes
    return np.repeat(to_unit_range(images), labels, axis=0), np.tile(np.arange(labels), len(images))


class _Runnable:
    """A graph that is run as it is.

    Args:
        path: its file.
        providers: see `fastflow.export.runtime.OnnxScorer`.
    """

    def __init__(self, path: Path, providers: str | Sequence[str]) -> None:
        self._path = path
        self._session = open_session(path, providers)
        self.provider: str = self._session.get_providers()[0]

    def __call__(self, **rows: NDArray[Any]) -> list[NDArray[Any]]:
        """Outputs for rows.

        Raises:
            ExportError: ONNX Runtime fails.
            MemoryError: it needs more memory than there is.
        """
        try:
            return list(self._session.run(None, rows))
        except Exception as error:
            # Of classes that have no other base.
            message = f"{self._path}: ONNX Runtime cannot run it: {error}"
            raise (MemoryError if is_memory_error(error) else ExportError)(message) from error

    def in_batches(self, **rows: NDArray[Any]) -> list[NDArray[Any]]:
        """The same, in batches of all sizes."""
        found, first, count = [], 0, len(next(iter(rows.values())))
        for size in itertools.cycle(BATCHES):
            if first >= count:
                break
            found.append(self(**{name: values[first : first + size] for name, values in rows.items()}))
            first += size
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]


def _compare_latent(graph: _Runnable, model: MagicFlow, images: NDArray[np.uint8], want: NDArray[np.float64]) -> dict[str, float]:
    x, y = _every_label(model, images)
    z, logdet = graph.in_batches(image=x, label=y)
    wide = z.astype(np.float64)
    log_probs = logdet - 0.5 * (wide**2 + LOG_2PI).sum(axis=1)
    with torch.no_grad():
        exact = model(torch.from_numpy(x[:1]).double(), torch.from_numpy(y[:1]))[0].numpy()
    return {
        "log_odds_error": compare(log_probs.reshape(want.shape), want)["log_odds_error"],
        "latent_error": float(np.sqrt(((wide[:1] - exact) ** 2).mean() / (exact**2).mean())),
    }


def _compare_map(graph: _Runnable, model: MagicFlow, images: NDArray[np.uint8], want: NDArray[np.float64]) -> dict[str, float]:
    x, y = _every_label(model, images)
    spread, constant = graph.in_batches(image=x, label=y)
    log_probs = spread.astype(np.float64).sum(axis=(1, 2, 3)) + constant
    with torch.no_grad():
        exact = model.attribution(torch.from_numpy(x[:1]).double(), torch.from_numpy(y[:1]))[0].numpy()
    return {
        "log_odds_error": compare(log_probs.reshape(want.shape), want)["log_odds_error"],
        "map_error": float(np.abs(spread[:1] - exact).max()),
    }


def _compare_sample(graph: _Runnable, model: MagicFlow, images: NDArray[np.uint8], want: NDArray[np.float64]) -> dict[str, float]:
    x = to_unit_range(images)
    y = np.arange(len(x)) % model.config.num_classes
    with torch.no_grad():
        z = model(torch.from_numpy(x).double(), torch.from_numpy(y))[0].float().numpy()
    # Together, and in other batches.
    found = (graph(z=z, label=y)[0], graph.in_batches(z=z, label=y)[0])
    return {"pixel_error": max(float(np.abs(image - x).max()) for image in found)}


_COMPARE = {"latent": _compare_latent, "attribution": _compare_map, "sample": _compare_sample}


def load_images(
    paths: Sequence[str],
    preprocess: Preprocess,
    count: int = SLICES,
    warn: Callable[[str], None] | None = None,
) -> NDArray[np.uint8]:
    """Slices of scans, spread evenly over all that there are.

    Args:
        paths: volumes or PNG files, one at least.
        preprocess: that of the model.
        count: slices, at most.
        warn: called with what is wrong with a file that cannot be used; another takes its place.

    Returns:
        (N, 1, H, W) uint8, N <= count.

    Raises:
        VolumeError: none of the files can be used; the error is that of the first.
    """
    # A permutation that any beginning of is spread evenly, and the same every time.
    order = sorted(range(len(paths)), key=lambda i: (i * 0.6180339887498949) % 1.0)
    slices: list[NDArray[np.uint8]] = []
    first: VolumeError | None = None
    for i in order:
        if len(slices) == count:
            break
        try:
            found = read_image(paths[i], preprocess).images
        except VolumeError as error:
            first = first or error
            if warn is not None:
                warn(str(error))
        else:
            # One of each scan: its neighbours are much like it.
            slices.append(found[len(found) // 2])
    if first is not None and not slices:
        raise first
    return np.stack(slices)
