"""The rows of a run in several SQLite files, one a rank, read as one table each."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping
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


class Joined:
    """The tables of a connection and of other files, as one temporary view each.

    Of rows with the same key one is there: one without an error before one with, then the newest.

    Args:
        database: of the file that the process may write, "main".
        keys: of each table, the columns that tell its rows apart.
        columns: of each table, those of the view; "error" and "turn" must be among them.
    """

    def __init__(
        self,
        database: sqlite3.Connection,
        keys: Mapping[str, list[str]],
        columns: Mapping[str, list[str]],
    ) -> None:
        self._database, self._keys, self._columns = database, keys, columns
        self._sources = {table: {f"main.{table}": {*columns[table]}} for table in keys}
        self._classes = ["main.classes"]
        self._files = 0
        self.turn = self._turn_of("main")
        """The last that a file was written in."""

    def attach(self, file: Path, check: Callable[[str], object] | None = None) -> str:
        """Open a file beside the others, under the name that is returned; ``check`` it first."""
        self._files += 1
        schema = f"file{self._files}"
        self._database.execute(f"ATTACH ? AS {schema}", (uri_of(file, "rw"),))
        self.turn = max(self.turn, self._turn_of(schema))
        if check is not None:
            check(schema)
        return schema

    def add(self, schema: str) -> None:
        """Take in the rows of a file that stays open."""
        for table, sources in self._sources.items():
            there = columns_there(self._database, schema, table)
            if there:  # else it was killed before it had made its tables
                sources[f"{schema}.{table}"] = there
        if columns_there(self._database, schema, "classes"):
            self._classes.append(f"{schema}.classes")

    def copy(self, schema: str) -> None:
        """Take in the rows of a file, which is closed: they are put into a temporary one."""
        for table, names in self._columns.items():
            key, copied = ", ".join(self._keys[table]), f"temp.copied_{table}"
            there = columns_there(self._database, schema, table)
            if there and copied not in self._sources[table]:
                made = f"({', '.join(names)}, PRIMARY KEY ({key})) WITHOUT ROWID"
                self._database.execute(f"CREATE TABLE {copied} {made}")
                self._sources[table][copied] = {*names}
            if there:
                known = [name for name in names if name in there]
                new = ", ".join(f"{name} = excluded.{name}" for name in known)
                self._database.execute(
                    f"INSERT INTO {copied} AS old ({', '.join(known)}) "
                    f"SELECT {', '.join(known)} FROM {schema}.{table} WHERE true "
                    f"ON CONFLICT ({key}) DO UPDATE SET {new} "
                    f"WHERE ({_order('excluded')}) > ({_order('old')})"
                )
        self._database.execute(f"DETACH {schema}")

    def finish(self) -> None:
        """Make the views, which stand before the tables of their names."""
        for table, sources in self._sources.items():
            arms = " UNION ALL ".join(self._arm(table, i) for i in range(len(sources)))
            self._database.execute(f"CREATE TEMP VIEW {table} AS {arms}")
        arms = " UNION ".join(f"SELECT number, name FROM {source}" for source in self._classes)
        self._database.execute(f"CREATE TEMP VIEW classes AS {arms}")

    def _arm(self, table: str, number: int) -> str:
        """The rows of one source that are in no other one better."""
        sources = list(self._sources[table].items())
        source, there = sources[number]
        names = (name if name in there else f"NULL AS {name}" for name in self._columns[table])
        same = " AND ".join(f"b.{name} = a.{name}" for name in self._keys[table])
        missing = [
            f"NOT EXISTS (SELECT 1 FROM {other} AS b WHERE {same} "
            f"AND ({_order('b')}, {i}) > ({_order('a')}, {number}))"
            for i, (other, _) in enumerate(sources)
            if i != number
        ]
        where = " AND ".join(missing) or "true"
        return f"SELECT {', '.join(names)} FROM {source} AS a WHERE {where}"

    def _turn_of(self, schema: str) -> int:
        (turn,) = self._database.execute(f"PRAGMA {schema}.user_version").fetchone()
        return int(turn)


def columns_there(database: sqlite3.Connection, schema: str, table: str) -> set[str]:
    """The names of the columns of a table; none where there is no such table."""
    return {column[1] for column in database.execute(f"PRAGMA {schema}.table_info({table})")}


def _order(row: str) -> str:
    """What is larger of the better row."""
    return f"{row}.error IS NULL, coalesce({row}.turn, 0)"
