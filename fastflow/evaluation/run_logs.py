"""The logs of trainings as they lie in model folders: epochs, steps and settings. Torch-free."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow.errors import CheckpointError

# The names that a training gives to its files.
HISTORY, STEPS, UNFINISHED, CONFIG, CHECKPOINTS = (
    "history.jsonl",
    "steps.csv",
    "unfinished",
    "config.json",
    "checkpoints",
)
# A message about damaged lines names so many of them.
MAX_NAMED = 3
# The columns of a step that curves are drawn of.
STEP_COLUMNS = ("step", "loss", "bits_per_dim", "learning_rate")
# These settings are results, or follow from others.
_NO_SETTINGS = ("training.kept_epoch",)


@dataclasses.dataclass(frozen=True)
class RunLog:
    """What is known of one training.

    Attributes:
        name: as it is shown.
        folder: where its history lies.
        history: a record for each epoch, as `train` writes them, sorted by epoch.
        steps: columns of ``steps.csv``, (S,) each, NaN where a number is missing; None without such a file.
        settings: of flow, training and preprocessing, by dotted names; empty where no model was saved.
        kept_epoch: the epoch that the model has; None while it is not finished.
        warnings: lines that could not be read, with their file.
    """

    name: str
    folder: Path
    history: Sequence[Mapping[str, float]]
    steps: Mapping[str, NDArray[np.float64]] | None = None
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kept_epoch: int | None = None
    warnings: tuple[str, ...] = ()

    def best(self, key: str, highest: bool = False) -> tuple[float, int] | None:
        """The best value of a number and its first epoch; None where no epoch has one that is finite."""
        found = [(r[key], int(r["epoch"])) for r in self.history if math.isfinite(r.get(key, math.nan))]
        if not found:
            return None
        return min(found, key=lambda one: (-one[0] if highest else one[0], one[1]))


def read_runs(paths: Sequence[str | PathLike[str]]) -> list[RunLog]:
    """The logs of several trainings, named by the parts of their paths in which they differ.

    Args:
        paths: model folders, finished or not, their ``unfinished`` folders, or files ``history.jsonl``.

    Raises:
        ValueError: there are none, or two are the same folder.
        CheckpointError: one is none of these, or holds no epoch that can be read.
    """
    if not paths:
        raise ValueError("runs must name at least one model folder, got none")
    folders = [_folder_of(Path(path)) for path in paths]
    seen: dict[Path, Path] = {}
    for path, folder in zip(map(Path, paths), folders, strict=True):
        first = seen.setdefault(folder.resolve(), path)
        if first is not path:
            raise ValueError(f"{path}: is named twice (as {first}); name each run once")
    return [_read_run(name, folder) for name, folder in zip(_names(folders), folders, strict=True)]


def _folder_of(path: Path) -> Path:
    """The folder that holds the history of a run."""
    if path.name == HISTORY and path.is_file():
        return path.parent
    for folder in (path, path / UNFINISHED):
        if (folder / HISTORY).is_file():
            return folder
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such folder; name a model folder that `train` writes")
    what = "a model without the history of its training" if (path / CONFIG).is_file() else "no run of `train`"
    raise CheckpointError(
        f"{path}: {what}, neither {HISTORY} nor {UNFINISHED}/{HISTORY} is there; name a model folder of "
        "which an epoch is finished"
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """Shortest ends of paths that tell the folders apart; one folder has its own name."""
    parts = [tuple(p for p in folder.absolute().parts if p != UNFINISHED) for folder in folders]
    length = 1
    while len({each[-length:] for each in parts}) < len(set(parts)):
        length += 1
    names = ["/".join(each[-length:]) for each in parts]
    # A finished model and the training that will replace it lie in one folder.
    return [
        f"{name} ({UNFINISHED})" if folder.name == UNFINISHED and names.count(name) > 1 else name
        for name, folder in zip(names, folders, strict=True)
    ]


def _read_run(name: str, folder: Path) -> RunLog:
    warnings: list[str] = []
    history = _read_history(folder / HISTORY, warnings)
    steps = _read_steps(folder / STEPS, warnings) if (folder / STEPS).is_file() else None
    settings = _read_settings(folder, warnings)
    kept = settings.get("training.kept_epoch")
    known = {key: value for key, value in settings.items() if key not in _NO_SETTINGS}
    return RunLog(name, folder, history, steps, known, kept, tuple(warnings))


def _read_history(path: Path, warnings: list[str]) -> list[dict[str, float]]:
    found: dict[float, dict[str, float]] = {}
    damaged: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            numbers = {key: float(value) for key, value in record.items() if isinstance(value, int | float)}
            # The last line of an epoch counts where the epoch was repeated.
            found[numbers["epoch"]] = numbers
        except (ValueError, KeyError, AttributeError, RecursionError):
            damaged.append(str(number))
    if damaged:
        warnings.append(f"{path}: {_lines(damaged)} no record of an epoch and left out")
    if not found:
        raise CheckpointError(f"{path}: holds no epoch that can be read; train for one epoch at least")
    return [found[epoch] for epoch in sorted(found)]


def _lines(numbers: Sequence[str]) -> str:
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    return (
        f"line {numbers[0]} is" if len(numbers) == 1 else f"lines {', '.join(numbers[:MAX_NAMED])}{more} are"
    )


def _read_steps(path: Path, warnings: list[str]) -> dict[str, NDArray[np.float64]] | None:
    rows: list[list[float]] = []
    damaged: list[str] = []
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as stream:
            reader = csv.DictReader(stream)
            if "step" not in (reader.fieldnames or ()):
                warnings.append(f"{path}: has no column 'step' and is left out")
                return None
            for number, row in enumerate(reader, start=2):
                try:
                    values = [_number(row.get(name)) for name in STEP_COLUMNS]
                    if math.isnan(values[0]):
                        raise ValueError("no step")
                    rows.append(values)
                except ValueError:
                    damaged.append(str(number))
    except (OSError, csv.Error) as error:
        warnings.append(f"{path}: cannot be read and is left out: {error}")
        return None
    if damaged:
        warnings.append(f"{path}: {_lines(damaged)} no record of a step and left out")
    if not rows:
        return None
    table = np.array(rows)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return {name: table[:, place] for place, name in enumerate(STEP_COLUMNS)}


def _number(text: str | None) -> float:
    return float(text) if text else math.nan


# -- settings ------------------------------------------------------------------------------------------------


def _read_settings(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """Settings of the model in a folder, or of a checkpoint of it; none where there is neither."""
    places = (folder, folder / CHECKPOINTS / "accuracy", folder / CHECKPOINTS / "loss")
    for path in (place / CONFIG for place in places):
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            metadata = document.get("metadata") or {}
            parts = {
                "flow": document.get("config") or {},
                "training": metadata.get("training") or {},
                "preprocess": metadata.get("preprocess") or {},
            }
            return dict(_flat(parts))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            warnings.append(f"{path}: its settings cannot be read: {error}")
    return {}


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def differing_settings(runs: Sequence[RunLog]) -> dict[str, list[str]]:
    """The settings in which runs differ: values as text by name, "–" where a run has none.

    A run without any settings differs from no other.
    """  # noqa: RUF002
    names = dict.fromkeys(name for run in runs for name in run.settings)
    table = {}
    for name in names:
        values = [_text(run.settings[name]) if name in run.settings else "–" for run in runs]  # noqa: RUF001
        if len({value for value, run in zip(values, runs, strict=True) if run.settings}) > 1:
            table[name] = values
    return table


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
