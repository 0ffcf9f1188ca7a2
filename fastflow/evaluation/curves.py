"""The curves of several trainings in one picture, and in one self-contained page. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import LineStyleType
from numpy.typing import NDArray

from fastflow._files import write_bytes, write_text
from fastflow.errors import OutputFolderError
from fastflow.evaluation.figures import INK, LINES, PALE, data_url, light_axes, png, scale_to_later
from fastflow.evaluation.run_logs import RunLog, differing_settings

# A curve of steps has at most so many points, each the mean of its part.
MAX_POINTS = 120
# Curves of one panel: the number of a record, and how its line is drawn.
_BITS: Mapping[str, LineStyleType] = {"val_bits_per_dim": "-", "train_bits_per_dim": ":"}
_ACCURACY: Mapping[str, LineStyleType] = {"val_balanced_accuracy": "-", "val_accuracy": "--"}
_WORDS = {
    "val_bits_per_dim": "validation",
    "train_bits_per_dim": "training",
    "val_balanced_accuracy": "balanced",
    "val_accuracy": "plain",
}
_DASHES: tuple[LineStyleType, ...] = ("-", "--", "-.", ":")
Points = tuple[NDArray[np.float64], NDArray[np.float64]]


def write_curves(
    path: str | PathLike[str],
    runs: Sequence[RunLog],
    picture: str | PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the page, which needs no other file, atomically.

    Args:
        path: the HTML file.
        runs: of `read_runs`.
        picture: a PNG file of the curves alone; none when None.
        overwrite: replace files that are there.

    Raises:
        OutputFolderError: a file is there and is not to be replaced, or is a folder.
        ValueError: there are no runs.
        OSError: a file cannot be written.
    """
    for file in [path, *([] if picture is None else [picture])]:
        if os.path.isdir(file):
            raise OutputFolderError(f"{os.fspath(file)}: is a folder; name a file")
        if os.path.lexists(file) and not overwrite:
            raise OutputFolderError(
                f"{os.fspath(file)}: there is such a file; replace it (--overwrite) or name another"
            )
    figure = curves_of_runs(runs)
    environment = Environment(
        loader=PackageLoader("fastflow.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    html = environment.get_template("curves.html").render(
        runs=[_row(run) for run in runs],
        has_balanced=any("val_balanced_accuracy" in record for run in runs for record in run.history),
        settings=differing_settings(runs),
        warnings=[line for run in runs for line in run.warnings],
        curves=data_url(figure),
    )
    write_text(path, html)
    if picture is not None:
        write_bytes(picture, png(figure))


def _row(run: RunLog) -> dict[str, Any]:
    """The numbers of a run in the table of the page, as text; the best ones with their epochs."""

    def best(key: str, highest: bool, digits: int) -> tuple[str, str]:
        found = run.best(key, highest)
        return ("–", "") if found is None else (f"{found[0]:.{digits}f}", f"epoch {found[1]}")  # noqa: RUF001

    seconds = sum(record.get("seconds", 0.0) for record in run.history)
    skipped = sum(record.get("skipped_steps", 0.0) for record in run.history)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "epochs": str(len(run.history)),
        "kept": "unfinished" if run.kept_epoch is None else str(run.kept_epoch),
        "val_bits": best("val_bits_per_dim", False, 4),
        "train_bits": best("train_bits_per_dim", False, 4),
        "accuracy": best("val_accuracy", True, 3),
        "balanced": best("val_balanced_accuracy", True, 3),
        "minutes": f"{seconds / 60:.1f}",
        "skipped": f"{skipped:.0f}",
    }


# -- the picture ---------------------------------------------------------------------------------------------


