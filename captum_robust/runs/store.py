"""A run on disk: its configuration in run.json, its rows in SQLite, written in transactions."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_robust._checks import check, printable, refusal, valid_unicode
from captum_robust._facts import checked_facts
from captum_robust._files import (
    check_folder,
    check_same_run,
    remove_parts,
    special_file,
    write_whole,
)
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.run_form import RUN_FORM

_ROWS = "rows.sqlite"
_LOCK_SECONDS = 120
_LEAST_ROOM = 2**20
"""Bytes below which a disk is full: SQLite says "disk I/O error" of that too."""
_NOT_NOW = ("disk I/O", "is full", "locked", "readonly", "unable to open")
"""What SQLite says where the file may be whole; else it has other tables, or is damaged."""
_NO_RUN = "is not a run's description"


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
_TABLES: tuple[tuple[str, type[Any], str], ...] = (
    ("images", ImageRow, "position"),
    ("results", ResultRow, "method, attack, position"),
    ("attacked", AttackRow, "attack, position"),
)
"""Name, row and primary key of each."""


def _schema() -> Iterator[str]:
    """The statements that make the tables: a column for each field of their rows."""
    yield "CREATE TABLE IF NOT EXISTS classes (number INTEGER PRIMARY KEY, name TEXT NOT NULL)"
    for table, row, key in _TABLES:
        columns = ", ".join(f"{name} {kind}" for name, kind in _columns(row).items())
        kind = "" if table == "images" else " WITHOUT ROWID"
        yield f"CREATE TABLE IF NOT EXISTS {table} ({columns}, PRIMARY KEY ({key})){kind}"


def _columns(row: type[Any]) -> dict[str, str]:
    """The type of the column of each field of a row."""
    kinds = {f.name: _SQL_TYPES[str(f.type).removesuffix(" | None")] for f in fields(row)}
    needed = {f.name for f in fields(row) if f.default is MISSING}
    return {name: f"{kind} NOT NULL" if name in needed else kind for name, kind in kinds.items()}


class RunStore:
    """The folder of one run.

    Args:
        folder: made if it is not there.
        configuration: what the rows depend on. None: open an existing run to read it.

    Raises:
        ValueError: the folder holds a run with another configuration (the message shows the
            difference), or something else; or it is a file.
        FileNotFoundError: no run to read.
        OSError: the rows are there but cannot be used now, as on a full disk.
    """

    def __init__(self, folder: Path, configuration: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        described = self.folder / "run.json"
        if configuration is None:
            if not described.is_file():
                raise FileNotFoundError(refusal(f"no run in {self.folder}: run.json is missing"))
            self.configuration = _read(described)
            known = {k: v for k, v in self.configuration.items() if k in RUN_FORM}
            checked_facts(str(described), "description of a run", known, RUN_FORM)
        else:
            self.configuration = json.loads(json.dumps(configuration))
            self._threads = torch.get_num_threads()
            self._claim(described)
        file = self.folder / _ROWS
        try:
            self._database = sqlite3.connect(file, timeout=_LOCK_SECONDS, isolation_level=None)
            self._enter_wal_mode()
            self._database.execute("PRAGMA synchronous=NORMAL")
            for statement in _schema():
                self._database.execute(statement)
            self._add_columns()
            self.count(0, 0, ())
        except (sqlite3.Error, UnicodeError) as error:
            raise _unopened(file, error) from None
        if configuration is None:
            self._check_values()

    def _claim(self, described: Path) -> None:
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Before the look at run.json, which another process that starts now writes first.
        names = sorted(path.name for path in self.folder.iterdir())
        if not described.exists():
            another = "give an empty or a new folder"
            unknown = f"{self.folder} holds rows without run.json, which says what of; {another}"
            check(_ROWS not in names, unknown)
            others = [n for n in names if not (n.startswith(".") and n.endswith(".part"))]
            listed = ", ".join(others[:3])
            check(not others, f"{self.folder} holds no run but other files ({listed}); {another}")
            self._describe(described, self.configuration, keep=True)
        there = _read(described)
        self._threads = there.pop("threads", self._threads)
        self._hold_to(there)
        was_away = None in (_checksums(there) or {}).values()
        if was_away and None not in (_checksums(self.configuration) or {}).values():
            there["dataset"] = self.configuration["dataset"]
            self._describe(described, there)
        remove_parts(self.folder, shared=True, below=True)

    def _describe(self, path: Path, facts: Mapping[str, Any], *, keep: bool = False) -> None:
        text = json.dumps({**facts, "threads": self._threads}, indent=2)
        write_whole(path, text + "\n", keep=keep)

    def warn_of_threads(self) -> None:
        """Warn where rows are made with another number of threads than that of the run."""
        there, here = self._threads, torch.get_num_threads()
        if there != here:
            warnings.warn(
                f"{printable(str(self.folder))}: the run began with {there} threads, here are "
                f"{here}: sums differ in their last digits, and perceptual_ball by more; for the "
                f"same rows set OMP_NUM_THREADS={there}",
                stacklevel=2,
            )

    def _hold_to(self, there: Mapping[str, Any]) -> None:
        """Refuse a run with other facts, but for those of data of which one side knows nothing.

        Such as where a file was away, or in a run of an earlier version.
        """
        here: Mapping[str, Any] = self.configuration
        before, now = _checksums(there), _checksums(here)
        if now is not None:
            before = dict.fromkeys(now) if before is None else before
            unknown = {k: None for side in (before, now) for k, crc in side.items() if crc is None}
            there = _with_checksums(there, before | unknown)
            here = _with_checksums(here, now | unknown)
        check_same_run(self.folder, there, here, "versions")

    def _enter_wal_mode(self) -> None:
        """Many readers beside one writer; a killed process leaves whole transactions.

        SQLite's own timeout does not cover this switch, which processes that start together race
        for.
        """
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > end:
                    raise
                time.sleep(0.01)

    def _add_columns(self) -> None:
        """Add those that a run of an earlier version does not have, empty."""
        with self._transaction() as database:
            for table, row, _ in _TABLES:
                there = {column[1] for column in database.execute(f"PRAGMA table_info({table})")}
                for name, kind in _columns(row).items():
                    if name not in there:
                        database.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")

    def _check_values(self) -> None:
        """Refuse values of another type than their column, or out of its range."""
        for table, row, _ in _TABLES:
            odd = []
            for name, kind in _columns(row).items():
                stored = [kind.partition(" ")[0].lower(), *([] if "NOT" in kind else ["null"])]
                odd.append(f"typeof({name}) NOT IN ({', '.join(map(repr, stored))})")
            for name in _RANGES.keys() & _columns(row).keys():
                low, high = _RANGES[name]
                odd.append(f"{name} NOT BETWEEN {low - _SLACK} AND {high + _SLACK}")
            found = list(self.select(f"SELECT 1 FROM {table} WHERE {' OR '.join(odd)} LIMIT 1"))
            where = f"{self.folder / _ROWS}: damaged, or of something else"
            check(not found, f"{where} (a value in its {table}); give another folder")

    def close(self) -> None:
        """Close the database; the rows are safe without it."""
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        try:
            self._database.execute("BEGIN IMMEDIATE")
            yield self._database
            self._database.execute("COMMIT")
        except BaseException as error:
            # Of a full disk SQLite has rolled back by itself; a second time would hide the reason.
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise _unopened(self.folder / _ROWS, error) from None
            raise

    def write(
        self,
        results: Iterable[ResultRow],
        images: Iterable[ImageRow] = (),
        attacked: Iterable[AttackRow] = (),
    ) -> None:
        """Write rows in one transaction: all of them or, if the process dies, none.

        A row with an error takes the place of none without: a file may be away for a while.

        Raises:
            OSError: they cannot be written now, as on a full disk.
        """
        with self._transaction() as database:
            for (table, row, key), rows in zip(_TABLES, (images, results, attacked), strict=True):
                names = [field.name for field in fields(row)]
                marks = ", ".join("?" * len(names))
                new = ", ".join(f"{name} = excluded.{name}" for name in names)
                database.executemany(
                    f"INSERT INTO {table} ({', '.join(names)}) VALUES ({marks}) "
                    f"ON CONFLICT ({key}) DO UPDATE SET {new} "
                    f"WHERE excluded.error IS NULL OR {table}.error IS NOT NULL",
                    ([_plain(getattr(one, name)) for name in names] for one in rows),
                )

    def write_classes(self, names: Iterable[str]) -> None:
        """Keep the names of the model's classes with the run."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO classes VALUES (?, ?)", enumerate(map(_plain, names))
            )

    def count(self, start: int, stop: int, kept: Collection[int]) -> dict[tuple[str, str], int]:
        """How many rows each (method, attack) has for the positions from start to stop.

        Those with errors count where their position is one of ``kept``.
        """
        marks = ", ".join("?" * len(kept))
        rows = self.select(
            "SELECT method, attack, count(*) AS n FROM results WHERE position >= ? AND position < ?"
            f" AND (error IS NULL OR position IN ({marks})) GROUP BY method, attack",
            (start, stop, *kept),
        )
        return {(row["method"], row["attack"]): row["n"] for row in rows}

    def failed_attacks(self, start: int, stop: int, kept: Collection[int]) -> set[str]:
        """The attacks with rows with errors for the positions from start to stop without ``kept``.

        They may be so alone, where the rows of all methods are good.
        """
        marks = ", ".join("?" * len(kept))
        rows = self.select(
            "SELECT DISTINCT attack FROM attacked WHERE position >= ? AND position < ? "
            f"AND error IS NOT NULL AND position NOT IN ({marks})",
            (start, stop, *kept),
        )
        return {row["attack"] for row in rows}

    def total(self) -> int:
        """How many result rows there are."""
        return sum(row["n"] for row in self.select("SELECT count(*) AS n FROM results"))

    def select(self, sql: str, parameters: Iterable[Any] = ()) -> Iterator[dict[str, Any]]:
        """Rows of a query, one at a time.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read now.
        """
        cursor = self._database.cursor()
        cursor.row_factory = sqlite3.Row
        try:
            yield from map(dict, cursor.execute(sql, tuple(parameters)))
        except (sqlite3.Error, UnicodeError) as error:
            raise _unopened(self.folder / _ROWS, error) from None


