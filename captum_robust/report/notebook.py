"""How a comparison shows itself in a notebook."""

from __future__ import annotations

from html import escape

from captum_robust._checks import printable
from captum_robust.report.run_tables import Tables
from captum_robust.report.tables import COLUMNS, named_columns
from captum_robust.report.text import tuning_note


def html_of(tables: Tables, summary: str) -> str:
    """The table of the methods as HTML, with n and intervals; names are escaped."""
    table = tables.methods.assign(method=tables.methods["method"].map(printable))
    before = ["attack", "method", "n"] if len(tables.results.attacks) > 1 else ["method", "n"]
    shown = named_columns(table, COLUMNS, before)
    lines = [*tuning_note(tables).split("\n"), summary]
    below = "".join(f"<div>{escape(line)}</div>" for line in lines)
    text: str = shown.to_html(index=False, escape=True, border=0, justify="left")
    return f"<div>{text}{below}</div>"
