"""Scoring with an export: NumPy, nibabel and ONNX Runtime, without PyTorch.

    python -m fastflow.export.runtime FOLDER FILES...

prints one line per file: path, status, predicted, posterior, margin, typicality, error.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflow import __version__
from fastflow.data.preprocess import to_unit_range
from fastflow.data.slices import read_image
from fastflow.errors import ExportError, FastflowError, InvalidImageWarning, VolumeError
from fastflow.training.calibration import ATYPICAL, check_prior, margin, typicality
from fastflow.training.calibration import posterior as posterior

from ._folder import DOCUMENT as DOCUMENT
from ._folder import Export, check_metadata, is_list, read_export
from ._session import CHOICES, CUDA, Bound, Plain, Run, import_onnxruntime, is_memory_error
from ._session import open_session as open_session

SCORE = "score"
# Images of one pass, by device.
BUCKETS = {"cpu": (1,), "cuda": (1, 2, 4, 8, 16)}
NOT_FINITE = "the model gives the image a log-likelihood that is not finite"
OK, FAILED, USAGE, FINISHED_WITH_ERRORS, INTERRUPTED = 0, 1, 2, 3, 130
COLUMNS = ("path", "status", "predicted", "posterior", "margin", "typicality", "error")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What an export says of a volume.

    Attributes:
        path: the file.
        label: the likeliest label.
        posterior: (K,) probabilities.
        log_probs: (K,) nats, summed over the volume's slices.
        margin: posterior log-odds between the best and the second label, nats.
        typicality: p-value of the likelihood among validation data; None where there is nothing to compare with.
        flags: (code, message) of what is doubtful, as in the rows of `fastflow.archive.classify`.
    """

    path: str
    label: str
    posterior: NDArray[np.float64]
    log_probs: NDArray[np.float64]
    margin: float
    typicality: float | None
    flags: tuple[tuple[str, str], ...]


