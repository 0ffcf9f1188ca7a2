"""What commands share: results go to stdout, everything else to stderr; errors become one line and an exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from typer.core import TyperGroup

from fastflow.errors import FastflowError

OK, FAILED, USAGE = 0, 1, 2

results = Console()
messages = Console(stderr=True, soft_wrap=True)


def fail(message: str, code: int) -> NoReturn:
    """Print one red line and leave."""
    messages.print(f"[bold red]error:[/] {escape(message)}", highlight=False)
    raise typer.Exit(code)


def warn(message: str) -> None:
    """Print one yellow line."""
    messages.print(f"[yellow]warning:[/] {escape(message)}", highlight=False)


class Commands(TyperGroup):
    """Turns errors that a user can do something about into one line; `--debug` lets them through."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            typer.Exit: with 2 for bad input, with 1 for a run that failed.
        """
        try:
            return super().invoke(ctx)
        except (FastflowError, ValueError) as error:
            self._give_up(ctx, error, USAGE)
        except BrokenPipeError:
            # A closed pipe (`| head`) is typer's to handle, quietly.
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
