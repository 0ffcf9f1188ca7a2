"""The files of an evaluation: tables, the page, and all figures as JSON. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastflow import __version__
from fastflow._files import write_text
from fastflow.archive.baselines import FittedBaselines
from fastflow.archive.evaluate_options import EvaluateOptions
from fastflow.archive.names import write_table
from fastflow.evaluation.bootstrap import LEVEL
from fastflow.evaluation.decisions import CLASS_FIGURES
from fastflow.evaluation.evaluation_page import ALL_FIGURES, write_evaluation

FORMAT = 1
METRICS, TABLE, CLASSES, REPORT = "metrics.json", "metrics.csv", "classes.csv", "report.html"


def document_of(
    settings: Mapping[str, Any],
    options: EvaluateOptions,
    sets: Mapping[str, Any],
    fitted: FittedBaselines | str,
) -> dict[str, Any]:
    """The content of ``metrics.json``, without what it is made from and its warnings.

    Args:
        settings: of the rows, see ``run.json``.
        options: of the evaluation.
        sets: of each split, as `fastflow.evaluation.decisions.evaluate_decisions` gives it.
        fitted: the baselines, or why there are none.
    """
    return {
        "format": FORMAT,
        "model": {name: settings[name] for name in ("model_hash", "temperature", "prior", "combine", "dims")},
        "slices": settings["preprocess"]["slices"],
        "bootstrap": {
            "resamples": options.resamples,
            "seed": options.seed,
            "unit": "subject",
            "strata": "class",
            "interval": f"percentile, {LEVEL:g}",
        },
        "baselines": {"missing": fitted}
        if isinstance(fitted, str)
        else {
            "training_volumes": dict(fitted.classes),
            "left_out": [str(error) for error in fitted.errors],
            "missing": dict(fitted.missing),
        },
        "sets": dict(sets),
        "fastflow": __version__,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_all(folder: Path, document: dict[str, Any]) -> None:
    """Write the tables, the page and, last, ``metrics.json`` of an evaluation.

    Raises:
        OSError: one cannot be written.
    """
    estimates = [f"{name}{end}" for name in ALL_FIGURES for end in ("", "_low", "_high")]
    write_table(
        folder / TABLE,
        ("split", "decision", "volumes", "subjects", *estimates),
        [
            {"split": split, "decision": name, "volumes": one["volumes"], "subjects": one["subjects"]}
            | _cells(decision["figures"])
            for split, one in document["sets"].items()
            for name, decision in one["decisions"].items()
        ],
    )
    estimates = [f"{name}{end}" for name in CLASS_FIGURES for end in ("", "_low", "_high")]
    write_table(
        folder / CLASSES,
        ("split", "decision", "class", "volumes", "subjects", *estimates),
        [
            {"split": split, "decision": name, "class": class_name}
            | one["classes"][class_name]
            | _cells(figures)
            for split, one in document["sets"].items()
            for name, decision in one["decisions"].items()
            for class_name, figures in decision["classes"].items()
        ],
    )
    write_evaluation(folder / REPORT, document)
    write_text(folder / METRICS, json.dumps(document, indent=1) + "\n")


def _cells(figures: dict[str, dict[str, float | None]]) -> dict[str, float | None]:
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{end}": one[key] for name, one in figures.items() for end, key in ends.items()}
