"""The cost of scoring against labels, images and label-free steps.

``python -m bench.scoring_cost OUT [ENGINE]``

Paper preset with random weights, the compiled engine unless another is named. Each case is timed in rounds,
before each of which the reference (7 labels, 4 images, no label-free step) is timed too; a case's cost is the
median of the rounds' ratios of time per image, which a shared machine's drift leaves alone. Writes
OUT/scoring_cost.csv and OUT/scoring_cost.png.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt

from bench.measuring import DEVICE, device_name, synchronised
from bench.test_scoring import build, images
from fastflow.models.scoring import LabelScorer

LABELS, IMAGES, LABEL_FREE = (1, 2, 4, 7, 16, 50), (1, 2, 4, 8, 16), (0, 6, 12, 18)
REFERENCE = {"labels": 7, "images": 4, "label_free": 0}
COLUMNS = (
    "axis",
    "labels",
    "images",
    "label_free",
    "cost_per_image",
    "images_per_second",
    "engine",
    "device",
    "threads",
    "torch",
)
ROUNDS = 3


def cases() -> list[tuple[str, dict[str, int]]]:
    """(axis, case) pairs, in each of which one number differs from the reference."""
    axes = {"labels": LABELS, "images": IMAGES, "label_free": LABEL_FREE}
    return [(axis, REFERENCE | {axis: value}) for axis, values in axes.items() for value in values]


def seconds(scorer: LabelScorer, x: torch.Tensor) -> float:
    """Seconds per image of one call."""
    start = time.perf_counter()
    synchronised(lambda: scorer(x))()
    return (time.perf_counter() - start) / len(x)


def measure(engine: str) -> list[dict[str, object]]:
    """A row for each of `cases`."""
    reference = LabelScorer(build(REFERENCE["labels"]), engine=engine)
    seconds(reference, images(REFERENCE["images"]))
    rows = []
    for axis, case in cases():
        scorer = LabelScorer(build(case["labels"], condition_from_step=case["label_free"]), engine=engine)
        x = images(case["images"])
        seconds(scorer, x)
        pairs = [(seconds(reference, images(REFERENCE["images"])), seconds(scorer, x)) for _ in range(ROUNDS)]
        row = {"axis": axis, **case, "cost_per_image": round(statistics.median(b / a for a, b in pairs), 3)}
        row["images_per_second"] = round(1 / statistics.median(b for _, b in pairs), 2)
        rows.append(
            row
            | {
                "engine": engine,
                "device": device_name(),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            }
        )
        print(row, flush=True)
    return rows


def plot(rows: Sequence[dict[str, object]], path: Path) -> None:
    """Draw the rows, a panel for each axis."""
    mpl.use("Agg")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    titles = {
        "labels": "labels, 4 images",
        "images": "images, 7 labels",
        "label_free": "label-free steps of 24, 7 labels, 4 images",
    }
    for ax, (axis, title) in zip(axes, titles.items(), strict=True):
        points = [
            (int(str(row[axis])), float(str(row["cost_per_image"]))) for row in rows if row["axis"] == axis
        ]
        values, costs = zip(*points, strict=True)
        ax.plot(values, costs, "o-", label="measured")
        if axis == "labels":
            ax.plot(
                values,
                [value / REFERENCE["labels"] for value in values],
                ":",
                color="0.5",
                label="proportional to the labels",
            )
        if axis == "label_free":
            ideal = [(value / 7 + 24 - value) / 24 for value in values]
            ax.plot(values, ideal, ":", color="0.5", label="if all steps cost alike")
        ax.set(xlabel=title, ylim=(0, None))
        ax.grid(alpha=0.3)
        if axis != "images":
            ax.legend(fontsize="x-small")
    axes[0].set_ylabel("relative time per image")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> None:
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    engine = arguments[1] if len(arguments) > 1 else ("cuda_graph" if DEVICE == "cuda" else "compile")
    rows = measure(engine)
    with (out / "scoring_cost.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, out / "scoring_cost.png")


if __name__ == "__main__":
    main(sys.argv[1:])
