"""Pictures of results, as matplotlib figures without global state; `png` turns one into bytes."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

INK, PALE = "#22303c", "#d8dee4"
# Names and a title take so many inches of a grid of images.
_NAMES_WIDTH, _TITLE_HEIGHT = 0.9, 0.35
LINES = ("#2f6f9f", "#c8702a", "#3f8f5f", "#8a5aa8", "#a8434d", "#6b7785")
SERIES = {"train": "training", "val": "validation", "test": "unseen subjects", "unseen_head": "unseen head"}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The reasons for the label of one slice.

    Attributes:
        image: (H, W) uint8.
        log_probs: (K,) nats.
        label: the label whose likelihood is explained.
        rival: the label it is compared with.
        attribution: (H, W) nats per pixel of log p(x|label); with `constant` it sums to ``log_probs[label]``.
        contrast: (H, W) nats per pixel of log p(x|label) - log p(x|rival); sums to that difference.
        constant: nats that belong to no pixel and no label.
        truth: the true label, None when unknown.
        name: the title of the picture.
    """

    image: NDArray[np.uint8]
    log_probs: NDArray[np.float64]
    label: int
    rival: int
    attribution: NDArray[np.float64]
    contrast: NDArray[np.float64]
    constant: float
    truth: int | None = None
    name: str = ""


def png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def data_url(figure: Figure) -> str:
    """The figure as the source of an image inside a page."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode("ascii")


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _quiet(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(False)


def light_axes(axes: Axes) -> None:
    """Leave the two axes of a panel, in a pale colour."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(colors=INK, labelsize=8, length=3, color=PALE)


# -- confusion matrices --------------------------------------------------------------------------------------


