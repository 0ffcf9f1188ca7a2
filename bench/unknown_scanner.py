"""Is a scanner noticed that the model was not trained on? On simulated scanners on real anatomy.

``python -m bench.unknown_scanner ARCHIVE OUT`` takes the demo archive in ARCHIVE (built there where it is
missing), and for each of its scanners trains a flow on the volumes of all others into OUT/NAME; a model that
is there already is taken. OUT/unknown_scanner.csv then has, for the score of `fastflow.novelty` and for its
two halves alone:

- AUROC of the held-out scanner's volumes against the test volumes of known scanners, on known heads (split
  ``test``) and on the unseen head;
- the false alarm of a head: AUROC of known scanners on the unseen head against known heads, .5 is ideal;
- shares of volumes with p < 0.05: of known scanners on known heads and on the unseen head, and of the
  held-out scanner on known heads.

Nothing is chosen on the splits that are reported. Seven models of three epochs take about 15 minutes on an
idle core, and their scores another 7.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from bench.files import write_csv
from fastflow import FlowConfig, MagicFlow
from fastflow.archive.scanners import held_out_volumes, labelled_features
from fastflow.data.demo import SCANNERS, build_archive
from fastflow.data.grain import GRAIN_NUMBERS
from fastflow.data.manifest import read_manifest
from fastflow.data.preprocess import Preprocess
from fastflow.data.slices import SliceSet, load_slices
from fastflow.novelty import HeldOutVolumes, KnownScanners
from fastflow.training.config import TrainConfig
from fastflow.training.trainer import train

NAMES = tuple(scanner.name for scanner in SCANNERS)
SPLITS = ("train", "val", "test", "unseen_head")
RESULT, LIMIT = "unknown_scanner.csv", 0.05
# The demo's slices of a volume.
SLICES = "center+-4:2"

Array = NDArray[np.float64]
Sets = dict[str, SliceSet]


def load_sets(archive: Path) -> Sets:
    """The slices of the demo archive by split."""
    if not (archive / "manifest.csv").is_file():
        build_archive(archive)
    records = read_manifest(archive / "manifest.csv")
    preprocess = Preprocess(FlowConfig.demo(len(NAMES)).input_shape[1:], SLICES, spacing=(2.0, 2.0, 2.0))
    slices, errors = load_slices(records, preprocess, NAMES, workers=2)
    if errors:
        raise errors[0]
    return {
        split: slices.subset([i for i, record in enumerate(records) if record.split == split])
        for split in SPLITS
    }


def of_scanners(data: SliceSet, names: Sequence[str]) -> SliceSet:
    """The volumes of some scanners, which become the classes."""
    wanted = [NAMES.index(name) for name in names]
    part = data.subset(np.flatnonzero(np.isin(data.volume_labels, wanted)).tolist())
    labels = np.array([wanted.index(label) for label in part.labels], dtype=np.int64)
    return SliceSet(part.images, labels, part.volumes, part.paths, part.subjects, tuple(names))


def model_without(held_out: str, known: Sets, folder: Path, epochs: int, seed: int) -> MagicFlow:
    """The flow of the known scanners, trained where the folder has none of as many epochs."""
    if (folder / "config.json").is_file():
        model = MagicFlow.load(folder)
        found = model.metadata["training"]
        if (found["epochs"], found["seed"]) == (epochs, seed):
            return model
    print(f"training without {held_out}", flush=True)
    torch.manual_seed(seed)
    names = known["train"].class_names
    model = MagicFlow(FlowConfig.demo(len(names), class_names=names))
    recipe = TrainConfig.demo(seed=seed, epochs=epochs)
    train(model, known["train"], known["val"], recipe, folder, device="cpu", progress=print)
    return model


def auroc(higher: Array, lower: Array) -> float:
    """The probability that a value of the first is larger than one of the second."""
    pairs = higher[:, None] - lower[None]
    return float((pairs > 0).mean() + 0.5 * (pairs == 0).mean())


def part_of(volumes: HeldOutVolumes, columns: slice) -> HeldOutVolumes:
    """The volumes with some of their features."""
    return HeldOutVolumes(volumes.features[..., columns], volumes.labels, volumes.predicted, volumes.subjects)


def scores_of(known: KnownScanners, volumes: HeldOutVolumes) -> tuple[Array, float]:
    """Scores of volumes under their predicted labels, and the share that is below the limit."""
    features = volumes.under(volumes.predicted)
    each = [known.score(one, int(label)) for one, label in zip(features, volumes.predicted, strict=True)]
    return np.array(each), float(np.mean([known.p_value(score) < LIMIT for score in each]))


def evaluate(model: MagicFlow, known: Sets, other: Sets, held_out: str) -> list[dict[str, object]]:
    """A row for each score."""
    features, labels = labelled_features(model, known["train"])
    sets = {split: held_out_volumes(model, known[split]) for split in SPLITS[1:]}
    unknown = {split: held_out_volumes(model, other[split]) for split in ("test", "unseen_head")}
    latent, rows = features.shape[1] - len(GRAIN_NUMBERS), []
    for name, columns in (
        ("correlations and grain", slice(None)),
        ("correlations", slice(latent)),
        ("grain", slice(latent, None)),
    ):
        fit = KnownScanners.fit(features[:, columns], labels, part_of(sets["val"], columns), SLICES)
        assert fit is not None
        test, flagged = scores_of(fit, part_of(sets["test"], columns))
        head, flagged_head = scores_of(fit, part_of(sets["unseen_head"], columns))
        new, noticed = scores_of(fit, part_of(unknown["test"], columns))
        new_head, _ = scores_of(fit, part_of(unknown["unseen_head"], columns))
        numbers = {
            "known_heads": auroc(new, test),
            "unseen_head": auroc(new_head, head),
            "head_false_alarm": auroc(head, test),
            "flagged_known": flagged,
            "flagged_known_unseen_head": flagged_head,
            "flagged_unknown": noticed,
            "accuracy": float((sets["test"].labels == sets["test"].predicted).mean()),
        }
        counts = {"known_volumes": len(test), "unknown_volumes": len(new)}
        rows.append({"held_out": held_out, "score": name, **numbers, **counts})
    return rows


def with_means(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    """The rows, and for each score their mean over the scanners."""
    means: list[dict[str, object]] = []
    for score in dict.fromkeys(row["score"] for row in rows):
        mine = [row for row in rows if row["score"] == score]
        numbers = [name for name, value in mine[0].items() if isinstance(value, float)]
        mean = {name: float(np.mean([float(str(row[name])) for row in mine])) for name in numbers}
        means.append({**dict.fromkeys(mine[0]), "held_out": "mean", "score": score, **mean})
    return rows + means


def table(rows: list[dict[str, object]]) -> str:
    """The rows as CSV, numbers with three digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.3f}" if isinstance(v, float) else v for k, v in row.items()})
    return text.getvalue()


def main(
    archive: Path,
    out: Path,
    epochs: Annotated[int, typer.Option(help="Of each of the seven models.")] = 3,
    seed: int = 0,
) -> None:
    """Hold out each scanner in turn."""
    torch.set_num_threads(1)
    sets, rows = load_sets(archive), []
    for held_out in NAMES:
        names = [name for name in NAMES if name != held_out]
        known = {split: of_scanners(data, names) for split, data in sets.items()}
        other = {split: of_scanners(data, [held_out]) for split, data in sets.items()}
        model = model_without(held_out, known, out / held_out, epochs, seed)
        rows += evaluate(model, known, other, held_out)
        print(table(rows[-3:]), flush=True)
    header, *lines = csv.reader(io.StringIO(table(with_means(rows))))
    write_csv(out / RESULT, header, lines)


if __name__ == "__main__":
    typer.run(main)
