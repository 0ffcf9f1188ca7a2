"""Train and test one rival, or make the table: see ``docs/rivals.md``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.baselines.classification.networks import NETWORKS
from bench.baselines.classification.run import FITTED, Run, run
from bench.baselines.classification.settings import KEPT_OUT, RATES, Budget, Settings
from bench.baselines.classification.table import make_table
from fastflow.errors import FastflowError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the result is the exit code: 0 done, 2 wrong usage or input."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _table(given[1:]) if given[:1] == ["table"] else _train(given)
    except (FastflowError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "bench.baselines.classification",
        description="Train and test one rival; `table DIR...` makes the table.",
    )
    add = parser.add_argument
    add("name", choices=(*FITTED, *NETWORKS), metavar="NAME", help=", ".join((*FITTED, *NETWORKS)))
    add("manifest", type=Path, help="labelled volumes or PNG files, with subjects")
    add("--out", type=Path, required=True, help="folder of the results, one JSON file a run")
    add("--fold", type=int, default=0, help="which fold is the test set")
    add("--folds", type=int, default=5)
    add("--fold-seed", type=int, default=0, help="of the division into folds")
    add("--seed", type=int, default=0, help="of weights, order and augmentation")
    add("--label", help="column of the manifest that holds the class")
    add("--kept-out", default=KEPT_OUT, help="split whose rows are no part of the folds, and tested apart")
    add("--size", type=int, nargs=2, default=(96, 96), metavar=("H", "W"))
    add("--slices", default="center", help="as `fastflow train --slices`")
    add("--workers", type=int, default=1, help="processes that read volumes")
    add("--cache", type=Path, help="folder of decoded slices, by default OUT/slices")
    add("--weights", type=Path, help="file to start from, instead of random weights")
    add("--images", type=int, help="budget: images seen at each learning rate")
    add("--seconds", type=float, help="budget: seconds at each learning rate, validation included")
    add("--cpu-seconds", type=float, help="budget: seconds of the processor")
    add("--rates", type=float, nargs="+", default=list(RATES), help="learning rates to choose from")
    add("--batch-size", type=int, default=32)
    add("--weight-decay", type=float, default=0.05)
    add("--evaluations", type=int, default=12, help="looks at the validation set, over the budget")
    add("--patience", type=int, default=0, help="stop after so many looks without gain; 0: never")
    add("--augment", default="shift", help="shift, paper or none")
    add("--threads", type=int, default=1)
    add("--precision", default="32", choices=("32", "bf16"))
    add("--overwrite", action="store_true", help="replace a finished run")
    o = parser.parse_args(arguments)
    budgets = {"images": o.images, "seconds": o.seconds, "cpu_seconds": o.cpu_seconds}
    given = {kind: amount for kind, amount in budgets.items() if amount is not None}
    settings = None
    if o.name in NETWORKS:
        if len(given) != 1:
            parser.error("give one of --images, --seconds and --cpu-seconds")
        settings = Settings(
            Budget(*next(iter(given.items()))),
            tuple(o.rates),
            o.batch_size,
            o.weight_decay,
            augment=o.augment,
            evaluations=o.evaluations,
            patience=o.patience,
            seed=o.seed,
            threads=o.threads,
            precision=o.precision,
        )
    elif o.weights is not None:
        parser.error(f"{o.name} starts from no --weights")
    wanted = Run(
        o.name, o.manifest, o.out, o.fold, o.folds, o.fold_seed, o.seed, o.label, o.kept_out,
        (o.size[0], o.size[1]), o.slices, o.workers, o.cache, o.weights,
    )  # fmt: skip
    path = run(wanted, settings, o.overwrite, lambda line: print(line, file=sys.stderr, flush=True))
    print(path)
    return 0


def _table(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("bench.baselines.classification table", description="Make the table.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders or files of results")
    parser.add_argument("--out", type=Path, help="writes OUT.csv and OUT.md; otherwise prints markdown")
    options = parser.parse_args(arguments)
    print(make_table(options.folders, options.out), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