def confusion_figure(confusion: NDArray[Any] | Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """A confusion matrix: counts on the left, shares of each true class on the right.

    Args:
        confusion: (K, K); the first axis is the true class, the second the predicted one.
        class_names: K names.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    size = 1.4 + 0.4 * len(class_names)
    figure = _figure(2 * size + 0.4, size + 0.2)
    left, right = figure.subplots(1, 2)
    _confusion_panel(left, shares, [[f"{n:.0f}" for n in row] for row in counts], class_names, "Volumes")
    _confusion_panel(
        right,
        shares,
        [[f"{100 * n:.0f}" for n in row] for row in shares],
        class_names,
        "Per cent of the true class",
    )
    left.set_ylabel("true", color=INK, fontsize=9)
    right.set_yticklabels([])
    return figure


def _confusion_panel(
    axes: Axes, shares: NDArray[Any], text: list[list[str]], class_names: Sequence[str], title: str
) -> None:
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.15)
    for i, row in enumerate(text):
        for j, value in enumerate(row):
            if value != "0":
                axes.text(
                    j,
                    i,
                    value,
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if shares[i, j] > 0.55 else INK,
                )
    positions = range(len(class_names))
    axes.set_xticks(positions, class_names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(positions, class_names)
    axes.set_xticks(np.arange(0.5, len(class_names) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(class_names) - 1), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, fontsize=9, color=INK)
    axes.set_xlabel("predicted", color=INK, fontsize=9)


# -- samples -------------------------------------------------------------------------------------------------


def samples_figure(
    real: NDArray[np.uint8], generated: NDArray[np.uint8], class_names: Sequence[str]
) -> Figure:
    """Real slices (K, n, H, W) beside generated ones (K, m, H, W), a row per class."""
    figure = Figure(figsize=(10.0, _height(10.0, real.shape[1] + generated.shape[1] + 0.4, real)))
    _image_grids(figure, {"Archive": real, "Generated": generated}, class_names)
    return figure


def grid_figure(images: NDArray[np.uint8], rows: Sequence[str]) -> Figure:
    """Images (R, n, H, W), a named row each."""
    width = max(3.0, 1.3 * images.shape[1] + 1.0)
    figure = Figure(figsize=(width, _height(width, images.shape[1], images)))
    _image_grids(figure, {"": images}, rows)
    return figure


def _height(width: float, columns: float, images: NDArray[np.uint8]) -> float:
    return _TITLE_HEIGHT + len(images) * (width - _NAMES_WIDTH) / columns * images.shape[2] / images.shape[3]


def _image_grids(figure: Figure, groups: Mapping[str, NDArray[np.uint8]], rows: Sequence[str]) -> None:
    """Groups of images (R, n, H, W) side by side with a gap between them; names stand on the left."""
    width, height = figure.get_size_inches()
    ratios: list[float] = []
    for images in groups.values():
        ratios += [0.4] * bool(ratios) + [1.0] * images.shape[1]
    spaces = {
        "left": _NAMES_WIDTH / width,
        "right": 0.998,
        "bottom": 0.002,
        "top": 1 - _TITLE_HEIGHT / height,
        "wspace": 0.04,
        "hspace": 0.04,
    }
    grid = figure.add_gridspec(len(rows), len(ratios), width_ratios=ratios, **spaces).subplots(squeeze=False)
    for axes in grid.flat:
        _quiet(axes)
    for axes, name in zip(grid[:, 0], rows, strict=True):
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9, color=INK)
    column = 0
    for title, images in groups.items():
        grid[0, column].set_title(title, fontsize=10, color=INK, loc="left")
        for row, column_offset in np.ndindex(*images.shape[:2]):
            grid[row, column + column_offset].imshow(
                images[row, column_offset], cmap="gray", vmin=0, vmax=255
            )
        column += images.shape[1] + 1


# -- attribution ---------------------------------------------------------------------------------------------


def attribution_figure(explanations: Sequence[Explanation], class_names: Sequence[str]) -> Figure:
    """One row of pictures per explanation.

    A row shows the slice, log p(x|y) by pixel, the log-odds against the rival by pixel, and log-likelihoods
    by label.
    """
    figure = _figure(10.0, 2.5 * len(explanations))
    grid = figure.subplots(len(explanations), 4, squeeze=False, width_ratios=(1, 1.25, 1.25, 1.3))
    for row, explanation in zip(grid, explanations, strict=True):
        _explain_row(figure, list(row), explanation, class_names)
    return figure


def _explain_row(figure: Figure, row: list[Axes], e: Explanation, class_names: Sequence[str]) -> None:
    row[0].imshow(e.image, cmap="gray", vmin=0, vmax=255)
    known = "" if e.truth is None else f"true: {class_names[e.truth]}"
    row[0].set_title("\n".join(part for part in (e.name, known) if part), fontsize=8, color=INK)
    # The level that all pixels share says nothing about places, so the colours leave the median out.
    _overlay(
        figure,
        row[1],
        e.image,
        e.attribution - np.median(e.attribution),
        f"log p(x | {class_names[e.label]})\nagainst its median",
    )
    _overlay(
        figure,
        row[2],
        e.image,
        e.contrast,
        f"log-odds of {class_names[e.label]}\nagainst {class_names[e.rival]}",
    )
    _quiet(row[0])
    gaps = e.log_probs - e.log_probs.max()
    colours = [LINES[0] if k == e.label else LINES[1] if k == e.rival else PALE for k in range(len(gaps))]
    row[3].barh(range(len(gaps)), gaps, color=colours, height=0.7)
    row[3].plot(np.zeros(1), [e.label], marker="o", markersize=4, color=LINES[0], clip_on=False)
    row[3].set_yticks(range(len(gaps)), class_names)
    row[3].invert_yaxis()
    row[3].set_title("log p(x|y) below the best, nats", fontsize=8, color=INK)
    light_axes(row[3])


def _overlay(figure: Figure, axes: Axes, image: NDArray[np.uint8], values: NDArray[Any], title: str) -> None:
    # Latents of coarse scales sit on one pixel of each block; smoothing distributes them and keeps the sum.
    values = gaussian_filter(values, 1.5, mode="constant")
    limit = max(float(np.percentile(np.abs(values), 99.5)), 1e-9)
    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    picture = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, alpha=0.65)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=INK, length=2)
    bar.outline.set_visible(False)
    bar.set_label("nats per pixel", fontsize=7, color=INK)
    axes.set_title(title, fontsize=8, color=INK)
    _quiet(axes)


# -- curves --------------------------------------------------------------------------------------------------


def curves_figure(history: Sequence[Mapping[str, float]]) -> Figure:
    """Bits/dim and, where recorded, accuracy over the epochs; one line per set, named at its end."""
    panels = [("_bits_per_dim", "bits/dim (lower is better)"), ("_accuracy", "accuracy of single slices")]
    panels = [(suffix, title) for suffix, title in panels if _series(history, suffix)]
    figure = _figure(10.0, 3.6)
    for axes, (suffix, title) in zip(
        figure.subplots(1, max(1, len(panels)), squeeze=False)[0], panels, strict=True
    ):
        _curve_panel(axes, _series(history, suffix), title)
    return figure


def _series(
    history: Sequence[Mapping[str, float]], suffix: str
) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    names = dict.fromkeys(key for record in history for key in record if key.endswith(suffix))
    out = {}
    for name in names:
        points = [(record["epoch"], record[name]) for record in history if name in record]
        out[name.removesuffix(suffix)] = (
            np.array([p[0] for p in points]),
            np.array([p[1] for p in points], dtype=np.float64),
        )
    return out


def _curve_panel(axes: Axes, series: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], title: str) -> None:
    order = [*SERIES, *(name for name in series if name not in SERIES)]
    for name, (epochs, values) in series.items():
        colour = LINES[order.index(name) % len(LINES)]
        label = f"{SERIES.get(name, name)}, last {values[-1]:.3g}"
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=3, label=label)
    scale_to_later(axes, [values for _, values in series.values()])
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel("epoch", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=PALE, linewidth=0.6)
    axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    light_axes(axes)


def scale_to_later(axes: Axes, series: Sequence[NDArray[Any]]) -> None:
    """Set the ends of a panel's axis by the curves (n,) without their first quarters.

    The first epochs start far above; scaled to them, the rest of every curve would be one flat line.
    """
    later = np.concatenate([values[len(values) // 4 :] for values in series])
    later = later[np.isfinite(later)]
    if later.size:
        margin = 0.06 * max(float(np.ptp(later)), 1e-3)
        axes.set_ylim(float(later.min()) - margin, float(later.max()) + margin)

    light_axes(axes)


# -- ROC curves ----------------------------------------------------------------------------------------------


def roc_figure(rocs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """ROC curves: of each class against the others on the left, means over the classes on the right.

    Args:
        rocs: of each decision, as `fastflow.evaluation.decisions.roc_curves` gives them. The classes are
            shown of the first.
    """
    first, curves = next((name, roc["classes"]) for name, roc in rocs.items())
    means = {name: roc["macro"] for name, roc in rocs.items() if roc["macro"] is not None}
    figure = _figure(10.0, 4.4)
    left, right = figure.subplots(1, 2)
    _roc_panel(left, curves, f"{first}: each class against the others")
    _roc_panel(right, means, "Mean over the classes")
    return figure


def _roc_panel(axes: Axes, curves: Mapping[str, Mapping[str, Any]], title: str) -> None:
    axes.plot([0, 1], [0, 1], color=PALE, linewidth=1.0)
    for i, (name, curve) in enumerate(curves.items()):
        style = ("-", "--", ":")[i // len(LINES) % 3]
        axes.plot(
            curve["fpr"], curve["tpr"], color=LINES[i % len(LINES)], ls=style, linewidth=1.6, label=name
        )
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel("false positive rate", fontsize=9, color=INK)
    axes.set_ylabel("true positive rate", fontsize=9, color=INK)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.02)
    if 0 < len(curves) <= 3 * len(LINES):
        axes.legend(fontsize=8, frameon=False, labelcolor=INK, loc="lower right")
    light_axes(axes)
