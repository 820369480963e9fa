"""Line charts of many methods for the page: drawn as SVG in it, each line shown on demand."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from captum_robust.report.plots import Style

if TYPE_CHECKING:
    import pandas as pd

WIDTH, HEIGHT = 340, 230
LEFT, RIGHT, TOP, BOTTOM = 34, 8, 8, 40
"""Of the drawing, in its own units, and the margins around the lines."""


@dataclass(frozen=True)
class Line:
    """The line of a method."""

    number: int
    """Of the method among those of the run."""
    points: str
    style: Style


@dataclass(frozen=True)
class LineChart:
    """A finished chart."""

    title: str
    x_label: str
    described: str
    lines: list[Line]
    x_ticks: list[tuple[float, str]]
    """Place and text."""
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Choice:
    """A line that the reader shows or hides, in all charts of a section."""

    number: int
    name: str
    style: Style
    shown: bool


def line_chart(
    title: str,
    x_label: str,
    described: str,
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    styles: Mapping[str, Style],
) -> LineChart:
    """A chart of shares in [0, 1], in %.

    Args:
        title, x_label: above and below it.
        described: what it says in words.
        curves: method -> its x and its y.
        styles: of all methods of the run, in their order.
    """
    left = min((min(x) for x, _ in curves.values()), default=0.0)
    right = max((max(x) for x, _ in curves.values()), default=1.0)
    top = max((max(y) for _, y in curves.values()), default=1.0)
    top = min(1.0, math.ceil(10 * top) / 10) or 0.1
    span = right - left or 1.0

    def x_of(x: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (x - left) / span, 1)

    def y_of(y: float) -> float:
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * y / top, 1)

    lines = [
        Line(
            list(styles).index(method),
            " ".join(f"{x_of(x):g},{y_of(y):g}" for x, y in zip(*curve, strict=True)),
            styles[method],
        )
        for method, curve in curves.items()
    ]
    step = _step(span)
    places = [step * i for i in range(math.ceil(left / step), math.floor(right / step + 1e-9) + 1)]
    x_ticks = [(x_of(x), f"{x:g}") for x in (round(place, 6) for place in places)]
    y_ticks = [(y_of(top * i / 4), f"{100 * top * i / 4:.3g}") for i in range(5)]
    return LineChart(title, x_label, described, lines, x_ticks, y_ticks)


def _step(span: float) -> float:
    """Between about four round numbers."""
    power: float = 10.0 ** math.floor(math.log10(span / 4))
    return min((power * m for m in (1, 2, 2.5, 5, 10)), key=lambda step: abs(span / step - 4))


def choices_of(
    styles: Mapping[str, Style], words: Mapping[str, str], shown: Collection[str]
) -> list[Choice]:
    """A choice a method, those that are shown at first before the others."""
    order = [*shown, *(m for m in styles if m not in shown)]
    numbers = {method: i for i, method in enumerate(styles)}
    return [Choice(numbers[m], words[m], styles[m], m in shown) for m in order]


def curves_by_method(
    rows: pd.DataFrame, x: str, y: str
) -> dict[str, tuple[list[float], list[float]]]:
    """The columns ``x`` and ``y`` of each method in a table."""
    return {
        str(method): (one[x].tolist(), one[y].tolist())
        for method, one in rows.groupby("method", sort=False)
    }
