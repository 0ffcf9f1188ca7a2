"""One table of all runs: mean and deviation over folds and seeds, for each method and budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.baselines.classification.results import read_run
from bench.files import replacing, write_csv

METRICS = (
    *("accuracy", "balanced_accuracy", "auc", "precision", "recall", "f1", "kappa"),
    *("ece", "nll", "bits_per_dim"),
)
# The validation set chose the run, so it is no result.
CHOOSING = "val"
SHOWN = ("balanced_accuracy", "accuracy", "auc", "f1", "ece", "nll", "bits_per_dim")

Row = dict[str, Any]


def make_table(places: Sequence[Path], out: Path | None = None) -> str:
    """Collect runs into one table.

    Args:
        places: files of runs, and folders that are searched for them.
        out: writes ``OUT.csv`` with all figures and ``OUT.md``.

    Returns:
        The table in markdown: a part for each test set, a row for each method and budget.

    Raises:
        ValueError: there is no run, a run is there twice, or runs of one fold were tested on other subjects.
    """
    runs = list(read_runs(places))
    if not runs:
        raise ValueError(f"no results of runs in {', '.join(map(str, places))}")
    check_runs(runs)
    rows = summarise([document for _, document in runs])
    markdown = _markdown(rows)
    if out is not None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        write_csv(out.with_name(f"{out.name}.csv"), columns, [[row[key] for key in columns] for row in rows])
        with replacing(out.with_name(f"{out.name}.md")) as stream:
            stream.write(markdown.encode())
    return markdown


def read_runs(places: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The documents of runs and where they lie, sorted by path; other JSON files are passed over.

    Raises:
        ValueError: a place does not exist, or a file is damaged.
    """
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: there is no such file or folder")
        for path in sorted(place.rglob("*.json")) if place.is_dir() else [place]:
            document = read_run(path)
            if document is not None:
                yield path, document


def check_runs(runs: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """Raise ValueError where two runs are the same, or two runs of a fold have other test subjects."""
    seen: dict[tuple[Any, ...], Path] = {}
    subjects: dict[tuple[Any, ...], tuple[Path, set[str]]] = {}
    for path, document in runs:
        fold = (document["folds"], document["fold"])
        key = (*_group(document), *fold, document["seed"])
        if key in seen:
            raise ValueError(f"{path} and {seen[key]} are results of the same run; take one of them away")
        seen[key] = path
        for name, results in document["sets"].items():
            own = set(results["subjects"])
            first, known = subjects.setdefault((name, *fold), (path, own))
            if known != own:
                raise ValueError(
                    f"{path} and {first} were tested on other subjects in fold {document['fold']} of "
                    f"{document['folds']} ({name}), so that their figures cannot be compared"
                )


def _group(document: dict[str, Any]) -> tuple[str, str, str]:
    budget = document.get("budget")
    text = "" if budget is None else f"{budget['amount']:g} {budget['kind']}"
    return document["method"], str(document.get("start") or ""), text


def summarise(documents: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each test set, method and budget: means, and deviations (ddof 1) over folds and seeds."""
    groups: dict[tuple[str, tuple[str, str, str]], list[dict[str, Any]]] = {}
    for document in documents:
        for name in document["sets"]:
            if name != CHOOSING:
                groups.setdefault((name, _group(document)), []).append(document)
    rows = []
    for (name, (method, start, budget)), members in groups.items():
        row: Row = {"set": name, "method": method, "start": start, "budget": budget, "runs": len(members)}
        row["folds"] = len({document["fold"] for document in members})
        row["seeds"] = len({document["seed"] for document in members})
        for key in ("parameters", "images", "seconds", "cpu_seconds", "seconds_of_all_rates"):
            row[key] = _mean([document.get(key) for document in members])
        for metric in METRICS:
            values = [document["sets"][name]["metrics"].get(metric) for document in members]
            known = [float(value) for value in values if value is not None]
            row[metric] = _mean(known)
            row[f"{metric}_sd"] = float(np.std(known, ddof=1)) if len(known) > 1 else None
        rows.append(row)
    order = list(dict.fromkeys(row["set"] for row in rows))
    return sorted(rows, key=lambda row: (order.index(row["set"]), -(row["balanced_accuracy"] or 0.0)))


def _mean(values: Sequence[Any]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _markdown(rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row["set"] for row in rows):
        titles = [metric.replace("_", " ") for metric in SHOWN]
        lines += [f"### {name}", "", f"| method | budget | runs | {' | '.join(titles)} | seconds |"]
        lines += ["|" + "---|" * (len(SHOWN) + 4)]
        for row in (row for row in rows if row["set"] == name):
            start = f" ({row['start']})" if row["start"] not in ("", "scratch") else ""
            seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
            figures = " | ".join(_figure(row, metric) for metric in SHOWN)
            lines.append(
                f"| {row['method']}{start} | {row['budget']} | {row['runs']} | {figures} | {seconds} |"
            )
        lines.append("")
    lines.append("Means over folds and seeds, and their standard deviation.")
    return "\n".join(lines) + "\n"


def _figure(row: Row, metric: str) -> str:
    if row[metric] is None:
        return ""
    deviation = row[f"{metric}_sd"]
    return f"{row[metric]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")
