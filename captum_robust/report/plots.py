"""Figures of a comparison: error of each method, and error against threshold.

Figures are made without pyplot, so nothing of the caller's matplotlib state changes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from captum_robust._checks import check_choice
from captum_robust._plurals import amount
from captum_robust.catalog.methods import BASELINES, FIXED_BOXES
from captum_robust.draw import blank_figure
from captum_robust.metrics.functional import STRATEGIES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Of Okabe & Ito's colours, told apart in all common kinds of colour blindness, those that have a
# contrast of 3:1 with white and with the report's dark ground. Further methods repeat them dashed.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#b8609a")
_DASHES: tuple[tuple[int, ...], ...] = (
    (),
    (6, 2),
    (2, 2),
    (7, 2, 2, 2),
    (12, 3),
    (5, 2, 1, 2, 1, 2),
    (1, 1),
    (9, 2, 1, 2),
)
_GREY = "#7d7d7d"

FAMILIES = {
    "value": "share α of the map's range",
    "mean": "multiple α of the map's mean",
    "energy": "share α of the map's sum",
    "percentile": "share α of the pixels left out",
}
"""What α is in each family of thresholds."""

_LONGEST_NAME = 24


@dataclass(frozen=True)
class Style:
    """How a method's line looks in every figure and in the report."""

    color: str
    dash: tuple[int, ...]
    """Lengths of strokes and gaps; empty: solid."""
    baseline: bool
    fixed: bool
    """Its box is always the same, so its error is a reference line."""

    @property
    def line(self) -> dict[str, Any]:
        """How matplotlib draws it."""
        return {
            "color": self.color,
            "dashes": self.dash or (None, None),
            "linewidth": 1.2 if self.baseline else 1.8,
            "zorder": 1 if self.baseline else 2,
        }


def method_styles(kinds: Mapping[str, str]) -> dict[str, Style]:
    """A line style for each method, given what it is in the catalog; baselines are grey."""
    styles: dict[str, Style] = {}
    coloured = grey = 0
    for method, kind in kinds.items():
        if kind in BASELINES:
            dash = _DASHES[(grey + 1) % len(_DASHES)]
            styles[method] = Style(_GREY, dash, baseline=True, fixed=kind in FIXED_BOXES)
            grey += 1
        else:
            styles[method] = line_style(coloured)
            coloured += 1
    return styles


