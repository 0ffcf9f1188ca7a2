"""Log-likelihoods and decisions by the score graph of an export: NumPy, nibabel, ONNX Runtime, no PyTorch."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflow.data.preprocess import to_unit_range
from fastflow.data.slices import read_image
from fastflow.decision import DecisionRule, check_prior, decide, posterior
from fastflow.errors import ExportError, InvalidImageWarning, VolumeError
from fastflow.readout import ARGMAX, GaussianReadout, chosen_readout
from fastflow.runtime.export_folder import Export, check_metadata, is_list_of, read_export
from fastflow.runtime.sessions import (
    CUDA_PROVIDER,
    BoundRunner,
    PlainRunner,
    Runner,
    import_onnxruntime,
    is_memory_error,
    open_session,
)

SCORE = "score"
# Numbers of images that one pass may have, by device.
BUCKETS = {"cpu": (1,), "cuda": (1, 2, 4, 8, 16)}
# A warning names this many images at most.
MAX_NAMED_IMAGES = 20


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A volume as an export classifies it.

    Attributes:
        path: the file.
        label: the likeliest label, by the read-out that was asked for, as posterior and margin are.
        posterior: (K,) probabilities.
        log_probs: (K,) nats, summed over the volume's slices.
        margin: posterior log-odds between the best and the second label, nats.
        typicality: p-value of the likelihood among validation data; None where there is nothing to compare
            with.
        flags: (code, message) of what is doubtful, as in the rows of `fastflow.archive.classify`.
        argmax: the label of the largest log-likelihood and prior, whatever the read-out.
    """

    path: str
    label: str
    posterior: NDArray[np.float64]
    log_probs: NDArray[np.float64]
    margin: float
    typicality: float | None
    flags: tuple[tuple[str, str], ...]
    argmax: str = ""


