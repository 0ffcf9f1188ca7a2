"""`fastflow export` and `fastflow verify`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastflow.cli._console import FAILED, fail, stages, warn
from fastflow.cli._options import ModelFolder, NoLock, Precision

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastflow.export.verify import Parity

Images = Annotated[
    list[Path] | None,
    typer.Option(
        "--images", help="Scans to compare on: files, folders, manifests. By default the package's heads."
    ),
]
Split = Annotated[str | None, typer.Option(help="Take only this split of manifests.")]
Slices = Annotated[int, typer.Option("--slices", min=1, help="How many slices of --images to compare on.")]
Limit = Annotated[
    float | None,
    typer.Option(help="Largest error of a log-odds in nats; 0.02 by default, 0.1 with mixed precision."),
]


def export(
    model: Annotated[Path, typer.Argument(help="Model folder, as `train` writes it.")] = Path("model"),
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("deploy"),
    graphs: Annotated[str, typer.Option(help="Which graphs, of score, sample, latent, attribution.")] = (
        "score,sample,latent,attribution"
    ),
    precision: Annotated[
        Precision, typer.Option(help="mixed: conditioners in float16, for GPUs.")
    ] = Precision.float32,
    opset: Annotated[int, typer.Option(help="Version of ONNX' operators.")] = 21,
    prior: Annotated[
        str | None, typer.Option(help="Probabilities of the labels in the model's order, e.g. 0.5,0.3,0.2.")
    ] = None,
    triton_server: Annotated[
        Path | None, typer.Option(help="Write a model repository for NVIDIA Triton Inference Server as well.")
    ] = None,
    images: Images = None,
    split: Split = None,
    slices: Slices = 16,
    limit: Limit = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the graphs with the model first.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    no_lock: NoLock = False,
) -> None:
    """Export a model to ONNX: graphs, their weights, and a program that runs them without PyTorch.

    The graphs are compared with the model first; beyond the limit for log-odds, nothing is written.

    Exit codes: 0 exported; 2 wrong usage, bad input, or graphs that differ from the model.

    Example: `fastflow export model --out deploy`, then `python deploy/runtime.pyz scan.nii.gz`
    """
    from fastflow.archive.classify import parse_prior

    _need_onnx()
    from fastflow.export.onnx import check_place, export_onnx
    from fastflow.export.triton_server import check_repository, write_model_repository

    # A folder that cannot be written is reported before the graphs are traced.
    check_place(out, overwrite)
    if triton_server is not None:
        check_repository(triton_server, overwrite=overwrite)
    pictures = _load(model, images, split, slices)
    with stages() as notify:
        done = export_onnx(
            model,
            out,
            [name.strip() for name in graphs.split(",") if name.strip()],
            precision.value,
            opset,
            prior=parse_prior(prior),
            images=pictures,
            limit=limit,
            check=check,
            overwrite=overwrite,
            lock=not no_lock,
            progress=notify,
        )
    for name, size in done.sizes.items():
        typer.echo(f"{done.folder / name}\t{size / 2**20:.2f} MiB")
    total, checkpoint = sum(done.sizes.values()) / 2**20, done.checkpoint_bytes / 2**20
    typer.echo(f"{total:.1f} MiB in all, the checkpoint has {checkpoint:.1f} MiB")
    if done.parity is None:
        warn("the graphs were not compared with the model; `fastflow verify` does it")
    else:
        typer.echo(describe(done.parity))
    if triton_server is not None:
        written = write_model_repository(done.folder, triton_server, overwrite=overwrite, lock=not no_lock)
        typer.echo(written)


def verify(
    folder: Annotated[Path, typer.Argument(help="Export folder, as `export` writes it.")] = Path("deploy"),
    model: ModelFolder = Path("model"),
    images: Images = None,
    split: Split = None,
    slices: Slices = 16,
    limit: Limit = None,
    providers: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
) -> None:
    """Compare an export with its model: valid ONNX, all batch sizes, log-odds and decisions on real slices.

    Exit codes: 0 within the limits; 1 not; 2 wrong usage or bad input.

    Example: `fastflow verify deploy --model model --images archive/manifest.csv --split test`
    """
    _need_onnx()
    from fastflow.export.verify import verify as run

    pictures = _load(model, images, split, slices)
    with stages() as notify:
        parity = run(
            folder,
            model,
            pictures,
            limit=limit,
            providers=providers,
            progress=lambda done, total: notify("compare", done, total),
        )
    typer.echo(describe(parity))
    if not parity.passed:
        fail(f"{folder}: {parity.failure}", FAILED)


def describe(parity: Parity) -> str:
    """The comparison in a few lines."""
    gap = (
        f"smallest gap between two labels {parity.smallest_gap:.3g} nats, "
        if math.isfinite(parity.smallest_gap)
        else ""
    )
    lines = [
        f"compared with the model in float64 on {parity.images} slices ({parity.source}), "
        f"ONNX Runtime {parity.onnxruntime} on {parity.provider.removesuffix('ExecutionProvider')}; "
        f"{gap}limit {parity.limit:g}"
    ]
    for name, errors in {**parity.graphs, "PyTorch float32": parity.float32}.items():
        lines.append(
            f"  {name}\t" + ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in errors.items())
        )
    return "\n".join(lines)


def _load(model: Path, sources: list[Path] | None, split: str | None, count: int) -> NDArray[np.uint8] | None:
    """Slices of scans, spread over all scans; None where no scans are given."""
    if not sources:
        return None
    from fastflow.archive.classify import preprocess_of
    from fastflow.archive.inputs import Inputs
    from fastflow.export.verify import load_images
    from fastflow.models.magic_flow import MagicFlow

    paths = [item.path for item in Inputs(tuple(map(str, sources)), split)]
    return load_images(paths, preprocess_of(MagicFlow.load(model)), count, warn)


def _need_onnx() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        install = "pip install 'fastflow[export-cpu]', or 'fastflow[export]' for NVIDIA GPUs"
        fail(f"export needs {', '.join(missing)}: {install}", FAILED)
