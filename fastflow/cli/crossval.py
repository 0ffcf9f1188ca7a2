"""`fastflow crossval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fastflow.cli._console import print_epoch, report_errors, stages, warn
from fastflow.cli._options import takes
from fastflow.cli.train import TrainOptions, cache_of, config_of, flow_changes_of


@dataclasses.dataclass(frozen=True)
class CrossvalCommand(TrainOptions):
    """The arguments and options of `fastflow crossval`: those of a training, and how many there are."""

    manifest: Annotated[
        Path, typer.Argument(help="A manifest with labels, a folder of class/file or a BIDS dataset.")
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the models and figures.")] = Path(
        "crossval"
    )
    folds: Annotated[
        int, typer.Option(min=3, help="How many; one tests, one validates, the others train.")
    ] = 5
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds of the trainings, e.g. 0,1,2: each fold is trained with each; --seed by default."
        ),
    ] = None
    keep_out: Annotated[
        list[str] | None,
        typer.Option(
            help="A split that is in no fold; every model is evaluated on it, apart. May be repeated."
        ),
    ] = None
    no_baselines: Annotated[
        bool, typer.Option("--no-baselines", help="Fit no baselines beside the models.")
    ] = False
    resamples: Annotated[int, typer.Option(min=1, help="Resamples of each evaluation's intervals.")] = 1000
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the cross-validation in --out; finished folds are kept."),
    ] = False
    # A plan has one setting for all of its folds.
    allow_changes: Annotated[bool, typer.Option("--allow-changes", hidden=True)] = False
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the cross-validation in --out, its models too.")
    ] = False


@takes(CrossvalCommand)
def crossval(options: CrossvalCommand) -> None:
    """Train and evaluate a model for each fold of an archive, stratified by class and grouped by subject.

    Takes the options of `fastflow train`; splits of the manifest are replaced, except those of --keep-out.
    Each fold is a model folder, fold-0 and so on. Writes crossval.json, crossval.csv and report.html with
    mean and deviation over the folds.

    Exit codes: 0 done; 1 some files could not be used, or the run failed (--resume goes on); 2 wrong usage or
    bad input.

    Example: `fastflow crossval manifest.csv --out crossval --preset small --keep-out unseen_head`
    """
    from fastflow.archive.crossval import CrossvalOptions, FoldTraining, cross_validate
    from fastflow.data.listing import list_records

    if options.allow_changes:
        raise ValueError("--allow-changes is of `fastflow train`: all folds are trained alike")
    training = FoldTraining(
        options.preset.value,
        options.slices,
        config_of(options),
        flow_changes_of(options),
        str(options.mask) if options.mask else None,
    )
    with stages() as notify:
        done = cross_validate(
            list_records(options.manifest, options.label),
            options.out,
            training,
            CrossvalOptions(
                folds=options.folds,
                seed=options.seed,
                seeds=_numbers(options.seeds),
                keep_out=tuple(options.keep_out or ()),
                baselines=not options.no_baselines,
                resamples=options.resamples,
                workers=options.workers,
                device=options.device.value,
                resume=options.resume,
                overwrite=options.overwrite,
                lock=not options.no_lock,
                cache=cache_of(options),
                save_seconds=options.save_seconds,
                tensorboard=options.tensorboard,
                progress=lambda what, count, total: notify(what, count, total or count),
                on_epoch=print_epoch,
            ),
        )
    for name, one in done.document["sets"].items():
        typer.echo(f"{name}: {sum(one['volumes'])} volumes, {len(done.document['runs'])} models")
        for decision, each in one["decisions"].items():
            balanced, accuracy = (each["figures"][key] for key in ("balanced_accuracy", "accuracy"))
            typer.echo(f"  {decision}: balanced accuracy {_shown(balanced)}, accuracy {_shown(accuracy)}")
    for line in done.document["warnings"][:20]:
        warn(line)
    typer.echo(f"{options.out}: crossval.json, crossval.csv, report.html")
    report_errors(done.errors)


def _shown(figure: dict[str, float]) -> str:
    return f"{figure['mean']:.3f} +- {figure['deviation']:.3f}"


def _numbers(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"seeds must be whole numbers separated by commas, got {text!r}") from None
