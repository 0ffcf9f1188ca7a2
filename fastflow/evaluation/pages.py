"""Self-contained HTML pages: templates of one look, and pictures inside them."""

from __future__ import annotations

import base64
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from fastflow.evaluation import figures


def render(template: str, **values: Any) -> str:
    """A page of a template in ``fastflow/evaluation/templates``; text in `values` is escaped."""
    environment = Environment(
        loader=PackageLoader("fastflow.evaluation"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters.update(share=_share, number=_number, range=_range)
    return environment.get_template(template).render(**values)


def inline(figure: Figure) -> str:
    """The figure as the address of a picture that is part of the page."""
    return "data:image/png;base64," + base64.b64encode(figures.png(figure)).decode("ascii")


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"  # noqa: RUF001


def _number(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _range(estimate: dict[str, float | None]) -> str:
    """The interval of an estimate; empty without one."""
    low, high = estimate["low"], estimate["high"]
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