def plot_comparison(
    table: pd.DataFrame, curves: pd.DataFrame, styles: Mapping[str, Style]
) -> Figure:
    """Error of each method with its interval, beside error against threshold for each family.

    Baselines are grey; those whose box is fixed are also lines to compare with. Each attack has a
    block of its own on the left; the curves are of the clean images.

    Raises:
        ImportError: matplotlib is missing.
    """
    if "error" not in table:
        figure = blank_figure(figsize=(6, 2))
        figure.text(0.5, 0.5, "No image has a box that could be scored.", ha="center", va="center")
        return figure
    attacked = bool((table["attack"] != table["attack"].iloc[0]).any())
    table = table[table["error"].notna()]
    rows = len(table) + table["attack"].nunique()
    figure = blank_figure(figsize=(13, max(6.0, 1.8 + 0.34 * rows)), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left, right = halves
    _draw_errors(left, table, styles, attacked)
    _draw_families(right, curves, styles, STRATEGIES)
    return figure


def plot_curves(curves: pd.DataFrame, styles: Mapping[str, Style], strategy: str) -> Figure:
    """Error against the threshold α of one family.

    Args:
        curves: as from :meth:`Comparison.curves`.
        styles: of the methods, as from :func:`method_styles`.
        strategy: one of ``captum_robust.metrics.functional.STRATEGIES``.

    Raises:
        ValueError: an unknown family.
        ImportError: matplotlib is missing.
    """
    check_choice("strategy", strategy, STRATEGIES)
    figure = blank_figure(figsize=(6, 5), layout="constrained")
    _draw_families(figure, curves, styles, (strategy,))
    return figure


def svg_uri(figure: Figure) -> str:
    """The figure as an image that a page can hold, a data URI."""
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "report", "svg.fonttype": "path"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def plot_robust_accuracy(series: Mapping[str, pd.DataFrame]) -> Figure:
    """Robust accuracy against the strength of each attack, with its intervals.

    At strength 0 each line begins with the accuracy on the clean images.

    Args:
        series: name of an attack -> its rows, with the columns ``epsilon`` (in pixel units),
            ``clean_accuracy``, ``robust_accuracy``, ``robust_low`` and ``robust_high``, as from
            :func:`captum_robust.benchmark.robust_accuracy`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = blank_figure(figsize=(7, 5), layout="constrained")
    axes: Axes = figure.subplots()
    drawn: dict[str, Any] = {}
    for i, (name, rows) in enumerate(series.items()):
        style = line_style(i)
        rows = rows[rows["n"] > 0].sort_values("epsilon", kind="stable")
        levels, accuracy = list(255 * rows["epsilon"]), list(100 * rows["robust_accuracy"])
        interval = 100 * rows["robust_low"], 100 * rows["robust_high"]
        axes.vlines(levels, *interval, color=style.color, linewidth=1, alpha=0.7)
        if levels and levels[0] > 0:
            levels = [0.0, *levels]
            accuracy = [100 * float(rows["clean_accuracy"].iloc[0]), *accuracy]
        # The later ones are thinner, so that none hides another.
        width = 1.8 + 1.4 * min(len(series) - 1 - i, 4)
        look = style.line | {"linewidth": width, "markersize": 2.5 + width}
        (drawn[name],) = axes.plot(levels, accuracy, "o-", **look)
    axes.set_xlabel("strength ε, in levels of an 8-bit image (1/255)")
    axes.set_ylabel("robust accuracy, % of images (bar: 95 % interval)")
    axes.set_ylim(-2, 102)
    _plain(axes)
    _named_legend(figure, drawn, empty=axes)
    return figure


def plot_error_series(series: Mapping[str, pd.DataFrame], styles: Mapping[str, Style]) -> Figure:
    """Localization error against the strength, a panel an attack, a line a method.

    Strength 0 is the clean images.

    Args:
        series: as from :meth:`Comparison.error_series`.
        styles: of the methods, as from :func:`method_styles`.

    Raises:
        ImportError: matplotlib is missing.
    """
    count = max(1, len(series))
    figure = blank_figure(figsize=(2 + 4.2 * count, 5), layout="constrained")
    panels = figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0]
    strengths = sorted({255 * e for rows in series.values() for e in rows["epsilon"]})
    drawn: dict[str, Any] = {}
    for axes, (name, rows) in zip(panels, series.items(), strict=False):
        methods = [method for method in styles if (rows["method"] == method).any()]
        for i, method in enumerate(methods):
            style, one = styles[method], rows[rows["method"] == method]
            levels, marks = 255 * one["epsilon"], "-"
            if not style.fixed:
                # Moved aside, so that no dot and no interval lies on another.
                levels, marks = levels + strengths[-1] * (i - (len(methods) - 1) / 2) * 0.009, "o-"
                interval = 100 * one["error_low"], 100 * one["error_high"]
                axes.vlines(levels, *interval, color=style.color, linewidth=1, alpha=0.7)
            (drawn[method],) = axes.plot(
                levels, 100 * one["error"], marks, markersize=4, **style.line
            )
        axes.set_xticks(strengths, [f"{e:.3g}" for e in strengths])
        axes.set_title(_short(name), parse_math=False)
        axes.set_xlabel("ε, in levels of 255")
        axes.set_ylim(-2, 102)
        _plain(axes)
    panels[0].set_ylabel("localization error, % of images (bar: 95 % interval)")
    _named_legend(figure, drawn, empty=panels[0])
    return figure


def line_style(i: int) -> Style:
    """Return the style of the i-th line that is no baseline."""
    color = _COLORS[i % len(_COLORS)]
    dash = _DASHES[i // len(_COLORS) % len(_DASHES)]
    return Style(color, dash, baseline=False, fixed=False)


def _draw_errors(
    figure: Any, table: pd.DataFrame, styles: Mapping[str, Style], attacked: bool
) -> None:
    axes: Axes = figure.subplots()
    beside: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
    ticks: list[int] = []
    names: list[str] = []
    row = 0
    for attack, block in table.groupby("attack", sort=False):
        first, last = row, row + attacked + len(block)
        if attacked:
            axes.text(0, row, _short(str(attack)), weight="bold", parse_math=False, **beside)
            row += 1
        for entry in block.to_dict("records"):
            style = styles[entry["method"]]
            color = style.color
            value, low, high = (100 * entry[c] for c in ("error", "error_low", "error_high"))
            axes.plot([low, high], [row, row], color=color, linewidth=2)
            axes.plot([value], [row], "o", color=color, markersize=7)
            axes.text(1.02, row, f"{value:.1f} %", color=color, **beside)
            ticks.append(row)
            names.append(_short(entry["method"]))
            row += 1
            if style.fixed:
                line: dict[str, Any] = {"color": color, "dashes": style.dash, "zorder": 0}
                axes.plot([value] * 2, [first - 0.5, last - 0.5], lw=1, **line)
    axes.set_yticks(ticks, names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(row - 0.4, -0.6)
    figure.supxlabel(
        "localization error, % of images (bar: 95 % bootstrap interval)", fontsize="medium"
    )
    ways = " or ".join(way for way in dict.fromkeys(table["tuned"]) if way != "-")
    images = amount(int(table["n"].max()), "image")
    title = f"Error on {images}" + (f", thresholds: {ways}" if ways else "")
    figure.suptitle(title, fontsize="large")
    _plain(axes, "x")
    axes.spines["left"].set_visible(False)


def _draw_families(
    figure: Any, curves: pd.DataFrame, styles: Mapping[str, Style], strategies: tuple[str, ...]
) -> None:
    columns = 1 if len(strategies) == 1 else 2
    grid = figure.subplots(-(-len(strategies) // columns), columns, sharey=True, squeeze=False)
    drawn: dict[str, Any] = {}
    for axes, strategy in zip(grid.flat, strategies, strict=True):
        family = curves[curves["strategy"] == strategy]
        for method, style in styles.items():
            one = family[family["method"] == method]
            if len(one):
                (drawn[method],) = axes.plot(one["alpha"], 100 * one["error"], **style.line)
        axes.set_title(strategy)
        axes.set_xlabel(FAMILIES[strategy])
        _plain(axes)
        axes.margins(x=0.01)
    for axes in grid[:, 0]:
        axes.set_ylabel("error, % of images")
    _named_legend(figure, drawn)


def _plain(axes: Axes, lines: Literal["both", "x"] = "both") -> None:
    """Light lines behind the data, and no frame above and on the right."""
    axes.grid(axis=lines, color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _named_legend(figure: Any, drawn: Mapping[str, Any], empty: Axes | None = None) -> None:
    """A legend below the figure; without a line a word on the axes ``empty`` in its stead."""
    if not drawn:
        if empty is not None:
            place: dict[str, Any] = {"ha": "center", "transform": empty.transAxes}
            empty.text(0.5, 0.5, "No attack of given strength.", **place)
        return
    # The names are set afterwards: a legend leaves out labels that begin with an underscore.
    columns = 3 if max(map(len, drawn)) <= 20 else 2
    places = [str(i) for i in range(len(drawn))]
    look: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    legend = figure.legend(list(drawn.values()), places, **look)
    for text, name in zip(legend.get_texts(), drawn, strict=True):
        text.set_parse_math(False)
        text.set_text(_short(name))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