class OnnxScorer:
    """Scores images under every label with the score graph of an export.

    Images are scored in passes of fixed sizes (`buckets`): as many as go of the largest, then the smallest that holds the rest,
    filled up with its last image. On a CPU a pass has one image unless `buckets` says otherwise: what an image gets depends on
    no other image and not on its place, to the bit, on one machine with one number of threads. With larger passes it may
    depend, in the last bits, on the size of its pass and its place in it, and so on its place in the call; equal calls give
    equal bits on a CPU.

    Calls may come from several threads.

    Args:
        folder: an export.
        providers: ``"auto"``: CUDA where ONNX Runtime has it and it works, else the CPU. ``"cpu"``. ``"cuda"``: an error where it
            is not in use. A list is handed to ONNX Runtime as it is; its first one must be in use.
        threads: of one operator on the CPU; the physical cores that the process may use when None.
        buckets: sizes of passes; 1 on a CPU and 1, 2, 4, 8, 16 on CUDA when None.
        cuda_graph: capture each size of pass as a CUDA graph, which saves the launches of small passes. Only with CUDA.
        verify_hashes: compare the files with the hashes that the folder records. They are read twice for it.

    Attributes:
        export: what the folder says.
        providers: in use, the first one foremost.
        buckets: in use, sorted.

    Raises:
        ExportError: the folder is no export, a file is missing, damaged, or of another export.
        ValueError: CUDA was asked for and is not in use, ONNX Runtime is not installed, or an argument does not fit.
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        providers: str | Sequence[Any] = "auto",
        *,
        threads: int | None = None,
        buckets: Sequence[int] | None = None,
        cuda_graph: bool = False,
        verify_hashes: bool = True,
    ) -> None:
        ort = import_onnxruntime()
        if buckets is not None and (not buckets or not is_list(list(buckets), int) or min(buckets) < 1):
            raise ValueError(f"buckets must be integers of at least 1, got {buckets!r}")
        self.export = read_export(folder)
        path = self.export.file(SCORE, verify_hashes)
        session = open_session(path, providers, threads=threads, cuda_graph=cuda_graph)
        check_metadata(self.export, SCORE, path, session.get_modelmeta().custom_metadata_map)
        _check_signature(path, session, self.export)
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        if cuda_graph and self.device != "cuda":
            raise ValueError(f"cuda_graph needs CUDA, the session uses {self.provider}")
        self.version: str = ort.__version__
        self.buckets = tuple(sorted(set(BUCKETS[self.device] if buckets is None else buckets)))
        classes = len(self.class_names)
        self._run: Run = Bound(session, ort, classes, "cuda", cuda_graph) if self.device == "cuda" else Plain(session)

    @property
    def provider(self) -> str:
        """The provider in use."""
        return self.providers[0]

    @property
    def device(self) -> str:
        """``"cuda"`` or ``"cpu"``: where images and scores are handed over."""
        return "cuda" if self.provider == CUDA else "cpu"

    @property
    def document(self) -> dict[str, Any]:
        """What ``export.json`` says, as JSON values."""
        return self.export.document

    @property
    def class_names(self) -> tuple[str, ...]:
        """K names."""
        return self.export.class_names

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(C, H, W) of an image."""
        return self.export.input_shape

    def score(self, images: NDArray[Any]) -> NDArray[np.float64]:
        """Log-likelihoods of images.

        Args:
            images: (B, C, H, W) in [-1, 1], of a float dtype and taken as float32; or uint8, which ``2 v / 255 - 1`` scales.

        Returns:
            (B, K) log p(x|y) in nats. Rows of images that hold NaN or infinity are NaN, with an `InvalidImageWarning`; the
            others are what they would be without these.

        Raises:
            ValueError: the shape or dtype does not fit.
            MemoryError: a pass needs more memory than there is.
            RuntimeError: ONNX Runtime fails.
        """
        images = self._check(images)
        out = np.empty((len(images), len(self.class_names)))
        invalid: list[int] = []
        for first, stop, size in spans(len(images), self.buckets):
            block = _unit_range(images[first:stop])
            bad = np.flatnonzero(~np.isfinite(block.reshape(len(block), -1)).all(axis=1))
            # Zeros in their place, as if they had never been there.
            block[bad] = 0.0
            out[first:stop] = self.run(_padded(block, size))[: stop - first]
            out[first + bad] = np.nan
            invalid += (first + bad).tolist()
        if invalid:
            shown = ", ".join(map(str, invalid[:20])) + (", ..." if len(invalid) > 20 else "")
            message = f"{len(invalid)} of {len(images)} images hold NaN or infinity, their scores are NaN: rows {shown}"
            warnings.warn(message, InvalidImageWarning, stacklevel=2)
        return out

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """One pass of the graph over images as they are, (n, C, H, W) float32 in [-1, 1] -> (n, K) nats.

        Raises:
            MemoryError: it needs more memory than there is.
            RuntimeError: ONNX Runtime fails.
        """
        try:
            return self._run(np.ascontiguousarray(images))
        except Exception as error:
            # Of classes that have no other base.
            message = f"{self.export.folder}: ONNX Runtime cannot score {len(images)} images: {error}"
            raise (MemoryError if is_memory_error(error) else RuntimeError)(message) from error

    def posterior(self, images: NDArray[Any], prior: ArrayLike | None = None) -> NDArray[np.float64]:
        """Probabilities of the labels of single images, ``softmax(log p(x|y) / temperature + log prior)``.

        Args:
            images: see `score`.
            prior: (K,) probabilities of the labels; the export's own when None.

        Returns:
            (B, K); NaN in rows of images that hold NaN or infinity.

        Raises:
            ValueError: see `score`; or the prior does not fit.
        """
        prior = self._prior(prior)
        return posterior(self.score(images), self.export.temperature, prior)

    def classify_volume(self, path: str | PathLike[str], prior: ArrayLike | None = None) -> Prediction:
        """Read a volume (or a PNG slice), and classify it by the sum of its slices' log-likelihoods.

        Args:
            path: a ``.nii``, ``.nii.gz``, ``.mgh`` or ``.mgz`` file, or a PNG where Pillow is installed.
            prior: (K,) probabilities of the labels; the export's own when None.

        Raises:
            VolumeError: the file cannot be used, or has a likelihood that is not finite (code ``likelihood``).
            ExportError: the model does not know how images are prepared.
            ValueError: the prior does not fit.
        """
        prior, preprocess, name = self._prior(prior), self.export.own_preprocess, os.fspath(path)
        try:
            image = read_image(name, preprocess)
        except VolumeError:
            raise
        except Exception as error:
            # Whatever is in a file, it must cost this file only.
            raise VolumeError(name, "unreadable", f"{type(error).__name__}: {error}") from error
        each = self.score(image.images)
        if not np.isfinite(each).all():
            raise VolumeError(name, "likelihood", NOT_FINITE)
        log_probs, temperature = each.sum(axis=0), self.export.temperature
        probabilities = posterior(log_probs, temperature, prior)
        best = int(probabilities.argmax())
        flags, p_value = [(flag.code, flag.message) for flag in image.flags], None
        validation = self.export.comparable(preprocess.slices)
        if validation is not None:
            p_value = typicality(float(each[:, best].mean()), validation)
            if p_value < ATYPICAL:
                flags.append(("atypical", f"typicality p-value {p_value:.2g}"))
        odds = margin(log_probs, temperature, prior)
        return Prediction(name, self.class_names[best], probabilities, log_probs, odds, p_value, tuple(flags))

    def _prior(self, prior: ArrayLike | None) -> NDArray[np.float64]:
        return check_prior(self.export.prior if prior is None else prior, len(self.class_names))

    def _check(self, images: NDArray[Any]) -> NDArray[Any]:
        wanted = f"(B, {', '.join(map(str, self.input_shape))})"
        if not isinstance(images, np.ndarray):
            raise ValueError(f"images must be a NumPy array {wanted}, got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1:] != self.input_shape:
            raise ValueError(f"images must be {wanted}, got {images.shape}")
        if images.dtype.kind != "f" and images.dtype != np.uint8:
            raise ValueError(f"images must be of a float dtype in [-1, 1], or uint8, got {images.dtype}")
        return images


def spans(count: int, buckets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, stop, size of the pass) of images that are scored together; `buckets` is sorted."""
    first = 0
    while first < count:
        left = count - first
        size = next((bucket for bucket in buckets if bucket >= left), buckets[-1])
        stop = first + min(size, left)
        yield first, stop, size
        first = stop


def _unit_range(images: NDArray[Any]) -> NDArray[np.float32]:
    if images.dtype == np.uint8:
        return to_unit_range(images)
    # What lies beyond float32 becomes infinite, and is told as such.
    with np.errstate(over="ignore"):
        return images.astype(np.float32)


def _padded(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    missing = size - len(images)
    return images if missing == 0 else np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def _check_signature(path: Path, session: Any, export: Export) -> None:
    for kind, found, wanted in (
        ("input", session.get_inputs(), [("image", "tensor(float)", export.input_shape)]),
        ("output", session.get_outputs(), [("log_probs", "tensor(double)", (len(export.class_names),))]),
    ):
        got = [(one.name, one.type, tuple(one.shape[1:])) for one in found]
        fixed = [one.name for one in found if one.shape and isinstance(one.shape[0], int)]
        if got != wanted:
            raise ExportError(f"{path} must have {kind} {wanted} after the batch, has {got}")
        if fixed:
            raise ExportError(f"{path}: {kind} {fixed[0]} has a fixed number of images")


# -- the command ----------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None, folder: Path | None = None) -> int:
    """Classify files, one line each.

    Args:
        arguments: of the command line.
        folder: the export, where none is named; then the command takes no FOLDER but ``--folder``.

    Returns:
        The exit code: 0 every file was classified, 3 some were not, 1 the run failed, 2 wrong usage or a bad export.
    """
    options = _parser(folder).parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s: %(message)s")
    # Names that are no Unicode must not stop the run.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        prior = None if options.prior is None else [float(part) for part in options.prior.split(",")]
        scorer = OnnxScorer(options.folder, options.providers, threads=options.threads)
        scorer._prior(prior)
        scorer.export.own_preprocess  # noqa: B018
        print(f"{options.folder}: {scorer.export.precision}, runs on {', '.join(scorer.providers)}", file=sys.stderr)
        return _classify(scorer, options.files, prior, options.json)
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # Nobody reads on (`| head`); the interpreter would complain while it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (FastflowError, ValueError) as error:
        return _tell(str(error), USAGE)
    except (OSError, MemoryError, RuntimeError) as error:
        return _tell(str(error) or type(error).__name__, FAILED)


def _parser(folder: Path | None) -> argparse.ArgumentParser:
    program = "python -m fastflow.export.runtime" if folder is None else "python runtime.pyz"
    parser = argparse.ArgumentParser(
        prog=program,
        description="Classify scans with an ONNX export. Prints a line per file: " + ", ".join(COLUMNS) + ".",
        epilog="Exit codes: 0 every file was classified, 3 some were not, 1 the run failed, 2 wrong usage or a bad export.",
    )
    parser.add_argument("--version", action="version", version=f"fastflow {__version__}")
    if folder is None:
        parser.add_argument("folder", type=Path, metavar="FOLDER", help="the export")
    else:
        parser.add_argument("--folder", type=Path, default=folder, help="the export; by default where this program lies")
    parser.add_argument("files", nargs="+", metavar="FILES", help=".nii, .nii.gz, .mgz or .mgh volumes; PNG slices with Pillow")
    parser.add_argument("--providers", choices=CHOICES, default="auto", help="where it runs; auto takes CUDA if it works")
    parser.add_argument("--threads", type=int, help="of an operator on the CPU; the physical cores by default")
    parser.add_argument("--prior", help="probabilities of the labels in the export's order, e.g. 0.5,0.3,0.2")
    parser.add_argument("--json", action="store_true", help="JSON lines, with all probabilities and log-likelihoods")
    return parser


def _tell(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _classify(scorer: OnnxScorer, files: Iterable[str], prior: ArrayLike | None, as_json: bool) -> int:
    code = OK
    if not as_json:
        print("\t".join(COLUMNS), flush=True)
    for file in files:
        result: Prediction | VolumeError
        try:
            result = scorer.classify_volume(file, prior)
        except VolumeError as error:
            result, code = error, FINISHED_WITH_ERRORS
        # At once: who reads may be waiting for it.
        print(json_line(result, scorer.class_names) if as_json else text_line(result), flush=True)
    return code


def _summary(result: Prediction | VolumeError) -> dict[str, Any]:
    if isinstance(result, VolumeError):
        return {"path": result.path, "status": "error", "error": f"{result.code}: {result.message}"}
    doubts = "; ".join(f"{code}: {message}" for code, message in result.flags)
    return {
        "path": result.path,
        "status": "flagged" if result.flags else "ok",
        "predicted": result.label,
        "posterior": float(result.posterior.max()),
        "margin": result.margin,
        "typicality": result.typicality,
        "error": doubts or None,
    }


def text_line(result: Prediction | VolumeError) -> str:
    """Columns between tabs, empty where there is nothing to say; the posterior is that of the predicted label."""
    row = _summary(result)
    cells = (row.get(column) for column in COLUMNS)
    text = ("" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else str(cell) for cell in cells)
    # Else a name with a line break would make two lines.
    return "\t".join(cell.encode("unicode_escape").decode("ascii") if not cell.isprintable() else cell for cell in text)


def json_line(result: Prediction | VolumeError, names: Sequence[str]) -> str:
    """An object with the columns; posterior and log_probs by label, numbers that are not finite as null."""
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {"log_probs": None} | _summary(result)
    if isinstance(result, Prediction):
        row["posterior"] = dict(zip(names, result.posterior.tolist(), strict=True))
        row["log_probs"] = dict(zip(names, result.log_probs.tolist(), strict=True))
        row["margin"] = result.margin if math.isfinite(result.margin) else None
    return json.dumps(row, allow_nan=False)


if __name__ == "__main__":
    sys.exit(main())
