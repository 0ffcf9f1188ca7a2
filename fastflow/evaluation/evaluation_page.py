"""The pages of an evaluation and of a cross-validation: no scripts, no links, every picture inside."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any

from fastflow._files import write_text
from fastflow.evaluation.decisions import BITS, CLASS_FIGURES
from fastflow.evaluation.figures import confusion_figure, roc_figure
from fastflow.evaluation.metrics import FIGURES
from fastflow.evaluation.pages import inline, render

ALL_FIGURES = (*FIGURES, *BITS)
TITLES = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "auc": "AUC",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "kappa": "Kappa",
    "ece": "ECE",
    "nll": "NLL, nats",
    "bits_per_dim": "Bits/dim, true label",
    "bits_per_dim_predicted": "Bits/dim, predicted label",
}
# Macro recall is the balanced accuracy, and one column of it is enough for a page.
COLUMNS = tuple(name for name in ALL_FIGURES if name != "recall")
# Pairs of decisions are compared in these.
COMPARED = ("accuracy", "balanced_accuracy", "auc", "f1", "nll")


def write_evaluation(
    path: str | PathLike[str], document: Mapping[str, Any], title: str = "Evaluation"
) -> None:
    """Write the page of an evaluation atomically.

    Args:
        path: the HTML file.
        document: the content of ``metrics.json``.
        title: of the page.
    """
    sets = document["sets"]
    pictures = {
        split: {
            "confusion": inline(confusion_figure(_first(one)["confusion"], one["class_names"])),
            "roc": inline(roc_figure({name: each["roc"] for name, each in one["decisions"].items()})),
        }
        for split, one in sets.items()
    }
    details = {
        name: document[name] for name in ("source", "manifest", "slices", "fastflow", "finished")
    } | document["model"]
    html = render(
        "evaluation.html",
        title=title,
        document=document,
        sets=sets,
        first={split: next(iter(one["decisions"])) for split, one in sets.items()},
        pictures=pictures,
        titles=TITLES,
        columns=COLUMNS,
        compared=COMPARED,
        class_columns=CLASS_FIGURES,
        details=details,
    )
    write_text(path, html)


def _first(one: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(iter(one["decisions"].values()))


def write_crossval(path: str | PathLike[str], document: Mapping[str, Any]) -> None:
    """Write the page of a cross-validation atomically.

    Args:
        path: the HTML file.
        document: the content of ``crossval.json``.
    """
    pictures = {
        name: inline(confusion_figure(next(iter(one["decisions"].values()))["confusion"], one["class_names"]))
        for name, one in document["sets"].items()
    }
    write_text(
        path,
        render(
            "crossval.html",
            document=document,
            sets=document["sets"],
            pictures=pictures,
            titles=TITLES,
            columns=COLUMNS,
            compared=COMPARED,
        ),
    )