class OnnxScorer:
    """Scores images under every label with the score graph of an export.

    Images are scored in passes of fixed sizes (`buckets`): as many full passes of the largest size as there
    are, then one of the smallest size that holds the remaining images, filled up with the last image. On a
    CPU a pass has one image unless `buckets` says otherwise: an image's scores depend on no other image and
    not on its place, to the bit, on one machine with one number of threads. With larger passes they may
    depend, in the last bits, on the size of the pass and the image's place in it, and so on its place in the
    call; equal calls give equal bits on a CPU.

    Calls may come from several threads.

    Args:
        folder: an export.
        providers: ``"auto"``: CUDA where ONNX Runtime has it and it works, else the CPU. ``"cpu"``.
            ``"cuda"``: an error where it is not in use. A list is handed to ONNX Runtime as it is; its first
            provider must be in use.
        threads: number of threads of one operator on the CPU; the physical cores that the process may use
            when None.
        buckets: sizes of passes; 1 on a CPU and 1, 2, 4, 8, 16 on CUDA when None.
        cuda_graph: capture each size of pass as a CUDA graph, which saves the launches of small passes. Only
            with CUDA.
        verify_hashes: compare the files with the hashes that the folder records. They are read twice for it.

    Attributes:
        export: the folder's document.
        providers: the providers in use, in the order in which ONNX Runtime asks them.
        buckets: the sizes of passes in use, sorted.
        version: of ONNX Runtime.

    Raises:
        ExportError: the folder is no export, a file is missing, damaged, or of another export.
        ValueError: CUDA was asked for and is not in use, ONNX Runtime is not installed, or an argument does
            not fit.
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
        if buckets is not None and (not buckets or not is_list_of(list(buckets), int) or min(buckets) < 1):
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
        self._runner: Runner
        if self.device == "cuda":
            self._runner = BoundRunner(session, ort, len(self.class_names), "cuda", cuda_graph)
        else:
            self._runner = PlainRunner(session)

    @property
    def provider(self) -> str:
        """The provider in use."""
        return self.providers[0]

    @property
    def device(self) -> str:
        """``"cuda"`` or ``"cpu"``: where images and scores are handed over."""
        return "cuda" if self.provider == CUDA_PROVIDER else "cpu"

    @property
    def document(self) -> dict[str, Any]:
        """The content of ``export.json``, as JSON values."""
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
            images: (B, C, H, W) in [-1, 1], of a float dtype and taken as float32; or uint8, which ``2 v /
                255 - 1`` scales.

        Returns:
            (B, K) log p(x|y) in nats. The scores of images that hold NaN or infinity are NaN, with an
            `InvalidImageWarning`; those of the others are what they would be without these.

        Raises:
            ValueError: the shape or dtype does not fit.
            MemoryError: a pass needs more memory than there is.
            RuntimeError: ONNX Runtime fails.
        """
        images = self._check_images(images)
        log_probs = np.empty((len(images), len(self.class_names)))
        invalid: list[int] = []
        for first, stop, size in spans(len(images), self.buckets):
            block = _in_unit_range(images[first:stop])
            bad = np.flatnonzero(~np.isfinite(block.reshape(len(block), -1)).all(axis=1))
            # Zeros take the place of invalid images, so that these cannot touch the others of a pass.
            block[bad] = 0.0
            log_probs[first:stop] = self.run(_filled_up(block, size))[: stop - first]
            log_probs[first + bad] = np.nan
            invalid += (first + bad).tolist()
        if invalid:
            named = ", ".join(map(str, invalid[:MAX_NAMED_IMAGES]))
            more = ", ..." if len(invalid) > MAX_NAMED_IMAGES else ""
            message = (
                f"{len(invalid)} of {len(images)} images hold NaN or infinity, their scores are NaN: "
                f"rows {named}{more}"
            )
            warnings.warn(message, InvalidImageWarning, stacklevel=2)
        return log_probs

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """One pass of the graph over images as they are, (n, C, H, W) float32 in [-1, 1] -> (n, K) nats.

        Raises:
            MemoryError: it needs more memory than there is.
            RuntimeError: ONNX Runtime fails.
        """
        try:
            return self._runner(np.ascontiguousarray(images))
        except Exception as error:
            # ONNX Runtime's errors have no base class but Exception.
            message = f"{self.export.folder}: ONNX Runtime cannot score {len(images)} images: {error}"
            raise (MemoryError if is_memory_error(error) else RuntimeError)(message) from error

    def posterior(self, images: NDArray[Any], prior: ArrayLike | None = None) -> NDArray[np.float64]:
        """Probabilities of the labels of single images, ``softmax(log p(x|y) / temperature + log prior)``.

        Args:
            images: see `score`.
            prior: (K,) probabilities of the labels; the export's own when None.

        Returns:
            (B, K); NaN for images that hold NaN or infinity.

        Raises:
            ValueError: the images (see `score`) or the prior do not fit.
        """
        prior = self.prior_or_own(prior)
        return posterior(self.score(images), self.export.temperature, prior)

    def readout(self, name: str) -> GaussianReadout | None:
        """The export's read-out of a name, for its own slices; None for ``"argmax"``.

        Raises:
            ReadoutError: the export has none.
            ValueError: the name is none of `fastflow.readout.READOUTS`.
        """
        slices = None if self.export.preprocess is None else self.export.preprocess.slices
        return chosen_readout(name, self.document, self.class_names, slices)

    def classify_volume(
        self, path: str | PathLike[str], prior: ArrayLike | None = None, readout: str = ARGMAX
    ) -> Prediction:
        """Read a volume (or a PNG slice), and classify it by the sum of its slices' log-likelihoods.

        Args:
            path: a ``.nii``, ``.nii.gz``, ``.mgh`` or ``.mgz`` file, or a PNG where Pillow is installed.
            prior: (K,) probabilities of the labels; the export's own when None.
            readout: ``"argmax"``, or ``"gaussian"`` for the model's Gaussian read-out of the K likelihoods.

        Raises:
            VolumeError: the file cannot be used, or has a likelihood that is not finite (code
                ``likelihood``).
            ExportError: the model does not know how images are prepared.
            ReadoutError: the export has no such read-out.
            ValueError: the prior does not fit.
        """
        prior, preprocess, name = self.prior_or_own(prior), self.export.own_preprocess, os.fspath(path)
        chosen = self.readout(readout)
        try:
            image = read_image(name, preprocess)
        except VolumeError:
            raise
        except Exception as error:
            # A bad file, whatever is in it, must not cost more than its own result.
            raise VolumeError(name, "unreadable", f"{type(error).__name__}: {error}") from error
        slice_log_probs = self.score(image.images)
        validation = self.export.comparable(preprocess.slices)
        try:
            rule = DecisionRule(
                self.export.temperature,
                prior,
                validation=validation,
                accepted=self.export.accepted,
                readout=chosen,
            )
            decision = decide(slice_log_probs, rule)
        except FloatingPointError as error:
            raise VolumeError(name, "likelihood", str(error)) from None
        own = self.export.images
        unlike = () if own is None else own.flags(image.measure(), name, preprocess.slices)
        return Prediction(
            name,
            self.class_names[decision.label_index],
            decision.posterior,
            decision.log_probs,
            decision.margin,
            decision.typicality,
            (*((flag.code, flag.message) for flag in image.flags), *unlike, *decision.flags),
            self.class_names[decision.argmax_index],
        )

    def prior_or_own(self, prior: ArrayLike | None) -> NDArray[np.float64]:
        """A prior as (K,) float64; the export's own when None.

        Raises:
            ValueError: it is no K probabilities that sum to 1.
        """
        return check_prior(self.export.prior if prior is None else prior, len(self.class_names))

    def _check_images(self, images: NDArray[Any]) -> NDArray[Any]:
        wanted = f"(B, {', '.join(map(str, self.input_shape))})"
        if not isinstance(images, np.ndarray):
            raise ValueError(f"images must be a NumPy array {wanted}, got {type(images).__name__}")
        if images.ndim != 4 or images.shape[1:] != self.input_shape:
            raise ValueError(f"images must be {wanted}, got {images.shape}")
        if images.dtype.kind != "f" and images.dtype != np.uint8:
            raise ValueError(f"images must be of a float dtype in [-1, 1], or uint8, got {images.dtype}")
        return images


