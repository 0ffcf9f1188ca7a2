"""Errors of decisions by reduced precision, on a trained model. ``python -m bench.mixed_precision DEMO``.

DEMO is a folder that `fastflow demo` filled (or one of `bench.semi_conditional`). Its held-out slices are
scored in float64, which stands for exact, in float32 and with bfloat16 conditioners, and every gap between a
label and the best one is compared: printed for each test set are the largest error of a log-odds in nats, its
root mean square, and the share of slices whose likeliest label is that of float64. Rounding to bfloat16 is
the same whether a device has arithmetic for it or not, only slower.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastflow import MagicFlow
from fastflow.data.manifest import read_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import load_slices
from fastflow.models.inference import precision as scoring
from fastflow.models.scoring import LabelScorer, score_slices


def compare(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Errors of log-odds against the likeliest label by `want` (N, K), and agreement on that label."""
    best = want.argmax(axis=1)[:, None]
    error = (got - np.take_along_axis(got, best, 1)) - (want - np.take_along_axis(want, best, 1))
    return {
        "max": float(np.abs(error).max()),
        "rms": float(np.sqrt((error**2).mean())),
        "agreement": float((got.argmax(axis=1) == best[:, 0]).mean()),
    }


def main(arguments: Sequence[str]) -> None:
    from fastflow.workflow import TESTS

    folder = Path(arguments[0])
    model = MagicFlow.load(folder / "model")
    names = model.config.class_names
    assert names is not None
    preprocess = Preprocess.from_dict(model.metadata["preprocess"])
    # The question is how values are rounded, not how fast, so mixed precision is used without bfloat16
    # arithmetic too.
    scoring.has_bfloat16 = lambda device: True
    exact = LabelScorer(MagicFlow.load(folder / "model").double().eval())
    scorers = {"float32": LabelScorer(model), "mixed": LabelScorer(model, "mixed")}
    for split in TESTS:
        records = [record for record in read_manifest(folder / "manifest.csv") if record.split == split]
        slices, _ = load_slices(records, preprocess, names)
        want = score_slices(exact, slices.images)
        gaps = np.sort(want, axis=1)[:, -1] - np.sort(want, axis=1)[:, -2]
        gap = f"median gap between the two likeliest labels {np.median(gaps):.2f} nats"
        print(f"{split}: {len(want)} slices, {gap}")
        for name, scorer in scorers.items():
            found = compare(score_slices(scorer, slices.images), want)
            error = f"max {found['max']:.4f}, rms {found['rms']:.4f} nats"
            print(f"  {name}: log-odds error {error}; agreement {found['agreement']:.4%}")


if __name__ == "__main__":
    main(sys.argv[1:])
