"""MAGIC-Flow under the protocol of its rivals: the same folds, slices, augmentation, balancing and budget.

``python -m bench.baselines.classification.flows MANIFEST --fold 0 --seed 0 --epochs 10 --out DIR`` trains one
flow for each recipe and writes a document for each recipe and read-out. Recipes that begin with the same
objective share that part: a training is copied at the beginning of its last phase and goes on with another
objective from the copy, which gives the bits of a training from the start.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.baselines.classification.results import (
    check_finished,
    run_name,
    set_document,
    versions,
    write_run,
)
from bench.baselines.classification.settings import KEPT_OUT
from bench.baselines.classification.slices import cached_slices, labelled, sets_of_fold
from fastflow.archive.train import preprocess_like
from fastflow.data.listing import list_records
from fastflow.data.slices import SliceSet
from fastflow.decision import posterior
from fastflow.errors import FastflowError
from fastflow.models.config import FlowConfig
from fastflow.models.magic_flow import MagicFlow
from fastflow.models.scoring import score_slices, volume_log_probs
from fastflow.training.calibration import fit_temperature
from fastflow.training.config import TrainConfig
from fastflow.training.control import RunControl
from fastflow.training.objective import bits_per_dim
from fastflow.training.phases import Phase, mean_passes
from fastflow.training.readout_fit import VolumeScores, fit_readout
from fastflow.training.state import has_state
from fastflow.training.trainer import EpochRecord, train

# The last phase has this share of the steps.
LAST = 0.2
PAIRWISE = {"weight": 0.1, "temperature": 10.0}
HYBRID = {"weight": 0.1, "temperature": 10.0, "rivals": 3}
FIRST = {"likelihood": {}, "pairwise": PAIRWISE}
# A recipe is the objective of the first phase and that of the last.
RECIPES = {
    "likelihood": ("likelihood", "likelihood"),
    "likelihood then hybrid": ("likelihood", "hybrid"),
    "pairwise": ("pairwise", "pairwise"),
    "pairwise then hybrid": ("pairwise", "hybrid"),
}
# These settings of a training identify it; the others are those of every recipe.
SETTINGS = (
    *("epochs", "batch_size", "learning_rate", "warmup_epochs", "schedule"),
    *("augment", "sampler", "ema", "select", "seed"),
)
READOUTS = ("argmax", "tempered", "gaussian")


@dataclasses.dataclass(frozen=True)
class FlowRun:
    """Flows on one fold with one seed.

    Attributes:
        manifest: labelled files.
        out: folder of the results; trainings lie in ``flows/`` inside it.
        fold: which fold is the test set.
        folds: how many there are.
        fold_seed: of the division into folds.
        seed: of weights, order and augmentation.
        epochs: passes over the training slices.
        slices: see `fastflow.data.preprocess.Preprocess`.
        kept_out: split whose files are no part of the folds.
        cache: folder of decoded slices; inside `out` when None.
    """

    manifest: Path
    out: Path
    fold: int = 0
    folds: int = 5
    fold_seed: int = 0
    seed: int = 0
    epochs: int = 10
    slices: str = "center"
    kept_out: str = KEPT_OUT
    cache: Path | None = None

    def config(self, recipe: str) -> TrainConfig:
        """How a recipe trains."""
        return TrainConfig.demo(
            epochs=self.epochs, seed=self.seed, schedule=phases(recipe), select="both", threads=1
        )

    def identity(self, recipe: str, readout: str) -> dict[str, Any]:
        """The fields of the document that make two runs the same run."""
        config = dataclasses.asdict(self.config(recipe))
        settings = {name: config[name] for name in SETTINGS}
        return {
            "method": f"flow, {recipe}, {readout}",
            "start": "scratch",
            "manifest": self.manifest.name,
            "slices": {"size": [96, 96], "slices": self.slices},
            "fold": self.fold,
            "folds": self.folds,
            "fold_seed": self.fold_seed,
            "seed": self.seed,
            "budget": {"kind": "epochs", "amount": self.epochs},
            "settings": settings,
        }

    def document(self, recipe: str, readout: str) -> Path:
        """Where the document of a recipe and read-out lies."""
        name = f"flow-{recipe}-{readout}"
        return self.out / run_name(name, "", f"{self.epochs}epochs", self.fold, self.folds, self.seed)


def phases(recipe: str) -> tuple[Phase, ...]:
    """The schedule of a recipe: two phases, so that all recipes change at the same step."""
    first, last = RECIPES[recipe]
    end = HYBRID if last == "hybrid" else FIRST[last]
    return (
        Phase(first, share=1.0 - LAST, **FIRST[first]),  # type: ignore[arg-type]
        Phase(last, share=LAST, **end),  # type: ignore[arg-type]
    )


def run(wanted: FlowRun, recipes: Sequence[str]) -> list[Path]:
    """Train, test and write documents, except for what was done before."""
    done, paths = [], []
    for recipe in recipes:
        here = [(readout, wanted.document(recipe, readout)) for readout in READOUTS]
        paths += [path for _, path in here]
        done.append(all(check_finished(path, wanted.identity(recipe, readout)) for readout, path in here))
    if all(done):
        return paths
    records = labelled(list_records(wanted.manifest).records)
    preprocess = preprocess_like(records, (96, 96), wanted.slices)
    slices = cached_slices(records, preprocess, wanted.cache or wanted.out / "slices")
    sets = sets_of_fold(slices, records, wanted.kept_out, wanted.fold, wanted.folds, wanted.fold_seed)
    for recipe, finished in zip(recipes, done, strict=True):
        if not finished:
            _run_recipe(wanted, recipe, sets, slices.class_names)
    return paths


def _run_recipe(wanted: FlowRun, recipe: str, sets: Mapping[str, SliceSet], names: tuple[str, ...]) -> None:
    config = wanted.config(recipe)
    place = wanted.out / "flows" / f"fold{wanted.fold}-seed{wanted.seed}"
    folder = place / recipe.replace(" ", "_")
    trunk = place / f"{RECIPES[recipe][0]}-trunk"
    change = round(wanted.epochs * (1.0 - LAST))

    def epoch_done(record: EpochRecord) -> None:
        print(f"{recipe}: {_line(record)}", file=sys.stderr, flush=True)
        # The state of an epoch's end is on the disk when this is called.
        if record["epoch"] == change and not trunk.exists():
            shutil.copytree(folder, trunk.with_suffix(".part"))
            trunk.with_suffix(".part").rename(trunk)

    resumes = has_state(folder)
    changes = False
    if not resumes and has_state(trunk):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trunk, folder)
        resumes = changes = True
    torch.manual_seed(wanted.seed)
    model = MagicFlow(FlowConfig.demo(len(names), class_names=names))
    control = RunControl(resume=resumes, allow_changes=changes)
    cpu = time.process_time()
    history = train(
        model, sets["train"], sets["val"], config, folder, None, epoch_done, "cpu", control=control
    )
    cpu = time.process_time() - cpu
    model.eval()
    _write(wanted, recipe, model, sets, history, cpu)
    shutil.rmtree(folder)


def _line(record: Mapping[str, float]) -> str:
    names = ("epoch", "val_bits_per_dim", "val_balanced_accuracy", "val_nll", "seconds")
    return ", ".join(f"{name} {record[name]:.3f}" for name in names if name in record)


def _write(
    wanted: FlowRun,
    recipe: str,
    model: MagicFlow,
    sets: Mapping[str, SliceSet],
    history: Sequence[EpochRecord],
    cpu: float,
) -> None:
    start = time.perf_counter()
    scores = {name: _scores(model, data) for name, data in sets.items()}
    scoring = time.perf_counter() - start
    val, training = scores["val"], scores["train"]
    names = sets["train"].class_names
    temperature = fit_temperature(val.log_probs, val.labels)
    fit = fit_readout(val, training, names, wanted.slices, wanted.seed)
    total = sum(record["seconds"] for record in history)
    steps = max(1, len(sets["train"]) // wanted.config(recipe).batch_size)
    passes = mean_passes(phases(recipe), range(wanted.epochs * steps), wanted.epochs * steps, len(names))
    root = wanted.manifest.resolve().parent
    for readout in READOUTS:
        predictions = {}
        for name, each in scores.items():
            if readout == "gaussian":
                logits = fit.readout.discriminants(each.means)
                predictions[name] = posterior(logits, fit.readout.temperature)
            else:
                predictions[name] = posterior(each.log_probs, 1.0 if readout == "argmax" else temperature)
        documents = {
            name: _with_bits(set_document(sets[name], predictions[name], root), sets[name], each, model)
            for name, each in scores.items()
            if name != "train"
        }
        write_run(
            wanted.document(recipe, readout),
            {
                **wanted.identity(recipe, readout),
                "class_names": list(names),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "images": wanted.epochs * steps * wanted.config(recipe).batch_size,
                "passes": passes,
                "seconds": total,
                "cpu_seconds_of_this_process": cpu,
                "scoring_seconds": scoring,
                "threads": 1,
                "temperature": temperature if readout == "tempered" else None,
                "shrinkage": fit.readout.shrinkage if readout == "gaussian" else None,
                "history": list(history),
                "versions": versions(),
                "train_volumes": len(sets["train"].paths),
                "sets": documents,
            },
        )


def _scores(model: MagicFlow, data: SliceSet) -> VolumeScores:
    log_probs = volume_log_probs(score_slices(model, data.images), data.volumes)
    counts = np.bincount(data.volumes, minlength=len(data.paths))
    return VolumeScores(log_probs, counts, data.volume_labels, np.array(data.subjects))


def _with_bits(
    document: dict[str, Any], data: SliceSet, scores: VolumeScores, model: MagicFlow
) -> dict[str, Any]:
    own: NDArray[np.float64] = scores.means[np.arange(len(scores)), scores.labels]
    bits = bits_per_dim(torch.from_numpy(own), model.config.num_dims)
    document["metrics"]["bits_per_dim"] = float(bits.mean())
    return document


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the result is the exit code: 0 done, 2 wrong usage or input."""
    parser = argparse.ArgumentParser("bench.baselines.classification.flows", description="Train flows.")
    add = parser.add_argument
    add("manifest", type=Path)
    add("--out", type=Path, required=True)
    add("--fold", type=int, default=0)
    add("--folds", type=int, default=5)
    add("--fold-seed", type=int, default=0)
    add("--seed", type=int, default=0)
    add("--epochs", type=int, default=10)
    add("--slices", default="center")
    add("--kept-out", default=KEPT_OUT)
    add("--cache", type=Path)
    add("--recipes", nargs="+", choices=tuple(RECIPES), default=list(RECIPES), metavar="RECIPE")
    o = parser.parse_args(arguments)
    wanted = FlowRun(
        o.manifest, o.out, o.fold, o.folds, o.fold_seed, o.seed, o.epochs, o.slices, o.kept_out, o.cache
    )
    try:
        for path in run(wanted, o.recipes):
            print(path)
    except (FastflowError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