def spans(count: int, buckets: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(first, stop, size of the pass) of the images that are scored together.

    Args:
        count: number of images.
        buckets: sizes of passes, sorted.
    """
    first = 0
    while first < count:
        remaining = count - first
        size = next((bucket for bucket in buckets if bucket >= remaining), buckets[-1])
        stop = first + min(size, remaining)
        yield first, stop, size
        first = stop


def _in_unit_range(images: NDArray[Any]) -> NDArray[np.float32]:
    if images.dtype == np.uint8:
        return to_unit_range(images)
    # A value beyond float32 becomes infinity, and is reported as such.
    with np.errstate(over="ignore"):
        return images.astype(np.float32)


def _filled_up(images: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    missing = size - len(images)
    return images if missing == 0 else np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def _check_signature(path: Path, session: Any, export: Export) -> None:
    for kind, found, wanted in (
        ("input", session.get_inputs(), [("image", "tensor(float)", export.input_shape)]),
        ("output", session.get_outputs(), [("log_probs", "tensor(double)", (len(export.class_names),))]),
    ):
        got = [(value.name, value.type, tuple(value.shape[1:])) for value in found]
        fixed = [value.name for value in found if value.shape and isinstance(value.shape[0], int)]
        if got != wanted:
            raise ExportError(f"{path} must have {kind} {wanted} after the batch, has {got}")
        if fixed:
            raise ExportError(f"{path}: {kind} {fixed[0]} has a fixed number of images")
