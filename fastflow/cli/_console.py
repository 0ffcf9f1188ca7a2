"""Output and errors of all commands.

Results go to stdout, everything else to stderr; errors become one line and an exit code.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from typer.core import TyperGroup

from fastflow.errors import (
    CacheWarning,
    FastflowError,
    JournalError,
    LowSpaceWarning,
    RunStoppedError,
    TrainingInterrupted,
)

# Commands that go on, with --resume, where they were interrupted.
RESUMABLE = ("classify", "evaluate", "crossval")
OK, FAILED, USAGE, FINISHED_WITH_ERRORS, INTERRUPTED = 0, 1, 2, 3, 130
# A process that a signal stopped ends with the signal's number and this.
SIGNAL_OFFSET = 128
# So many seconds pass between two lines about a run's progress where there is no terminal.
PROGRESS_INTERVAL = 30.0

results = Console()
messages = Console(stderr=True, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one red line and leave."""
    messages.print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print one yellow line."""
    messages.print(f"[yellow]warning:[/] {escape(message)}", highlight=False)


def _show(other: Callable[..., None]) -> Callable[..., None]:
    """Warnings about a user's disk are for the user, and name no line of code; others are shown as before."""

    def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
        if issubclass(category, (LowSpaceWarning, CacheWarning)):
            warn(str(message))
        else:
            other(message, category, *place)

    return show


class Commands(TyperGroup):
    """Turns errors that a user can do something about into one line; `--debug` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with 2 for bad input, with 1 for a run that failed, with 130 or 143 for one that a
                signal stopped.
        """
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show(warnings.showwarning)
                return super().invoke(ctx)
        except TrainingInterrupted as stop:
            fail(str(stop), SIGNAL_OFFSET + stop.signum)
        except KeyboardInterrupt:
            fail(
                "interrupted" + ("; --resume goes on" if ctx.invoked_subcommand in RESUMABLE else ""),
                INTERRUPTED,
            )
        except (RunStoppedError, JournalError) as error:
            self._give_up(ctx, error, FAILED)
        except (FastflowError, ValueError) as error:
            self._give_up(ctx, error, USAGE)
        except BrokenPipeError:
            # Typer handles a closed pipe (`| head`) quietly.
            raise
        except (FloatingPointError, OSError, MemoryError) as error:
            self._give_up(ctx, error, FAILED)

    def _give_up(self, ctx: Any, error: BaseException, code: int) -> NoReturn:
        if ctx.params.get("debug"):
            raise error
        fail(str(error) or type(error).__name__, code)


@contextmanager
def stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for each stage of a run; yields a function of (stage, done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as bar:

        def notify(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
                if not messages.is_terminal:
                    messages.print(f"{stage} ...", highlight=False)
            bar.update(tasks[stage], completed=done, total=total)

        yield notify


@contextmanager
def progress_bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr; yields a function of (done, total)."""
    with stages() as notify:
        yield partial(notify, description)


@contextmanager
def run_progress(description: str) -> Iterator[Callable[[int, int | None, int], None]]:
    """Progress of a run over an archive on stderr, with rate and time left.

    It is a bar on a terminal, and a line every 30 s elsewhere.

    Yields a function of (done, total or None, errors).
    """
    columns = (
        *(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
        ),
        *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
    )
    start = last = time.monotonic()
    first: int | None = None
    with Progress(*columns, console=messages, disable=not messages.is_terminal) as bar:
        task = bar.add_task(description, total=None, rate="")

        def notify(done: int, total: int | None, errors: int) -> None:
            nonlocal last, first
            now = time.monotonic()
            # The results of an earlier run come at once and say nothing about the rate.
            first = done - 1 if first is None else first
            rate = (done - first) / max(now - start, 1e-9)
            failed = f", {errors} failed" if errors else ""
            bar.update(task, completed=done, total=total, rate=f"{rate:.3g}/s{failed}")
            if not messages.is_terminal and now - last >= PROGRESS_INTERVAL:
                last = now
                left = (
                    "" if total is None else f", about {timedelta(seconds=round((total - done) / rate))} left"
                )
                of = "" if total is None else f" of {total}"
                messages.print(f"{description}: {done}{of}, {rate:.3g}/s{failed}{left}", highlight=False)

        yield notify


def print_epoch(record: Mapping[str, float]) -> None:
    """A line about an epoch of training."""
    values = ", ".join(f"{key} {value:.4g}" for key, value in record.items() if key != "epoch")
    messages.print(f"epoch {record['epoch']:.0f}: {values}", highlight=False)


def report_errors(errors: Sequence[Exception]) -> None:
    """Name the files that could not be used and leave with code 1, if there are any."""
    for error in errors[:20]:
        warn(str(error))
    if len(errors) > 20:
        warn(f"and {len(errors) - 20} more")
    if errors:
        raise typer.Exit(FAILED)