def pack(tensor: Tensor) -> bytes:
    """The values, compressed: whole numbers as they are, others as float32."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.is_floating_point():
        tensor = tensor.to(torch.float32)
    return zlib.compress(tensor.numpy().tobytes(), level=1)


def unpack(data: bytes, dtype: type[np.generic] = np.float32) -> np.ndarray[Any, Any]:
    """The flat values that :func:`pack` compressed.

    Raises:
        ValueError: others, as in a damaged file.
    """
    try:
        return np.frombuffer(zlib.decompress(data), dtype=dtype)
    except (zlib.error, TypeError, ValueError) as error:
        raise ValueError(f"{_ROWS}: damaged, or of something else ({error})") from None


def _checksums(described: Mapping[str, Any]) -> dict[str, int | None] | None:
    """Those of the parts of a run's data set, None of one that could not be looked at."""
    data = described["dataset"]
    sums = data.get("checksums") if isinstance(data, dict) else None
    return sums if isinstance(sums, dict) else None


def _with_checksums(described: Mapping[str, Any], sums: Mapping[str, Any]) -> Mapping[str, Any]:
    data = described["dataset"]
    is_known = isinstance(data, dict)
    return {**described, "dataset": {**data, "checksums": sums}} if is_known else described


def _unopened(file: Path, error: Exception) -> ValueError | OSError:
    """Why the rows cannot be opened; only of what holds none is it said to delete it."""
    text = str(error)
    if "not a database" in text:
        given = "delete it or give another folder"
        return ValueError(refusal(f"{file}: no rows of a run ({text}); {given}"))
    if any(reason in text for reason in _NOT_NOW):
        with suppress(OSError):
            if shutil.disk_usage(file.parent).free < _LEAST_ROOM:
                text += "; the disk is full"
        return OSError(refusal(f"{file}: cannot be used now ({text}); what it holds is kept"))
    damaged = f"damaged, or of something else ({text}); give another folder"
    return ValueError(refusal(f"{file}: {damaged}"))


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return valid_unicode(value)  # SQLite takes no other
    return json.dumps(value) if isinstance(value, list) else value


def _read(described: Path) -> dict[str, Any]:
    what = special_file(described)
    check(what is None, f"{described} is {what}, and not a run's description")
    try:
        content = json.loads(described.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(refusal(f"{described} {_NO_RUN} ({error})")) from None
    is_one = isinstance(content, dict) and {"model", "dataset", "settings"} <= content.keys()
    check(is_one, f"{described} {_NO_RUN}")
    return content  # type: ignore[no-any-return]
