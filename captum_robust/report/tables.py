"""Tables for the terminal and for the page, both made from one column a measured number."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from captum_robust.catalog.attacks import LEVELS

if TYPE_CHECKING:
    import pandas as pd

_NO_GAP = 0.025
"""In more of the resamples than this there is no gap: its interval reaches zero."""


@dataclass(frozen=True)
class Form:
    """How a number is written: in the terminal, on the page, as an end of an interval there."""

    text: Callable[[float], str]
    page: Callable[[float], str]
    end: Callable[[float], str] = str


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


_two_digits, _three_digits = "{:.2f}".format, "{:.3f}".format
FORMS = {
    "percent": Form(_three_digits, _percent, _percent),
    "share": Form("{:.0%}".format, "{:.0%}".format),
    "count": Form("{:.0f}".format, "{:.0f}".format),
    "number": Form("{:.4g}".format, _number, _two_digits),
    "time": Form("{:.1f}".format, _number),
    "levels": Form(lambda v: f"{LEVELS * v:.1f}/{LEVELS}", lambda v: f"{LEVELS * v:.1f}"),
    "two digits": Form(_two_digits, _two_digits, _two_digits),
    "three digits": Form(_three_digits, _three_digits, _two_digits),
    "two figures": Form(*["{:.2g}".format] * 3),
}


@dataclass(frozen=True)
class Column:
    """A column of a table."""

    key: str
    """In the data frame."""
    label: str
    """On the page; empty: not there."""
    form: str
    """A key of :data:`FORMS`, or "text"."""
    better: str = ""
    """ "low", "high", or "" where no value is the best."""
    name: str = ""
    """In the terminal; empty: not there."""
    ends: tuple[str, ...] = ()
    """The columns of its interval."""
    of: str = ""
    """The column that says of how many it is the share."""
    rare: bool = False
    """The terminal shows it only where it is not 0 everywhere."""
    group: str = ""
    """A key of :data:`GROUPS`; the page shows one group at a time, and always those of none."""
    meaning: str = ""
    """The key of what it means to its reader, where that is not its own."""

    def text(self, record: Mapping[Any, Any]) -> str:
        """The value of a row for the terminal, with its interval."""
        value, form = float(record[self.key]), FORMS[self.form]
        if math.isnan(value):
            return "-"
        text = form.text(value)
        if self._has_interval(record):
            text += f" [{', '.join(form.text(record[end]) for end in self.ends)}]"
        return f"{text} of {record[self.of]:.0f}" if self.of and self.form == "percent" else text

    def _has_interval(self, record: Mapping[Any, Any]) -> bool:
        """Whether the row has an interval; of one image there is none."""
        return bool(self.ends) and not any(math.isnan(record[end]) for end in self.ends)

    def cell(self, record: Mapping[Any, Any] | None) -> Cell:
        """The value of a row for the page; a dash without one.

        It says so where the value repeats that of another row, or where some draws have no gap.
        """
        value = math.nan if record is None else record[self.key]
        if self.form == "text":
            return Cell(value if isinstance(value, str) else "–", words=True)
        below = ""
        if record is not None and self.of and not math.isnan(record[self.of]):
            below = f"of {record[self.of]:.0f}"
        value, form = float(value), FORMS[self.form]
        if record is None or math.isnan(value):
            return Cell("–", below)
        if self._has_interval(record):
            below = " to ".join(form.end(record[end]) for end in self.ends)
        if record.get("without_gap", 0) > _NO_GAP:
            below += f"; no gap in {100 * record['without_gap']:.0f} %"
        repeated = " =" if isinstance(record.get("same_as"), str) else ""
        return Cell(form.page(value) + repeated, below, value)


@dataclass(frozen=True)
class Cell:
    """A cell on the page, or the head of a column."""

    text: str
    below: str = ""
    value: float | None = None
    best: bool = False
    words: bool = False
    """It is text, not a number."""
    group: str = ""
    """Of its column."""


@dataclass(frozen=True)
class Line:
    """A row on the page."""

    name: str
    """In words."""
    method: str
    """As the run has it."""
    baseline: bool
    cells: list[Cell]


@dataclass(frozen=True)
class Grid:
    """A finished table for the page."""

    head: str
    """The title of the column of names."""
    columns: list[Cell]
    groups: list[tuple[str, list[Line]]]
    """A title, which may be empty, and its rows."""


GROUPS = {
    "localization": "Localization",
    "faithfulness": "What the class rests on",
    "certificate": "Certificate",
    "attack": "Attack",
    "cost": "Cost",
}
"""The groups of columns of the results, in words."""


def _ends(key: str) -> tuple[str, str]:
    return f"{key}_low", f"{key}_high"


ERROR = Column("error", "Error %", "percent", "low", name="error", ends=("error_low", "error_high"))
COLUMNS = (
    ERROR,
    Column("tuned", "Tuned on", "text", group="localization"),
    Column("threshold", "Threshold", "text", group="localization"),
    Column("top1_error", "Top-1 %", "percent", "low", name="top-1 error", group="localization"),
    Column("maxboxacc", "MaxBoxAcc %", "percent", "high", name="MaxBoxAcc", group="localization"),
    Column("maxboxacc_v2", "V2 %", "percent", "high", name="V2", group="localization"),
    Column("pointing", "Pointing %", "percent", "high", name="pointing", group="localization"),
    Column("pxap", "PxAP %", "percent", "high", name="PxAP", group="localization"),
    Column(
        "saliency",
        "Saliency metric",
        "number",
        "low",
        ends=("saliency_low", "saliency_high"),
        group="faithfulness",
    ),
    Column(
        "deletion",
        "Deletion area",
        "three digits",
        "low",
        "deletion",
        _ends("deletion"),
        group="faithfulness",
    ),
    Column(
        "insertion",
        "Insertion area",
        "three digits",
        "high",
        "insertion",
        _ends("insertion"),
        group="faithfulness",
    ),
    Column("road", "ROAD", "three digits", "high", "road", _ends("road"), group="faithfulness"),
    Column(
        "infidelity",
        "Infidelity",
        "two figures",
        "low",
        "infidelity",
        _ends("infidelity"),
        group="faithfulness",
    ),
    Column(
        "sensitivity",
        "Sensitivity",
        "three digits",
        "low",
        "sensitivity",
        _ends("sensitivity"),
        group="faithfulness",
    ),
    Column(
        "randomized_spearman",
        "Rank, random weights",
        "three digits",
        "low",
        "randomized rank",
        _ends("randomized_spearman"),
        group="faithfulness",
    ),
    Column(
        "randomized_ssim",
        "SSIM, random weights",
        "three digits",
        "low",
        "randomized ssim",
        _ends("randomized_ssim"),
        group="faithfulness",
    ),
    Column("flipped", "Flipped %", "percent", name="flipped", of="flippable", group="attack"),
    Column("accuracy", "Accuracy %", "percent", "high", group="attack"),
    Column("robust_accuracy", "Robust accuracy %", "percent", group="attack"),
    Column("forward", "Forward", "number", "low", name="forward", group="cost"),
    Column("backward", "Backward", "number", "low", name="backward", group="cost"),
    Column("ms_per_image", "ms / image", "time", "low", name="ms/image", group="cost"),
    Column("n", "Scored", "count"),
    Column("failed", "Failed", "count", name="failed", rare=True),
)
"""What each means to its reader stands in ``templates/meanings.html.j2``."""


def certificate_key(what: str, radius: float) -> str:
    """The key of the column of a number that is certified within a radius.

    >>> certificate_key("error", 0.25)
    'certified_error_0.25'
    """
    return f"certified_{what}_{radius:g}"


def certificate_columns(radii: Iterable[float]) -> tuple[Column, ...]:
    """The columns of a run that certifies within these radii."""
    smoothed = Column(
        "smoothed_error",
        "Smoothed error %",
        "percent",
        "low",
        "smoothed error",
        _ends("smoothed_error"),
        group="certificate",
    )
    columns, radii = [smoothed], list(radii)
    for what, title, better in (
        ("error", "Certified error", "low"),
        ("share", "Certified", "high"),
    ):
        for radius in radii:
            key = certificate_key(what, radius)
            ends = _ends(key) if what == "error" else ()
            columns.append(
                Column(
                    key,
                    f"{title} %, R {radius:g}",
                    "percent",
                    better,
                    f"{what}, R {radius:g}",
                    ends,
                    group="certificate",
                    meaning=f"certified_{what}",
                )
            )
    return tuple(columns)


ATTACK_COLUMNS = (
    Column("clean_accuracy", "Clean accuracy %", "percent", name="clean accuracy"),
    Column("already_wrong", "Already wrong", "count", name="already wrong", of="n"),
    Column("fooled", "Fooled %", "percent", name="fooled", of="n_right"),
    Column(
        "robust_accuracy",
        "Robust accuracy %",
        "percent",
        name="robust accuracy",
        ends=("robust_low", "robust_high"),
    ),
    Column("without_gradient", "No gradient", "count", name="no gradient", rare=True),
    Column("linf", "L∞ / 255", "levels", name="Linf"),
    Column("l2", "L2", "two digits", name="L2"),
    Column("n", "Attacked", "count"),
    Column("skipped", "", "count", name="skipped", rare=True),
    Column("failed", "Failed", "count", name="failed", rare=True),
)
STABILITY_COLUMNS = (
    Column("spearman", "Spearman", "three digits", "high", name="spearman"),
    Column("pearson", "Pearson", "three digits", "high", name="pearson"),
    Column("ssim", "SSIM", "three digits", "high", name="SSIM"),
    Column("top_k", "Top 10 %", "three digits", "high", name="top-k"),
    Column("box_iou", "Box IoU", "three digits", "high", name="box IoU"),
)
SALIENCY_COLUMNS = (
    Column(
        "saliency", "Saliency metric", "three digits", name="saliency metric", ends=("low", "high")
    ),
    Column("area", "Area %", "percent", name="area"),
    Column("probability", "Probability %", "percent", name="probability"),
    Column("best_crop", "Best crop", "three digits", name="best crop"),
    Column("n", "Images", "count"),
    Column("threshold", "Threshold", "text"),
)
GAP_CLOSED = Column("closed", "Gap closed", "two digits", name="closed", ends=("low", "high"))
GAP_COLUMNS = (
    Column("gap", "", "percent", name="gap"),
    GAP_CLOSED,
    Column("without_gap", "", "share", name="no gap"),
)
FAILURE_COLUMNS = (Column("method", "Method", "text"), Column("error", "Why", "text"))


def text_table(table: pd.DataFrame, columns: Iterable[Column], before: Sequence[str]) -> str:
    """A table for the terminal: the columns ``before`` as they are, then those with a name."""
    text: str = named_columns(table, columns, before).to_string(index=False)
    return text


def named_columns(
    table: pd.DataFrame, columns: Iterable[Column], before: Sequence[str]
) -> pd.DataFrame:
    """The columns ``before`` as they are, then the texts of those with a name."""
    import pandas as pd

    records = table.to_dict("records")
    cells: dict[str, Any] = {name: table[name] for name in before}
    for column in columns:
        there = column.name and column.key in table
        if there and not (column.rare and not table[column.key].any()):
            whole = column.form == "count"
            texts = [column.text(record) for record in records]
            cells[column.name] = table[column.key] if whole else texts
    return pd.DataFrame(cells)


Ahead = Callable[[str, str, str, str], bool]
"""Whether, by a column and under an attack, a method is better than another beyond chance."""


def grid(
    table: pd.DataFrame,
    columns: Sequence[Column],
    baselines: Collection[str] = (),
    *,
    head: str = "Method",
    names: str = "method",
    by: str | None = None,
    words: Mapping[str, str] | None = None,
    ahead: Ahead | None = None,
) -> Grid | None:
    """A table for the page.

    None for a table without rows.

    Args:
        table: the data.
        columns: those without a label, and those that the table does not have, are left out.
        baselines: names of rows.
        head: of the column of names.
        names: the column of the table with the names of the rows.
        by: a column whose values are titles of groups of rows.
        words: how the names of rows are written.
        ahead: with it, the best value of a column is marked, if it is better than all others of
            methods that are no baselines beyond chance.
    """
    if table.empty:
        return None
    columns = [c for c in columns if c.label and c.key in table]
    blocks = [("", table)] if by is None else table.groupby(by, sort=False)
    groups = []
    for title, block in blocks:
        records = block.to_dict("records")
        cells = [[column.cell(record) for record in records] for column in columns]
        for column, those in zip(columns if ahead else (), cells, strict=False):
            if (row := _leader(column, records, names, baselines, str(title), ahead)) is not None:
                those[row] = replace(those[row], best=True)
        lines = [
            Line((words or {}).get(record[names], record[names]), record[names],
                 record[names] in baselines, list(row))
            for record, row in zip(records, zip(*cells, strict=True), strict=True)
        ]  # fmt: skip
        groups.append((str(title), lines))
    heads = [Cell(c.label, words=c.form == "text", group=c.group) for c in columns]
    return Grid(head, heads, groups)


def _leader(
    column: Column,
    records: list[dict[Any, Any]],
    names: str,
    baselines: Collection[str],
    title: str,
    ahead: Ahead | None,
) -> int | None:
    """The row of the best value of a column, if it is better than all others beyond chance."""
    ranked = [
        (float(record[column.key]), row)
        for row, record in enumerate(records)
        if column.better and record[names] not in baselines and record[column.key] is not None
    ]
    ranked = sorted(one for one in ranked if not math.isnan(one[0]))
    if column.better == "high":
        ranked.reverse()
    if len(ranked) < 2 or ahead is None:
        return None
    best, *others = [str(records[row][names]) for _, row in ranked]
    leads = all(ahead(column.key, title, best, other) for other in others)
    return ranked[0][1] if leads else None


def crossed(
    table: pd.DataFrame,
    column: Column,
    methods: Iterable[str],
    attacks: list[Cell],
    baselines: Collection[str],
    words: Mapping[str, str],
) -> Grid | None:
    """One column of a table for the page: a row a method, a column an attack."""
    if table.empty:
        return None
    records = {(r["method"], r["attack"]): r for r in table.to_dict("records")}
    lines = [
        Line(words[m], m, m in baselines, [column.cell(records.get((m, h.text))) for h in attacks])
        for m in methods
    ]
    return Grid(column.label, attacks, [("", lines)])


def errors_grid(
    table: pd.DataFrame,
    methods: Iterable[str],
    attacks: list[str],
    baselines: Collection[str],
    words: Mapping[str, str],
) -> Grid | None:
    """The error of each method under each attack."""
    return crossed(table, ERROR, methods, [Cell(attack) for attack in attacks], baselines, words)


def gaps_grid(
    table: pd.DataFrame, baselines: Collection[str], words: Mapping[str, str]
) -> Grid | None:
    """The gap that each method closes under each attack, below whose name the gap stands."""
    gaps = table.groupby("attack", sort=False)["gap"].last()
    heads = [Cell(str(attack), f"gap {_percent(gap)} points") for attack, gap in gaps.items()]
    return crossed(table, GAP_CLOSED, dict.fromkeys(table["method"]), heads, baselines, words)


def has_unsure_gap(table: pd.DataFrame) -> bool:
    """Whether an interval of a closed gap leaves out draws that have no gap."""
    return bool(((table["without_gap"] > _NO_GAP) & table["closed"].notna()).any())
