"""Files and figures of a run beside its rows: counts, rates, ``summary.json``, lines to print. Torch-free."""

from __future__ import annotations

import dataclasses
import math
import platform
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow import __version__
from fastflow.archive.batches import Timings
from fastflow.archive.journal import Journal
from fastflow.archive.rows import STATUSES
from fastflow.data.endings import HINTS
from fastflow.data.inventory import Inventory
from fastflow.data.words import class_indices, class_name


@dataclasses.dataclass(frozen=True)
class Summary:
    """The state of a run's folder after the run.

    Attributes:
        out: the folder.
        files: the result files.
        counts: rows by status.
        codes: rows by error or flag code.
        class_names: K names.
        confusion: (K, K) rows of a known label (first axis) by predicted label.
        new: rows of this run, the others were there before it.
        seconds: of this run.
        rates: of this run, see ``summary.json``.
        errors: the first errors of this run.
        inventory: the inputs of this run as used, and what was left out beside them.
    """

    out: str
    files: tuple[str, ...]
    counts: dict[str, int]
    codes: dict[str, int]
    class_names: tuple[str, ...]
    confusion: NDArray[np.int64]
    new: int
    seconds: float
    rates: dict[str, Any]
    errors: tuple[str, ...] = ()
    inventory: Inventory = dataclasses.field(default_factory=Inventory)

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(self.counts.values())

    @property
    def failed(self) -> int:
        """Number of inputs that could not be used."""
        return self.counts["error"]

    def labelled(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(labels, predictions) of the inputs that were classified and have a label of the model, sorted."""
        label, predicted = np.indices(self.confusion.shape).reshape(2, -1)
        counts = self.confusion.reshape(-1)
        return np.repeat(label, counts), np.repeat(predicted, counts)

    def metrics(self) -> dict[str, Any] | None:
        """Accuracy and the like of the labelled inputs; None where there are none."""
        labels, predictions = self.labelled()
        if not len(labels):
            return None
        # Only runs over labelled inputs wait for scikit-learn to be imported.
        from fastflow.evaluation.classification import classification_metrics

        return classification_metrics(labels, predictions, len(self.class_names), self.class_names)


def tally(journal: Journal, names: Sequence[str]) -> tuple[dict[str, int], dict[str, int], NDArray[np.int64]]:
    """(rows by status, rows by code, (K, K) rows by known label and predicted one) of a journal."""
    known = class_indices(names)
    predictions = {name: k for k, name in enumerate(names)}
    counts: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    for _, row in journal.read():
        counts[row["status"]] += 1
        codes.update((row.get("error_code") or "").split(";") if row.get("error_code") else ())
        if row["status"] != "error" and (label := class_name(row["label"])) in known:
            confusion[known[label], predictions[row["predicted"]]] += 1
    return {status: counts[status] for status in STATUSES}, dict(sorted(codes.items())), confusion


def rates_of(timings: Timings, new: int, seconds: float, workers: int) -> dict[str, Any]:
    """How fast a run was, and what held it up.

    Args:
        timings: where its time went.
        new: rows that it wrote.
        seconds: that it took.
        workers: its reading processes.
    """

    def rate(time: float) -> float | None:
        return round(new / time, 3) if new and time > 0 else None

    shares = {"reading": timings.waiting, "scoring": timings.scoring, "writing": timings.writing}
    return {
        "files_per_second": rate(seconds),
        "reading_files_per_second": rate(timings.reading / workers),
        "scoring_files_per_second": rate(timings.scoring),
        "writing_files_per_second": rate(timings.writing),
        "seconds_of_the_model": {name: round(value, 3) for name, value in shares.items()},
        "bound_by": max(shares, key=lambda name: shares[name]) if new else None,
    }


def document_of(
    summary: Summary, state: str, versions: dict[str, str], configuration: dict[str, Any]
) -> dict[str, Any]:
    """The content of ``summary.json``.

    Args:
        summary: of the run.
        state: ``"finished"`` or ``"stopped"``.
        versions: of what computed.
        configuration: of the run.
    """
    return {
        "state": state,
        "rows": summary.total,
        "rows_of_this_run": summary.new,
        "status": summary.counts,
        "codes": summary.codes,
        "inventory": summary.inventory.to_dict(),
        "files": [Path(file).name for file in summary.files],
        "accuracy": summary.metrics(),
        "seconds": round(summary.seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "rates": summary.rates,
        # Scores are computed, not drawn.
        "seed": None,
        "versions": {
            "fastflow": __version__,
            "python": platform.python_version(),
            **versions,
            **{name: version(name) for name in ("numpy", "nibabel")},
        },
        "configuration": configuration,
    }


def passed_over(inventory: Inventory) -> str:
    """Half a sentence on the files of other endings that the walk over folders met; empty without any."""
    endings = {reason: n for reason, n in inventory.left_out.items() if reason in HINTS or reason == "other"}
    count = sum(endings.values())
    if not count:
        return ""
    each = ", ".join(f"{ending} {number}" for ending, number in sorted(endings.items()))
    files = "files of other endings were" if count > 1 else "file of another ending was"
    return f"; {count} {files} passed over ({each})"


def describe(summary: Summary) -> str:
    """The outcome of a run in a few lines: counts, and accuracy and recalls where labels are known."""
    counts = summary.counts
    flagged = f" ({counts['flagged']} flagged)" if counts["flagged"] else ""
    classified = f"{summary.total - summary.failed} classified{flagged}"
    passed = passed_over(summary.inventory)
    lines = [f"{summary.out}: {summary.total} inputs, {classified}, {summary.failed} failed{passed}"]
    if summary.inventory.left_out:
        lines.append(summary.inventory.line())
    if summary.new < summary.total:
        lines.append(f"{summary.total - summary.new} of them were there before this run")
    if summary.codes:
        lines.append(", ".join(f"{code} {count}" for code, count in summary.codes.items()))
    rates = summary.rates
    if rates["bound_by"]:
        parts = [
            f"{name} {rates[f'{name}_files_per_second'] or math.inf:.3g}/s"
            for name in ("reading", "scoring", "writing")
        ]
        lines.append(
            f"{rates['files_per_second']:.3g} inputs/s ({', '.join(parts)}; bound by {rates['bound_by']})"
        )
    metrics = summary.metrics()
    if metrics is not None:
        labelled = int(summary.confusion.sum())
        accuracy = f"accuracy {metrics['accuracy']:.3f}, balanced {metrics['balanced_accuracy']:.3f}"
        lines.append(f"{accuracy} ({labelled} labelled)")
        recalls = {name: recall for name, recall in metrics["per_class_recall"].items() if recall is not None}
        lines += [f"  {name}\trecall {recall:.3f}" for name, recall in recalls.items()]
    return "\n".join(lines)
