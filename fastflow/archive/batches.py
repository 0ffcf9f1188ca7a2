"""Scoring batch by batch on this machine: images that were read get their log-likelihoods. Torch-free."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fastflow.archive.decode import Decoded, decode
from fastflow.archive.inputs import Item
from fastflow.archive.scorers import ImageScorer
from fastflow.data.endings import is_image
from fastflow.data.preprocess import Preprocess, slice_indices
from fastflow.errors import VolumeError

# Longer than any axis: how many slices a specification asks for does not depend on the volume.
LONGEST_AXIS = 1 << 20


@dataclasses.dataclass
class Timings:
    """Where the time of a run goes, in seconds.

    Attributes:
        reading: of all reading processes together.
        waiting: of the model, for files.
        scoring: in the model.
        writing: of the journal and the result files.
    """

    reading: float = 0.0
    waiting: float = 0.0
    scoring: float = 0.0
    writing: float = 0.0


@dataclasses.dataclass(frozen=True)
class ScoredInput:
    """An input that went through the model, or did not.

    Attributes:
        item: the input.
        size: see `Decoded`.
        mtime_ns: see `Decoded`.
        flags: see `Decoded`.
        result: (n, K) nats of its slices, or why there are none.
        seconds: of reading and scoring.
        measured: see `Decoded`.
        correlations: (n, K, J, 2) of its slices' latents, see `ImageScorer`; None where nobody asked.
        grain: see `Decoded`.
    """

    item: Item
    size: int
    mtime_ns: int
    flags: tuple[tuple[str, str], ...]
    result: NDArray[np.float64] | VolumeError
    seconds: float
    measured: NDArray[np.float64] | None = None
    correlations: NDArray[np.float64] | None = None
    grain: NDArray[np.float64] | None = None


# A runner reads and scores inputs, in order, batch by batch, and adds to the timings.
Runner = Callable[[Iterator[Item], Timings], Generator[list[ScoredInput], None, None]]


def slices_per_volume(preprocess: Preprocess) -> int:
    """How many slices of a volume are scored."""
    return len(slice_indices(preprocess.slices, LONGEST_AXIS))


def slots_of(item: Item, per_volume: int) -> int:
    """How many places of a batch an input takes, as is known before it is read: a PNG file is one slice."""
    return 1 if is_image(item.path) else per_volume


def local_runner(
    scorer: ImageScorer, preprocess: Preprocess, batch_size: int, workers: int, latents: bool = False
) -> Runner:
    """A runner that reads by processes of this machine and scores in this one.

    Args:
        scorer: of the images.
        preprocess: which slices to read of the inputs, and how.
        batch_size: slices per pass.
        workers: processes that read.
        latents: whether inputs get the correlations of their latents too.
    """

    def run(items: Iterator[Item], timings: Timings) -> Generator[list[ScoredInput], None, None]:
        # Two batches ahead of the model, so that it does not wait for files that could be read in time.
        ahead = 2 * batch_size // slices_per_volume(preprocess)
        decoded = decode(items, preprocess, workers, ahead)
        with contextlib.closing(decoded):
            inputs = timed(decoded, timings)
            yield from score_batches(scorer, inputs, preprocess, batch_size, timings, latents)

    return run


def timed(decoded: Iterator[Decoded], timings: Timings) -> Iterator[Decoded]:
    """The same inputs; the time that each of them is waited for, and was read in, is added to the timings."""
    while True:
        start = time.perf_counter()
        one = next(decoded, None)
        timings.waiting += time.perf_counter() - start
        if one is None:
            return
        timings.reading += one.seconds
        yield one


def score_batches(
    scorer: ImageScorer,
    decoded: Iterable[Decoded],
    preprocess: Preprocess,
    batch_size: int,
    timings: Timings,
    latents: bool = False,
) -> Iterator[list[ScoredInput]]:
    """Score inputs by batches of `batch_size` slices; an input's slices stay together.

    With `latents`, they get the correlations of their latents too.
    """
    per_volume = slices_per_volume(preprocess)
    batch: list[tuple[Decoded, int]] = []
    used = 0
    for one in decoded:
        slots = slots_of(one.item, per_volume)
        if batch and used + slots > batch_size:
            yield _score(scorer, batch, batch_size, timings, latents)
            batch, used = [], 0
        batch.append((one, slots))
        used += slots
    if batch:
        yield _score(scorer, batch, batch_size, timings, latents)


def _score(
    scorer: ImageScorer,
    batch: Sequence[tuple[Decoded, int]],
    batch_size: int,
    timings: Timings,
    latents: bool,
) -> list[ScoredInput]:
    """Score one batch.

    A file has its slots in the batch whether it can be read or not, and every batch is full: the last bits of
    a sum may depend on the place in the batch, so a bad file must not move another's slices. Images that go
    one by one need no filling.
    """
    begin = time.perf_counter()
    starts = np.cumsum([0, *(slots for _, slots in batch)])
    least = batch_size if scorer.needs_full_batches else 0
    images = np.zeros((max(least, int(starts[-1])), *scorer.input_shape), dtype=np.uint8)
    for start, (one, slots) in zip(starts, batch, strict=False):
        if not isinstance(one.result, VolumeError):
            images[start : start + slots] = one.result
    good = [not isinstance(one.result, VolumeError) for one, _ in batch]
    scores, correlations = np.zeros((len(images), 0)), None
    if any(good) and latents:
        scores, correlations = scorer.score_with_latents(images)
    elif any(good):
        scores = scorer.score(images)
    seconds = time.perf_counter() - begin
    timings.scoring += seconds
    share = seconds / max(1, sum(good))
    return [
        ScoredInput(
            one.item,
            one.size,
            one.mtime_ns,
            one.flags,
            one.result if isinstance(one.result, VolumeError) else scores[start : start + slots],
            one.seconds + (0.0 if isinstance(one.result, VolumeError) else share),
            one.measured,
            None if correlations is None else correlations[start : start + slots],
            one.grain,
        )
        for start, (one, slots) in zip(starts, batch, strict=False)
    ]
