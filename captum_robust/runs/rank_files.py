"""The rows of a run in several SQLite files, one a rank, read as one table each."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

_NAME = re.compile(r"rows(?:\.([1-9]\d*))?\.sqlite")


def rows_file(rank: int) -> str:
    """The name of the file of a rank; of one process "rows.sqlite"."""
    return f"rows.{rank}.sqlite" if rank else "rows.sqlite"


def holds_rows(names: Iterable[str]) -> bool:
    """Whether a file with rows is among these names."""
    return any(map(_NAME.fullmatch, names))


def other_files(own: Path) -> list[Path]:
    """Those of the other ranks beside it, also of an earlier run by more ranks, by rank."""
    found = ((_NAME.fullmatch(path.name), path) for path in own.parent.iterdir())
    ranked = [(int(match[1] or 0), path) for match, path in found if match]
    return [path for _, path in sorted(ranked) if path.name != own.name]


def uri_of(file: Path, mode: str) -> str:
    """What SQLite opens: "rwc" makes the file where there is none, "rw" does not.

    To read it takes "rw" too: what a killed process has half written is to be taken back.
    """
    return f"{file.absolute().as_uri()}?mode={mode}"


def copy_rows(source: str, target: str, key: Sequence[str], columns: Iterable[str]) -> str:
    """The statement that copies rows into another table, where each key is once.

    A row without an error comes before one with; then the newest, by ``turn``.
    """
    listed = ", ".join(columns)
    new = ", ".join(f"{name} = excluded.{name}" for name in columns)
    return (
        f"INSERT INTO {target} AS old ({listed}) SELECT {listed} FROM {source} WHERE true "
        f"ON CONFLICT ({', '.join(key)}) DO UPDATE SET {new} "
        f"WHERE ({_order('excluded')}) > ({_order('old')})"
    )


def union(one: str, other: str, key: Sequence[str], columns: Iterable[str]) -> str:
    """The query of the rows of two tables, of those with the same key as :func:`copy_rows` says."""
    listed, same = ", ".join(columns), " AND ".join(f"b.{name} = a.{name}" for name in key)

    def arm(of: str, beside: str, better: str) -> str:
        there = f"SELECT 1 FROM {beside} AS b WHERE {same} AND ({_order('b')}) {better} "
        return f"SELECT {listed} FROM {of} AS a WHERE NOT EXISTS ({there}({_order('a')}))"

    return f"{arm(one, other, '>')} UNION ALL {arm(other, one, '>=')}"


def columns_there(database: sqlite3.Connection, schema: str, table: str) -> set[str]:
    """The names of the columns of a table; none where there is no such table."""
    return {column[1] for column in database.execute(f"PRAGMA {schema}.table_info({table})")}


def _order(row: str) -> str:
    """What is larger of the better row."""
    return f"{row}.error IS NULL, coalesce({row}.turn, 0)"
