"""One self-contained HTML page about a run: no scripts, no links, every picture inside it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastflow._files import write_text
from fastflow.evaluation import figures
from fastflow.evaluation.figures import Explanation
from fastflow.evaluation.pages import inline, render

PROVENANCE = "simulated scanners on real anatomy"


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Results on one set of held-out volumes.

    Attributes:
        name: as shown, e.g. "Unseen subjects".
        metrics: of the model, from `classification_metrics`.
        histogram: of the histogram baseline, from `classification_metrics`.
        bits_per_dim: mean under the true label.
        note: a sentence on what this set tests.
        flagged: share of the volumes that were flagged or could not be used; None where it is not known.
        grain: of the grain baseline, from `classification_metrics`; None where it was not fitted.
    """

    __test__ = False

    name: str
    metrics: Mapping[str, Any]
    histogram: Mapping[str, Any]
    bits_per_dim: float
    note: str = ""
    flagged: float | None = None
    grain: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class DistortedSet:
    """Copies of held-out volumes under one distortion.

    Attributes:
        text: what was done.
        count: number of copies.
        share: of the copies that were flagged or could not be used.
        codes: how many have each code, in words.
    """

    text: str
    count: int
    share: float
    codes: str


def write_report(
    path: str | PathLike[str],
    tests: Sequence[TestSet],
    real: NDArray[np.uint8],
    generated: NDArray[np.uint8],
    explanations: Sequence[Explanation],
    history: Sequence[Mapping[str, float]],
    details: Mapping[str, Any],
    title: str = "MAGIC-Flow on simulated scanners",
    provenance: str = PROVENANCE,
    distorted: Sequence[DistortedSet] = (),
) -> None:
    """Write the page atomically.

    Args:
        path: the HTML file.
        tests: results, the headline first; all with the same class names.
        real: (K, n, H, W) uint8, slices of each class.
        generated: (K, m, H, W) uint8, samples of each class.
        explanations: slices with their likelihood attribution.
        history: one record per epoch, as `train` returns them.
        details: seed, versions, seconds and configuration of the run; nested values are shown as JSON.
        title: of the page.
        provenance: the kind of data; stands beside every number.
        distorted: which distortions of held-out volumes were noticed.

    Raises:
        ValueError: there is no test set, or their class names differ.
    """
    if not tests:
        raise ValueError("tests must hold at least one set of results, got none")
    names: list[str] = list(tests[0].metrics["class_names"])
    if any(list(test.metrics["class_names"]) != names for test in tests):
        raise ValueError("all test sets must have the same class names")
    html = render(
        "report.html",
        title=title,
        provenance=provenance,
        tests=tests,
        distorted=distorted,
        class_names=names,
        confusions=[inline(figures.confusion_figure(test.metrics["confusion"], names)) for test in tests],
        samples=inline(figures.samples_figure(real, generated, names)),
        attribution=inline(figures.attribution_figure(explanations, names)) if explanations else None,
        curves=inline(figures.curves_figure(history)) if history else None,
        epochs=len(history),
        details=[(key, _plain(value)) for key, value in details.items()],
    )
    write_text(path, html)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping | list | tuple):
        return json.dumps(value, default=str)
    return f"{value:.4g}" if isinstance(value, float) else str(value)
