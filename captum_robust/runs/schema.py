"""The tables of the database of a run, and what their columns may hold."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from captum_robust._checks import check
from captum_robust.runs.rank_files import columns_there
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow

_SQL_TYPES = {
    "int": "INTEGER",
    "bool": "INTEGER",
    "float": "REAL",
    "str": "TEXT",
    "bytes": "BLOB",
    "list[list[float]]": "TEXT",
}
_RANGES = dict.fromkeys(("confidence", "pointing", "top_k", "box_iou"), (0, 1)) | dict.fromkeys(
    ("spearman", "pearson", "ssim", "randomized_spearman", "randomized_ssim"), (-1, 1)
)
_SLACK = 1e-3
"""Rounding that a value may be out of its range by."""
TABLES: tuple[tuple[str, type[Any], str], ...] = (
    ("images", ImageRow, "position"),
    ("results", ResultRow, "method, attack, position"),
    ("attacked", AttackRow, "attack, position"),
)
"""Name, row and primary key of each."""


def columns_of(row: type[Any]) -> dict[str, str]:
    """The type of the column of each field of a row, and of ``turn``.

    That is the start of the run that wrote it, counted where several files hold rows.
    """
    kinds = {f.name: _SQL_TYPES[str(f.type).removesuffix(" | None")] for f in fields(row)}
    needed = {f.name for f in fields(row) if f.default is MISSING}
    typed = {name: f"{kind} NOT NULL" if name in needed else kind for name, kind in kinds.items()}
    return typed | {"turn": "INTEGER"}


def table_statements(prefix: str = "") -> Iterator[str]:
    """The statements that make the tables: a column for each field of their rows.

    With a row identifier, as rows of some kilobytes are kept whole in such tables only, and follow
    each other without gaps.
    """
    classes = f"{prefix}classes (number INTEGER PRIMARY KEY, name TEXT NOT NULL)"
    yield f"CREATE TABLE IF NOT EXISTS {classes}"
    for table, row, key in TABLES:
        columns = ", ".join(f"{name} {kind}" for name, kind in columns_of(row).items())
        yield f"CREATE TABLE IF NOT EXISTS {prefix}{table} ({columns}, PRIMARY KEY ({key}))"


def index_statements(prefix: str = "") -> Iterator[str]:
    """The statements that make the indices by position, by which rows of one image are found."""
    for table, _, key in TABLES:
        if key != "position":
            on = f"{prefix}{table}".removeprefix("temp.")
            yield f"CREATE INDEX IF NOT EXISTS {prefix}{table}_position ON {on} (position)"


def check_values(database: sqlite3.Connection, schema: str, file: Path) -> None:
    """Refuse values of another type than their column, or out of its range.

    Raises:
        ValueError: there is one; the message has the name of the file.
    """
    for table, row, _ in TABLES:
        there, odd = columns_there(database, schema, table), []
        kinds = {n: k for n, k in columns_of(row).items() if n in there or "NOT" in k}
        for name, kind in kinds.items():
            stored = [kind.partition(" ")[0].lower(), *([] if "NOT" in kind else ["null"])]
            odd.append(f"typeof({name}) NOT IN ({', '.join(map(repr, stored))})")
        for name in _RANGES.keys() & kinds.keys():
            low, high = _RANGES[name]
            odd.append(f"{name} NOT BETWEEN {low - _SLACK} AND {high + _SLACK}")
        query = f"SELECT 1 FROM {schema}.{table} WHERE {' OR '.join(odd)} LIMIT 1"
        found = database.execute(query).fetchall() if there else []
        where = f"{file}: damaged, or of something else"
        check(not found, f"{where} (a value in its {table}); give another folder")
