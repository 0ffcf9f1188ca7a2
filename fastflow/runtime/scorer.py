"""Log-likelihoods and decisions by the score graph of an export: NumPy, nibabel, ONNX Runtime, no PyTorch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastflow.data.grain import grain_numbers
from fastflow.data.slices import read_image
from fastflow.decision import DecisionRule, check_prior, decide, posterior
from fastflow.errors import ExportError, InvalidImageWarning, VolumeError
from fastflow.novelty import KnownScanners, check_reject_below, scanner_flags
from fastflow.readout import ARGMAX, GaussianReadout, chosen_readout
from fastflow.runtime.export_folder import check_metadata, is_list_of, read_export
from fastflow.runtime.prediction import Prediction as Prediction
from fastflow.runtime.score_graph import check_images, check_signature, filled_up, in_unit_range
from fastflow.runtime.score_graph import spans as spans
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
# The result of a runner.
Found = TypeVar("Found")


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
        latent_blocks: J, of which the graph gives correlations; 0 of a graph without that output.

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
        self.latent_blocks = check_signature(path, session, self.export)
        self.providers: tuple[str, ...] = tuple(session.get_providers())
        if cuda_graph and self.device != "cuda":
            raise ValueError(f"cuda_graph needs CUDA, the session uses {self.provider}")
        self.version: str = ort.__version__
        self.buckets = tuple(sorted(set(BUCKETS[self.device] if buckets is None else buckets)))
        self._runner: Runner
        if self.device == "cuda":
            classes, blocks = len(self.class_names), self.latent_blocks
            self._runner = BoundRunner(session, ort, classes, "cuda", cuda_graph, blocks)
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
        (log_probs,) = self._in_passes(images, lambda block: (self.run(block),), [()])
        return log_probs

    def score_with_latents(self, images: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As `score`, with the correlations within the latent, from the same passes.

        Args:
            images: see `score`.

        Returns:
            (B, K) nats, and (B, K, J, 2) lag-1 correlations across and down of the J latent blocks under each
            label; both are NaN for images that hold NaN or infinity.

        Raises:
            ExportError: the export's graph gives no correlations.
            ValueError: see `score`.
            MemoryError: see `score`.
            RuntimeError: see `score`.
        """
        if not self.latent_blocks:
            raise ExportError(
                f"{self.export.folder}: its score graph gives no correlations of the latent: "
                "train the model again with validation volumes, or export it again"
            )
        log_probs, correlations = self._in_passes(
            images,
            lambda block: self._guarded(self._runner.with_latents, block),
            [(), (self.latent_blocks, 2)],
        )
        return log_probs, correlations

    def _in_passes(
        self,
        images: NDArray[Any],
        run: Callable[[NDArray[np.float32]], tuple[NDArray[np.float64], ...]],
        shapes: Sequence[tuple[int, ...]],
    ) -> list[NDArray[np.float64]]:
        """The results of `run` for each image and label: (B, K) and the axes of `shapes`, NaN if invalid."""
        images = check_images(images, self.input_shape)
        results = [np.empty((len(images), len(self.class_names), *shape)) for shape in shapes]
        invalid: list[int] = []
        for first, stop, size in spans(len(images), self.buckets):
            block = in_unit_range(images[first:stop])
            bad = np.flatnonzero(~np.isfinite(block.reshape(len(block), -1)).all(axis=1))
            # Zeros take the place of invalid images, so that these cannot touch the others of a pass.
            block[bad] = 0.0
            for result, found in zip(results, run(filled_up(block, size)), strict=True):
                result[first:stop] = found[: stop - first]
                result[first + bad] = np.nan
            invalid += (first + bad).tolist()
        if invalid:
            named = ", ".join(map(str, invalid[:MAX_NAMED_IMAGES]))
            more = ", ..." if len(invalid) > MAX_NAMED_IMAGES else ""
            message = (
                f"{len(invalid)} of {len(images)} images hold NaN or infinity, their scores are NaN: "
                f"rows {named}{more}"
            )
            warnings.warn(message, InvalidImageWarning, stacklevel=3)
        return results

    def run(self, images: NDArray[np.float32]) -> NDArray[np.float64]:
        """One pass of the graph over images as they are, (n, C, H, W) float32 in [-1, 1] -> (n, K) nats.

        Raises:
            MemoryError: it needs more memory than there is.
            RuntimeError: ONNX Runtime fails.
        """
        return self._guarded(self._runner, images)

    def _guarded(self, run: Callable[[NDArray[np.float32]], Found], images: NDArray[np.float32]) -> Found:
        """One pass of a runner, whose errors are told as this class does."""
        try:
            return run(np.ascontiguousarray(images))
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
        self,
        path: str | PathLike[str],
        prior: ArrayLike | None = None,
        readout: str = ARGMAX,
        reject_below: float | None = None,
    ) -> Prediction:
        """Read a volume (or a PNG slice), and classify it by the sum of its slices' log-likelihoods.

        Args:
            path: a ``.nii``, ``.nii.gz``, ``.mgh`` or ``.mgz`` file, or a PNG where Pillow is installed.
            prior: (K,) probabilities of the labels; the export's own when None.
            readout: ``"argmax"``, or ``"gaussian"`` for the model's Gaussian read-out of the K likelihoods.
            reject_below: flag a volume ``unknown_scanner`` whose `scanner_p` is below; None flags none.

        Raises:
            VolumeError: the file cannot be used, or has a likelihood that is not finite (code
                ``likelihood``).
            ExportError: the model does not know how images are prepared.
            ReadoutError: the export has no such read-out.
            ValueError: the prior or the limit does not fit.
        """
        self.check_reject_below(reject_below)
        prior, preprocess, name = self.prior_or_own(prior), self.export.own_preprocess, os.fspath(path)
        chosen = self.readout(readout)
        try:
            image = read_image(name, preprocess)
        except VolumeError:
            raise
        except Exception as error:
            # A bad file, whatever is in it, must not cost more than its own result.
            raise VolumeError(name, "unreadable", f"{type(error).__name__}: {error}") from error
        known = self.scanners
        scored = (self.score(image.images), None) if known is None else self.score_with_latents(image.images)
        slice_log_probs, correlations = scored
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
        grain = None if known is None else grain_numbers(image.images[:, 0])
        scanner_p = None if known is None else known.p_of_volume(slice_log_probs, correlations, grain)
        unknown = scanner_flags(scanner_p, reject_below)
        return Prediction(
            name,
            self.class_names[decision.label_index],
            decision.posterior,
            decision.log_probs,
            decision.margin,
            decision.typicality,
            (*((flag.code, flag.message) for flag in image.flags), *unlike, *decision.flags, *unknown),
            self.class_names[decision.argmax_index],
            scanner_p,
        )

    @property
    def scanners(self) -> KnownScanners | None:
        """How the scanners of training look; None where export or graph do not tell, or of other slices."""
        known, preprocess = self.export.scanners, self.export.preprocess
        if known is None or preprocess is None or not self.latent_blocks:
            return None
        return known if known.slices == preprocess.slices else None

    def check_reject_below(self, reject_below: float | None) -> None:
        """Check that a limit of `scanner_p` can flag anything.

        Raises:
            ValueError: it cannot; see `fastflow.novelty.check_reject_below`.
            ExportError: the model does not know how images are prepared.
        """
        if reject_below is not None:
            check_reject_below(reject_below, self.scanners, self.export.own_preprocess.slices)

    def prior_or_own(self, prior: ArrayLike | None) -> NDArray[np.float64]:
        """A prior as (K,) float64; the export's own when None.

        Raises:
            ValueError: it is no K probabilities that sum to 1.
        """
        return check_prior(self.export.prior if prior is None else prior, len(self.class_names))
