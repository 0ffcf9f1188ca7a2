"""`fastflow train`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastflow.cli._console import FAILED, messages, print_epoch, report_errors, warn
from fastflow.cli._options import Device, DeviceOption, NoLock, Seed, Workers, takes
from fastflow.cli._training_progress import training_bar
from fastflow.errors import OtherProcessError

if TYPE_CHECKING:
    from fastflow.archive.training_data import UsableFiles
    from fastflow.data.slice_cache import SliceCache
    from fastflow.training.config import TrainConfig
    from fastflow.training.phases import Phase


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


class Select(StrEnum):
    """The rules that choose the epoch."""

    accuracy = "accuracy"
    loss = "loss"
    both = "both"


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
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Objectives in turn, each with its share of the steps and what else it needs: "
            "likelihood:0.8,hybrid:0.2:weight=0.1:temperature=10:rivals=3:ramp=0.25"
        ),
    ] = None
    select: Annotated[
        Select | None,
        typer.Option(
            help="What chooses the epoch on the split val: accuracy, bits/dim (loss), or accuracy among "
            "those with nearly the best bits/dim (both)."
        ),
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
    calibration_volumes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Training volumes of each class that are scored for the read-out; 0 fits it to val alone.",
        ),
    ] = 60
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
    cache: Annotated[
        Path | None,
        typer.Option(
            help="Folder of decoded slices for later trainings, too; .fastflow-cache beside the model "
            "folder by default. It can be removed at any time."
        ),
    ] = None
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Decode all files, and keep their slices in memory.")
    ] = False
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a model or an unfinished training in the folder; an earlier model stays until the "
            "new one is finished.",
        ),
    ] = False
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the unfinished training in the folder; all other options as it was begun with.",
        ),
    ] = False
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="With --resume: --epochs, --lr, --warmup, --objective and such may be others now.",
        ),
    ] = False
    save_seconds: Annotated[
        float, typer.Option(min=0.0, help="Seconds between two states that --resume can go on from.")
    ] = 300.0
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Write event files too; needs pip install 'fastflow[tensorboard]'."
        ),
    ] = False
    no_lock: NoLock = False


@takes(TrainOptions)
def train(options: TrainOptions) -> None:
    """Train a model on the split `train` of an archive; `val` chooses the epoch and calibrates the posterior.

    Options that are not given follow the preset's recipe: that of `fastflow demo` for the demo preset, else
    the published one. The grid of most training volumes becomes the model's. Files that cannot be used are
    named and left out (exit code 1 at the end); a class or split without any stops before the first epoch.
    History and checkpoints lie in `unfinished/` inside the model folder until training has ended, and so does
    the state that `--resume` goes on from: it is saved at the end of each epoch, every few minutes, and at
    Ctrl-C (exit code 130; 143 after SIGTERM). A second Ctrl-C stops at once.

    Example: `fastflow train archive/manifest.csv --out model --preset small --epochs 30 --slices center+-6:3`
    """
    from fastflow.archive.calibrate import calibration_lines
    from fastflow.archive.train import train_on_archive
    from fastflow.archive.training_data import Reading
    from fastflow.data.listing import list_records

    config = config_of(options)
    with training_bar() as bar, said_once():
        trained = train_on_archive(
            list_records(options.manifest, options.label),
            options.out,
            options.preset.value,
            options.slices,
            config_of(options),
            flow_changes_of(options),
            str(options.mask) if options.mask else None,
            options.workers,
            options.device.value,
            resume=options.resume,
            allow_changes=options.allow_changes,
            save_seconds=options.save_seconds,
            tensorboard=options.tensorboard,
            overwrite=options.overwrite,
            lock=not options.no_lock,
            reading=Reading(bar.reading, cache_of(options)),
            counted=partial(_print_usable, config.phases),
            progress=print_epoch,
            on_step=bar.step,
        )
    if not trained.is_first:
        return
    last = trained.history[-1]
    typer.echo(
        f"{options.out}: {len(trained.history)} epochs, "
        + ", ".join(f"{k} {v:.4g}" for k, v in last.items() if "_" in k)
    )
    for line in calibration_lines(trained.model.metadata):
        typer.echo(line)
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


def config_of(options: TrainOptions) -> TrainConfig:
    """How to train: the recipe of the preset, with the options that were given."""
    from fastflow.archive.train import recipe
    from fastflow.training.phases import parse_schedule

    if options.schedule is not None and options.objective is not None:
        raise ValueError(
            f"--schedule and --objective {options.objective.value} exclude each other: name the objective in "
            "the schedule"
        )
    given = {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.lr,
        "warmup_epochs": options.warmup,
        "objective": options.objective and options.objective.value,
        "schedule": options.schedule and parse_schedule(options.schedule),
        "select": options.select and options.select.value,
        "augment": options.augment and options.augment.value,
    }
    return recipe(
        options.preset.value,
        options.task.value,
        seed=options.seed,
        engine=options.engine.value,
        precision=options.precision.value,
        calibration_volumes=options.calibration_volumes,
        accumulate=options.accumulate,
        devices=options.devices,
        num_nodes=options.num_nodes,
        **{name: value for name, value in given.items() if value is not None},
    )


def flow_changes_of(options: TrainOptions) -> dict[str, Any]:
    """The fields of the preset's `FlowConfig` that the options replace."""
    changes: dict[str, Any] = {
        "task": options.task.value,
        "reversible": options.reversible,
        "condition_from_step": options.condition_from_step,
    }
    return changes | ({"dequantize": "uniform"} if options.dequantize else {})


def cache_of(options: TrainOptions) -> SliceCache | None:
    """The cache that the options name. Raises ValueError where they contradict each other."""
    from fastflow.data.slice_cache import DEFAULT_NAME, SliceCache

    if options.no_cache:
        if options.cache is not None:
            raise ValueError(f"--cache {options.cache} and --no-cache exclude each other: give one of them")
        return None
    beside = Path(os.path.abspath(options.out)).parent / DEFAULT_NAME
    return SliceCache(options.cache or beside, required=options.cache is not None)


def _print_usable(phases: Sequence[Phase], usable: UsableFiles) -> None:
    from fastflow.training.phases import describe

    if usable.reused is not None:
        messages.print(f"{usable.reused[0]} of {usable.reused[1]} files from the cache", highlight=False)
    for line in usable.lines():
        typer.echo(line)
    typer.echo(describe(phases, len(usable.splits["train"])))
    for line in usable.warnings():
        warn(line)
