"""The tables of a comparison for a terminal."""

from __future__ import annotations

import math

from captum_robust.report.outcomes import attacks_text
from captum_robust.report.run_tables import Tables
from captum_robust.report.tables import (
    COLUMNS,
    FEW,
    GAP_COLUMNS,
    SALIENCY_COLUMNS,
    STABILITY_COLUMNS,
    text_table,
)

_ADAPTIVE_NOTE = (
    "adaptive: the attacker knows the transforms of a defended method; =: a method without a "
    "defence,\nof which the plain attack knows all there is: its value; -: the map has no gradient"
)
_SALIENCY_NOTE = (
    "saliency metric: log(max(area, .05)) - log probability of the class in the tightest "
    "crop, lower is better;\nthresholds tuned as above; clean images; true box: the largest"
    " one annotated"
)


def text_of(tables: Tables) -> str:
    """Return all tables of a run that have rows, each with a line on what it counts."""
    text = _clean_text(tables)
    if len(tables.results.attacks) > 1:
        text = f"clean images\n{text}\n\nattacks\n{attacks_text(tables.attacks)}"
        if "error" in tables.methods:
            text += _errors_text(tables)
        text += _stability_text(tables) + _gap_text(tables)
    return text + _saliency_text(tables)


def _clean_text(tables: Tables) -> str:
    table, oracle = tables.clean, tables.tuning.oracle
    tuned = "on the reported images (oracle)" if oracle else "on the other half of the images"
    note = (
        f"error: share of boxes with IoU of .5 or less, 95 % bootstrap interval; thresholds "
        f"tuned {tuned}"
    )
    if table["n"].max() < FEW:
        note += f"\nfewer than {FEW} images are too few to rank methods: read the intervals"
    return f"{text_table(table, COLUMNS, ['method', 'n'])}\n{note}"


def _errors_text(tables: Tables) -> str:
    errors = tables.errors.map(lambda e: "-" if math.isnan(e) else f"{e:.3f}")
    for method in errors.index:
        for attack in errors.columns:
            if tables.results.rows_of(method, attack) not in (attack, None):
                errors.loc[method, attack] += "="
    errors.index.name = errors.columns.name = None
    note = f"\n{_ADAPTIVE_NOTE}" if tables.results.adaptive else ""
    return f"\n\nerror under attack\n{errors.to_string()}{note}"


def _stability_text(tables: Tables) -> str:
    if tables.stability.empty:
        return ""
    text = text_table(tables.stability, STABILITY_COLUMNS, ["attack", "method", "n"])
    return f"\n\nmaps under attack, beside the clean ones\n{text}"


def _gap_text(tables: Tables) -> str:
    if tables.gaps.empty:
        return ""
    note = (
        f"gap: error of {tables.gaps['baseline'].iloc[0]} attacked less clean; closed: the part of "
        "it that the method does not lose\nunder the same attack (of an adaptive one: under its "
        "own); no gap: share of the bootstrap's draws\nwithout any, which are not in the interval"
    )
    text = text_table(tables.gaps, GAP_COLUMNS, ["attack", "method", "n"])
    return f"\n\ngap closed\n{text}\n{note}"


def _saliency_text(tables: Tables) -> str:
    if tables.saliency.empty:
        return ""
    text = text_table(tables.saliency, SALIENCY_COLUMNS, ["method", "n"])
    return f"\n\nsaliency metric\n{text}\n{_SALIENCY_NOTE}"
