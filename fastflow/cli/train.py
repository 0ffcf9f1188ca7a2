"""`fastflow train`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastflow.cli._console import FAILED, print_epoch, progress_bar, report_errors, warn
from fastflow.cli._options import Device, DeviceOption, NoLock, Seed, Workers, takes
from fastflow.errors import OtherProcessError

if TYPE_CHECKING:
    from fastflow.archive.training_data import UsableFiles


class Preset(StrEnum):
    """Layouts of `FlowConfig`."""

    demo = "demo"
    small = "small"
    paper = "paper"
    tiny = "tiny"


class Task(StrEnum):
    """The tasks that a conditioner can be made for."""

    classification = "classification"
    generation = "generation"


class Objective(StrEnum):
    """The objectives of training."""

    likelihood = "likelihood"
    pairwise = "pairwise"
    hybrid = "hybrid"


class Augment(StrEnum):
    """The augmentations of training images."""

    paper = "paper"
    shift = "shift"
    none = "none"


class Engine(StrEnum):
    """How training steps run."""

    auto = "auto"
    eager = "eager"
    cuda_graph = "cuda_graph"


class Precision(StrEnum):
    """The precisions of training."""

    float32 = "32-true"
    tf32 = "tf32"
    bfloat16 = "bf16-mixed"
    float64 = "64-true"


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Arguments and options of the command."""

    manifest: Annotated[
        Path, typer.Argument(help="A .csv or .jsonl manifest with splits, or a folder of split/class/file.")
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="Model folder to write.")] = Path("model")
    label: Annotated[
        str | None, typer.Option(help="The column of the manifest that holds the class; label by default.")
    ] = None
    preset: Annotated[Preset, typer.Option(help="Size of the model.")] = Preset.demo
    task: Annotated[Task, typer.Option(help="What the model is for.")] = Task.classification
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training slices.")] = None
    batch_size: Annotated[int | None, typer.Option(min=1, help="Slices per step, over all devices.")] = None
    accumulate: Annotated[
        int, typer.Option(min=1, help="Micro-batches of a step, one after the other: less memory.")
    ] = 1
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None
    warmup: Annotated[float | None, typer.Option(min=0.0, help="Epochs of linear warm-up.")] = None
    objective: Annotated[
        Objective | None, typer.Option(help="What to minimise; all but likelihood ask for more passes.")
    ] = None
    augment: Annotated[Augment | None, typer.Option(help="How training images are varied.")] = None
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Add uniform noise of one grey level in training.")
    ] = False
    reversible: Annotated[
        bool,
        typer.Option(
            "--reversible", help="Rebuild activations instead of keeping them: less memory, more time."
        ),
    ] = False
    condition_from_step: Annotated[
        int,
        typer.Option(
            min=0,
            help="Steps at the beginning that ignore the label: scoring computes them once for all labels.",
        ),
    ] = 0
    engine: Annotated[
        Engine,
        typer.Option(help="How steps run; auto takes a CUDA graph on a GPU, and eager steps elsewhere."),
    ] = Engine.auto
    precision: Annotated[
        Precision,
        typer.Option(help="32-true uses no TF32; tf32 allows it in convolutions and matrix products."),
    ] = Precision.float32
    slices: Annotated[
        str, typer.Option(help="Slices of a volume: center, center+-N, center+-N:S or i,j,k.")
    ] = "center"
    mask: Annotated[
        Path | None, typer.Option(help="PNG of the application mask; the shipped one by default.")
    ] = None
    seed: Seed = 0
    workers: Workers = 1
    device: DeviceOption = Device.auto
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, help="Devices of this machine, with a process for each; torchrun's where it started this."
        ),
    ] = None
    num_nodes: Annotated[int, typer.Option(min=1, help="Machines, each of which runs this command.")] = 1
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a model or an unfinished training in the folder; an earlier model stays until the "
            "new one is finished.",
        ),
    ] = False
    no_lock: NoLock = False


@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a model on the split `train` of an archive; `val` chooses the epoch and calibrates the posterior.

    Options that are not given follow the preset's recipe: that of `fastflow demo` for the demo preset, else
    the published one. The grid of most training volumes becomes the model's. Files that cannot be used are
    named and left out (exit code 1 at the end); a class or split without any stops before the first epoch.
    History and checkpoints lie in `unfinished/` inside the model folder until training has ended.

    Example: `fastflow train archive/manifest.csv --out model --preset small --epochs 30 --slices center+-6:3`
    """
    from fastflow.archive.train import recipe, train_on_archive
    from fastflow.data.listing import list_records

    given = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.lr,
        "warmup_epochs": options.warmup,
        "objective": options.objective and options.objective.value,
        "augment": options.augment and options.augment.value,
    }
    config = recipe(
        options.preset.value,
        options.task.value,
        seed=options.seed,
        engine=options.engine.value,
        precision=options.precision.value,
        accumulate=options.accumulate,
        devices=options.devices,
        num_nodes=options.num_nodes,
        **{name: value for name, value in given.items() if value is not None},
    )
    changes: dict[str, Any] = {
        "task": options.task.value,
        "reversible": options.reversible,
        "condition_from_step": options.condition_from_step,
    }
    changes |= {"dequantize": "uniform"} if options.dequantize else {}
    with progress_bar("reading volumes") as reading, said_once():
        trained = train_on_archive(
            list_records(options.manifest, options.label),
            options.out,
            options.preset.value,
            options.slices,
            config,
            changes,
            str(options.mask) if options.mask else None,
            options.workers,
            options.device.value,
            reading,
            print_epoch,
            _print_usable,
            options.overwrite,
            lock=not options.no_lock,
        )
    if not trained.is_first:
        return
    last = trained.history[-1]
    typer.echo(
        f"{options.out}: {len(trained.history)} epochs, "
        + ", ".join(f"{k} {v:.4g}" for k, v in last.items() if "_" in k)
    )
    report_errors(trained.errors)


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """A block in which the message of another process of the training ends this one without a second word.

    The first process, which talks to the user, is the one that prints it.

    Raises:
        typer.Exit: another process failed, and this one is not the first.
    """
    try:
        yield
    except OtherProcessError as error:
        if error.is_first:
            raise
        raise typer.Exit(FAILED) from error


def _print_usable(usable: UsableFiles) -> None:
    for line in usable.lines():
        typer.echo(line)
    for line in usable.warnings():
        warn(line)
