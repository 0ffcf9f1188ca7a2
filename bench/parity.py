"""Parity of exports at the size of the published images, with random weights and with trained ones.

``python -m bench.parity random OUT`` gives a preset random weights, exports it to OUT/export with all graphs,
compares it on slices of the heads that ship with the package and prints what `fastflow export` prints.
Generation conditioners at 184x184 pixels take ``--task generation --slices 2``, or hours.

``python -m bench.parity stretch demo/archive/manifest.csv OUT`` writes coronal slices of the demo's archive,
2 mm voxels, as PNG files of twice as many pixels: 182x182, as the published images. `fastflow train OUT
--preset paper` learns from them what a model of that size has when it is trained, and `fastflow export
--images OUT --split test` compares it on unseen subjects.

``python -m bench.parity rounded MODEL IMAGES`` computes what `score` of mixed precision does where the
results of convolutions are rounded to float16, as on GPUs: ONNX Runtime's CPU provider keeps them in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from fastflow.export.graphs import ScoreGraph, fold
from fastflow.export.onnx import export_onnx
from fastflow.export.verify import SLICES, anatomy_slices, compare, load_images
from PIL import Image
from scipy import ndimage

from bench.gpu.setting import CLASSES, randomize
from fastflow import FlowConfig, MagicFlow
from fastflow.archive.inputs import Inputs
from fastflow.cli.export import describe
from fastflow.data.manifest import SPLITS, read_manifest
from fastflow.data.preprocess import Preprocess, to_unit_range
from fastflow.data.slices import read_image
from fastflow.models.scoring import LabelScorer, score_slices

app = typer.Typer(add_completion=False)
# Training takes several slices of a scan, around the middle, other splits the middle one.
TAKEN = {"train": "center+-4:4"}


def save_random(folder: Path, preset: str, task: str) -> None:
    """Save a preset with random weights, initialised on slices of the shipped heads."""
    torch.manual_seed(0)
    model = MagicFlow(FlowConfig.preset(preset, CLASSES, task=task))
    randomize(model)
    x = torch.from_numpy(to_unit_range(anatomy_slices(model.config.input_shape, 8)))
    # A grain of noise keeps channels from being constant.
    model.initialize(x + 0.01 * torch.randn_like(x))
    model.eval().save(folder)


@app.command("random")
def random_weights(
    out: Path, preset: str = "paper", task: str = "classification", slices: int = SLICES
) -> None:
    """Compare an export of random weights with its model."""
    save_random(out / "model", preset, task)
    shape = MagicFlow.load(out / "model").config.input_shape
    done = export_onnx(out / "model", out / "export", images=anatomy_slices(shape, slices), overwrite=True)
    for name, size in done.sizes.items():
        typer.echo(f"{name}\t{size / 2**20:.2f} MiB")
    total, checkpoint = sum(done.sizes.values()) / 2**20, done.checkpoint_bytes / 2**20
    typer.echo(f"{total:.1f} MiB in all, the checkpoint has {checkpoint:.1f} MiB")
    assert done.parity is not None
    typer.echo(describe(done.parity))


@app.command()
def stretch(
    archive: Annotated[Path, typer.Argument(help="A manifest, as `fastflow demo-data` writes it.")],
    out: Path,
    factor: int = 2,
) -> None:
    """Write OUT/split/class/subject_i.png: slices of an archive, `factor` times as large a side."""
    for record in read_manifest(archive):
        if record.split not in SPLITS or record.label is None:
            continue
        # The size is that of the slices, so nothing is padded.
        folder = out / record.split / record.label
        folder.mkdir(parents=True, exist_ok=True)
        preprocess = Preprocess((91, 91), TAKEN.get(record.split, "center"))
        for i, (image,) in enumerate(read_image(record.path, preprocess).images):
            finer = ndimage.zoom(image.astype(np.float32), factor, order=3, mode="nearest", grid_mode=True)
            name = f"{Path(record.path).name.split('.')[0]}_{i}.png"
            Image.fromarray(np.rint(finer).clip(0, 255).astype(np.uint8)).save(folder / name)


@app.command()
def rounded(
    model: Path,
    images: Annotated[str, typer.Argument(help="A file, folder or manifest.")],
    split: str = "test",
    slices: int = SLICES,
) -> None:
    """Compare the module of the mixed score graph, run by PyTorch, with the model in float64."""
    flow = MagicFlow.load(model)
    preprocess = Preprocess.from_dict(flow.metadata["preprocess"])
    pictures = load_images([item.path for item in Inputs((images,), split)], preprocess, slices)
    graph = ScoreGraph(flow, fold(flow, "mixed"))
    with torch.no_grad():
        parts = [
            graph(torch.from_numpy(to_unit_range(pictures[i : i + 1]))).numpy() for i in range(len(pictures))
        ]
    want = score_slices(LabelScorer(MagicFlow.load(model).double().eval(), engine="eager"), pictures)
    errors = compare(np.concatenate(parts), want)
    typer.echo(
        f"{len(pictures)} slices: "
        + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in errors.items())
    )


if __name__ == "__main__":
    app()
