"""Semi-conditional models on the demo archive: the cost of label-free steps in accuracy.

``python -m bench.semi_conditional OUT``

Trains the demo model once for each number n of label-free steps (``FlowConfig.condition_from_step``), with
the demo's own recipe and seed, classifies its held-out scans, and writes a row for each into
OUT/semi_conditional.csv: accuracy on unseen subjects and on the unseen head, bits/dim, epoch that was kept.
The demo has 12 steps; 0, 3, 6 and 9 of them are the fractions that 0, 6, 12 and 18 are of the paper's 24.
What n saves in time, ``bench/scoring_cost.py`` measures. One run takes as long as ``make demo``.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastflow import FlowConfig
from fastflow.data.demo import SCANNERS
from fastflow.workflow import run_demo

LABEL_FREE = (0, 3, 6, 9)
COLUMNS = ("label_free_steps", "steps", "accuracy", "unseen_head_accuracy", "bits_per_dim", "kept_epoch")


def run(n: int, folder: Path) -> dict[str, object]:
    """Train and evaluate with n label-free steps, or read what an earlier run found."""
    names = sorted(scanner.name for scanner in SCANNERS)
    config = FlowConfig.demo(len(names), class_names=names, condition_from_step=n)
    if not (folder / "metrics.json").exists():
        run_demo(
            folder,
            config=config,
            on_epoch=lambda record: print(f"n = {n}:", record, file=sys.stderr, flush=True),
        )
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    saved = json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    return {
        "label_free_steps": n,
        "steps": config.num_steps,
        "accuracy": round(metrics["accuracy"], 4),
        "unseen_head_accuracy": round(metrics["unseen_head_accuracy"], 4),
        "bits_per_dim": round(metrics["bits_per_dim"], 4),
        "kept_epoch": saved["metadata"]["training"]["kept_epoch"],
    }


def main(arguments: Sequence[str]) -> None:
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    rows = [run(n, out / f"n{n}") for n in LABEL_FREE]
    with (out / "semi_conditional.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    print((out / "semi_conditional.csv").read_text(encoding="utf-8"), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