def curves_of_runs(runs: Sequence[RunLog]) -> Figure:
    """Bits/dim, accuracy, learning rate and seconds over epochs, and bits/dim over steps where known.

    A run has one colour in all panels; more runs than colours differ by their dashes in the legend as well.

    Raises:
        ValueError: there are no runs.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    keys = {key for run in runs for record in run.history for key in record}
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    for title, lines in (("bits/dim (lower is better)", _BITS), ("validation accuracy", _ACCURACY)):
        present = {key: style for key, style in lines.items() if key in keys}
        if present:
            panels.append((title, _drawer(runs, present)))
    if any(run.steps is not None for run in runs):
        panels.append(("bits/dim over steps (training)", lambda axes: _draw_steps(axes, runs)))
    panels += [
        (title, _drawer(runs, {key: "-"}))
        for key, title in (("learning_rate", "learning rate"), ("seconds", "seconds of each epoch"))
        if key in keys
    ]
    rows, columns, is_odd = -(-len(panels) // 2), _columns(runs), len(panels) % 2 == 1
    legend = 0.0 if is_odd else 0.3 + 0.22 * -(-len(runs) // columns)
    figure = Figure(figsize=(10.0, 3.2 * rows + legend))
    figure.set_layout_engine("constrained", h_pad=0.1)
    grid = figure.subplots(rows, 2, squeeze=False)
    for axes, (title, draw) in zip(grid.flat, panels, strict=False):
        draw(axes)
        _finish(axes, title)
    handles = [
        Line2D([], [], color=_colour(i), linestyle=_dash(i), linewidth=1.8, label=run.name)
        for i, run in enumerate(runs)
    ]
    words = {"handles": handles, "frameon": False, "labelcolor": INK}
    if is_odd:
        # The place that is left takes the names, in small letters where they are many.
        grid[-1, -1].axis("off")
        grid[-1, -1].legend(loc="upper left", fontsize=9 if len(runs) < 12 else 6, **words)
    else:
        figure.legend(loc="outside lower center", ncols=columns, fontsize=8, **words)
    return figure


def _columns(runs: Sequence[RunLog]) -> int:
    """Columns of the legend, so that the longest name fits."""
    return max(1, min(len(runs), 130 // (max(len(run.name) for run in runs) + 8)))


def _colour(index: int) -> str:
    return LINES[index % len(LINES)]


def _dash(index: int) -> LineStyleType:
    return _DASHES[index // len(LINES) % len(_DASHES)]


def _drawer(runs: Sequence[RunLog], lines: Mapping[str, LineStyleType]) -> Callable[[Axes], None]:
    """Draws some numbers of all runs over the epochs."""

    def draw(axes: Axes) -> None:
        series = []
        for i, run in enumerate(runs):
            for key, style in lines.items():
                points = _points(run, key)
                if points is None:
                    continue
                series.append(points[1])
                # A single epoch would be no line.
                axes.plot(
                    *points,
                    color=_colour(i),
                    linestyle=style if len(lines) > 1 else _dash(i),
                    linewidth=1.6,
                    marker="o",
                    markersize=2.5 if len(points[0]) < 40 and style != ":" else 0.0,
                )
        if "learning_rate" not in lines:
            scale_to_later(axes, series)
        if "seconds" in lines:
            axes.set_ylim(bottom=0.0)
        if len(lines) > 1:
            handles = [
                Line2D([], [], color=INK, linestyle=style, linewidth=1.4, label=_WORDS[key])
                for key, style in lines.items()
            ]
            axes.legend(handles=handles, fontsize=8, frameon=False, labelcolor=INK)

    return draw


def _points(run: RunLog, key: str) -> Points | None:
    """Epochs and values of a number, (n,) each; None where the run has none."""
    found = [(record["epoch"], record[key]) for record in run.history if key in record]
    if not found:
        return None
    epochs, values = np.array(found, dtype=np.float64).T
    return epochs, values


def _draw_steps(axes: Axes, runs: Sequence[RunLog]) -> None:
    series = []
    for i, run in enumerate(runs):
        if run.steps is None:
            continue
        steps, values = thinned(run.steps["step"], run.steps["bits_per_dim"])
        series.append(values)
        axes.plot(steps, values, color=_colour(i), linestyle=_dash(i), linewidth=1.2)
    scale_to_later(axes, series)
    axes.set_xlabel("step", fontsize=9, color=INK)


def thinned(steps: NDArray[np.float64], values: NDArray[np.float64]) -> Points:
    """Means of at most `MAX_POINTS` parts of a curve (S,); values that are not finite are left out."""
    known = np.isfinite(values)
    parts = max(1, min(MAX_POINTS, int(known.sum())))
    return (
        np.array([part.mean() if len(part) else np.nan for part in np.array_split(steps[known], parts)]),
        np.array([part.mean() if len(part) else np.nan for part in np.array_split(values[known], parts)]),
    )


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=10, color=INK)
    if not axes.get_xlabel():
        axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    light_axes(axes)
