"""The options of a run of `classify`: their values, their defaults and what they accept. Torch-free."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from os import PathLike
from typing import TypedDict

from fastflow.archive.inputs import IDS, Shard
from fastflow.archive.results import ROWS_PER_FILE, check_format
from fastflow.decision import COMBINE
from fastflow.readout import ARGMAX, check_readout

DEVICES = ("auto", "cpu", "cuda")
ON_ERROR = ("row", "fail")
# The engines that are none of `LabelScorer`'s.
RAY, ONNX = "ray", "onnx"
MAX_DEFAULT_WORKERS = 8

Progress = Callable[[int, int | None, int], None]


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of `fastflow.archive.classify.classify`, which documents each of them.

    Raises:
        ValueError: an option does not fit; the message names it. The prior is compared with the model's
            labels later.
    """

    prior: Sequence[float] | None = None
    batch_size: int = 16
    workers: int | None = None
    device: str = "auto"
    split: str | None = None
    progress: Progress | None = None
    precision: str = "float32"
    engine: str = "auto"
    manifest: str | PathLike[str] | None = None
    shard: str | Shard | None = None
    resume: bool = False
    retry_failed: bool = False
    overwrite: bool = False
    on_error: str = "row"
    max_errors: int | None = None
    format: str = "csv"
    id_from: str = "relpath"
    slices: str | None = None
    combine: str = "sum"
    shard_rows: int = ROWS_PER_FILE
    lock: bool = True
    readout: str = ARGMAX
    reject_below: float | None = None

    def __post_init__(self) -> None:
        if self.overwrite and self.resumes:
            raise ValueError("overwrite starts anew, resume and retry_failed go on: give one of them")
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error must be {' or '.join(ON_ERROR)}, got {self.on_error!r}")
        if self.max_errors is not None and self.max_errors < 0:
            raise ValueError(f"max_errors must not be negative, got {self.max_errors}")
        _check_positive(batch_size=self.batch_size, shard_rows=self.shard_rows)
        check_format(self.format)
        # Parsed here for its errors.
        _ = self.part
        pick_workers(self.workers)
        check_device(self.device)
        _check_choice("combine", self.combine, COMBINE)
        check_readout(self.readout)
        _check_choice("id_from", self.id_from, IDS)

    @property
    def resumes(self) -> bool:
        """Whether the run goes on with one that is there."""
        return self.resume or self.retry_failed

    @property
    def error_limit(self) -> float:
        """How many error rows the run may write; one more stops it."""
        if self.on_error == "fail":
            return 0
        return math.inf if self.max_errors is None else self.max_errors

    @property
    def part(self) -> Shard | None:
        """The part of the inputs that is meant; None for all of them."""
        return Shard.parse(self.shard) if isinstance(self.shard, str) else self.shard

    @property
    def num_workers(self) -> int:
        """The number of reading processes."""
        return pick_workers(self.workers)


class ClassifyOptions(TypedDict, total=False):
    """The keywords of `classify`: the fields of `RunOptions`, for type checkers."""

    prior: Sequence[float] | None
    batch_size: int
    workers: int | None
    device: str
    split: str | None
    progress: Progress | None
    precision: str
    engine: str
    manifest: str | PathLike[str] | None
    shard: str | Shard | None
    resume: bool
    retry_failed: bool
    overwrite: bool
    on_error: str
    max_errors: int | None
    format: str
    id_from: str
    slices: str | None
    combine: str
    shard_rows: int
    lock: bool
    readout: str
    reject_below: float | None


def pick_workers(workers: int | None) -> int:
    """The number of reading processes that None means here.

    Raises:
        ValueError: it is less than 1.
    """
    if workers is None:
        return max(1, min(MAX_DEFAULT_WORKERS, (os.cpu_count() or 1) // 2))
    _check_positive(workers=workers)
    return workers


def check_device(name: str) -> None:
    """Look whether a device's name is an accepted one, without PyTorch.

    Raises:
        ValueError: it is not.
    """
    if name not in DEVICES:
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")


def pick_device(name: str) -> str:
    """The device that ``"auto"`` means here.

    Raises:
        ValueError: the name is none of the accepted ones, or there is no such device.
    """
    import torch

    check_device(name)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device")
    return "cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu")


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


def _check_positive(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_choice(name: str, value: str, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise ValueError(f"{name} must be one of {', '.join(accepted)}, got {value!r}")
