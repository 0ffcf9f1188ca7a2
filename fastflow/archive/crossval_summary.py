"""The summary of a cross-validation: mean and deviation over folds, summed confusion, tables, the page.

Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fastflow import __version__
from fastflow._files import write_text
from fastflow.archive.crossval_plan import Plan, Round
from fastflow.archive.names import write_table
from fastflow.evaluation.evaluation_page import ALL_FIGURES, write_crossval

DOCUMENT, TABLE, REPORT = "crossval.json", "crossval.csv", "report.html"


def document_of(
    identity: Mapping[str, Any], plan: Plan, evaluations: Mapping[Round, Mapping[str, Any]]
) -> dict[str, Any]:
    """The content of ``crossval.json``.

    Args:
        identity: of the cross-validation, the content of ``plan.json``.
        plan: of its rounds.
        evaluations: the content of each round's ``metrics.json``.
    """
    runs = list(evaluations.items())
    warnings = list(plan.warnings)
    for round_, document in runs:
        warnings += [f"{round_.name}: {line}" for line in document["warnings"]]
    return {
        **identity,
        "runs": [
            {"name": round_.name, "fold": round_.fold, "seed": round_.seed, **document["model"]}
            for round_, document in runs
        ],
        "sets": {name: _summary_of_set(name, evaluations) for name in runs[0][1]["sets"]},
        "warnings": warnings,
        "fastflow": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _summary_of_set(name: str, evaluations: Mapping[Round, Mapping[str, Any]]) -> dict[str, Any]:
    sets = {round_: document["sets"][name] for round_, document in evaluations.items()}
    first = next(iter(sets.values()))
    # A baseline that one fold lacks has no mean over folds.
    decisions = [key for key in first["decisions"] if all(key in one["decisions"] for one in sets.values())]
    return {
        "class_names": first["class_names"],
        "volumes": [one["volumes"] for one in sets.values()],
        "decisions": {
            key: {
                "figures": _figures(
                    {round_: one["decisions"][key]["figures"] for round_, one in sets.items()}
                ),
                "confusion": np.sum(
                    [one["decisions"][key]["confusion"] for one in sets.values()], axis=0
                ).tolist(),
            }
            for key in decisions
        },
    }


def _figures(values: Mapping[Round, Mapping[str, Mapping[str, float | None]]]) -> dict[str, Any]:
    """Each figure's values, mean and deviations."""
    names = next(iter(values.values()))
    return {
        name: over_folds({round_: own[name]["value"] for round_, own in values.items()}) for name in names
    }


def over_folds(values: Mapping[Round, float | None]) -> dict[str, Any]:
    """Mean and sample standard deviations of a figure.

    Args:
        values: of each training; None where the figure is not defined.

    Returns:
        ``values`` in their order, ``mean``, ``deviation`` over folds (of the means over seeds), and
        ``deviation_over_seeds`` (of the means over folds), None for a single seed. All are None where a value
        is.
    """
    listed = list(values.values())
    folds, seeds = ({getattr(round_, name): None for round_ in values} for name in ("fold", "seed"))
    out: dict[str, Any] = {"values": listed, "mean": None, "deviation": None, "deviation_over_seeds": None}
    if any(value is None for value in listed):
        return out
    grid = np.array(
        [[values[r] for r in values if r.fold == f and r.seed == s] for f in folds for s in seeds]
    )
    grid = grid.astype(np.float64).reshape(len(folds), len(seeds))
    out |= {"mean": float(grid.mean()), "deviation": _deviation(grid.mean(axis=1))}
    return out | {"deviation_over_seeds": _deviation(grid.mean(axis=0))}


def _deviation(values: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    return float(values.std(ddof=1)) if len(values) > 1 else None


def write_all(folder: Path, document: dict[str, Any]) -> None:
    """Write the table, the page and, last, ``crossval.json``.

    Raises:
        OSError: one cannot be written.
    """
    rows: list[dict[str, Any]] = []
    for name, one in document["sets"].items():
        for decision, each in one["decisions"].items():
            for i, run in enumerate(document["runs"]):
                figures = {key: value["values"][i] for key, value in each["figures"].items()}
                own = {"set": name, "decision": decision, "fold": run["fold"], "seed": run["seed"]}
                rows.append(own | {"volumes": one["volumes"][i]} | figures)
            for kind in ("mean", "deviation", "deviation_over_seeds"):
                figures = {key: value[kind] for key, value in each["figures"].items()}
                if any(value is not None for value in figures.values()):
                    rows.append({"set": name, "decision": decision, "fold": kind} | figures)
    write_table(folder / TABLE, ("set", "decision", "fold", "seed", "volumes", *ALL_FIGURES), rows)
    write_crossval(folder / REPORT, document)
    write_text(folder / DOCUMENT, json.dumps(document, indent=1) + "\n")
