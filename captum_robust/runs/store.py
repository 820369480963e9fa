"""A run on disk: its configuration in run.json, its rows in SQLite, a file for each rank."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
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
from captum_robust._processes import is_first, rank, world_size
from captum_robust.runs.rank_files import (
    columns_there,
    copy_rows,
    holds_rows,
    other_files,
    rows_file,
    union,
    uri_of,
)
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.run_form import RUN_FORM
from captum_robust.runs.schema import (
    TABLES,
    check_values,
    columns_of,
    index_statements,
    table_statements,
)

_ROWS = rows_file(0)
_LOCK_SECONDS = 120
_LEAST_ROOM = 2**20
"""Bytes below which a disk is full: SQLite says "disk I/O error" of that too."""
_NEEDED = {"position", "method", "attack", "image", "file", "error", "turn"}
"""What tells of a row whether it has to be made again."""
_NOT_NOW = ("disk I/O", "is full", "locked", "readonly", "unable to open")
"""What SQLite says where the file may be whole; else it has other tables, or is damaged."""
_NO_RUN = "is not a run's description"


class RunStore:
    """The folder of one run.

    Each rank writes a file of its own, which nobody else opens while it does: on a network file
    system SQLite can't be trusted with two. One process has "rows.sqlite", rank r "rows.r.sqlite".
    To read, and to go on, the rows of all files are one table, whatever wrote them; where there
    are several, one that reads has those of the moment in which it was opened.

    Args:
        folder: made if it is not there.
        configuration: what the rows depend on. None: open an existing run to read it.
        lazy: open the files with the rows, and check what is in them, when the first is asked for.

    Raises:
        ValueError: the folder holds a run with another configuration (the message shows the
            difference), or something else; or it is a file.
        FileNotFoundError: no run to read.
        OSError: the rows are there but cannot be used now, as on a full disk.
    """

    def __init__(
        self,
        folder: Path,
        configuration: Mapping[str, Any] | None = None,
        *,
        lazy: bool = False,
    ) -> None:
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
        self._is_writer = configuration is not None
        number = rank() if self._is_writer and world_size() > 1 else 0
        self._file = self.folder / rows_file(number)
        self._turn: int | None = None
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        if not lazy:
            self._open()

    @property
    def _database(self) -> sqlite3.Connection:
        return self._connection or self._open()

    def _open(self) -> sqlite3.Connection:
        with self._named(self._file):
            uri, limit = uri_of(self._file, "rwc"), _LOCK_SECONDS
            # A run looks at its rows in one thread and writes them in another, in turn.
            options: dict[str, Any] = {"isolation_level": None, "check_same_thread": False}
            opened: sqlite3.Connection = sqlite3.connect(uri, timeout=limit, uri=True, **options)
        self._connection = opened
        try:
            self._prepare()
        except BaseException:
            self._connection = None
            opened.close()
            raise
        return opened

    def _prepare(self) -> None:
        """Make the tables, or hold those that are there to what they should be."""
        with self._named(self._file):
            self._database.execute("PRAGMA temp_store=FILE")
            if self._is_writer:
                self._set_journal()
            for statement in table_statements():
                self._database.execute(statement)
            self._add_columns()
            # To read a run nothing is added to its files.
            for statement in index_statements() if self._is_writer else ():
                self._database.execute(statement)
            self.of_positions("results", "", 0, 0, [{"method": "", "attack": ""}])
            if not self._is_writer:
                check_values(self._database, "main", self._file)
                self._join()

    def _claim(self, described: Path) -> None:
        check_folder(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        # Before the look at run.json, which another process that starts now writes first.
        names = sorted(path.name for path in self.folder.iterdir())
        if not described.exists():
            another = "give an empty or a new folder"
            unknown = f"{self.folder} holds rows without run.json, which says what of; {another}"
            check(not holds_rows(names), unknown)
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
        check_same_run(self.folder, there, here, ("versions", "kinds"))

    def begin(self) -> None:
        """Look at the rows of the other files; every rank does before the first of them writes.

        What is there counts as done, whoever made it.
        """
        if is_first():
            remove_parts(self.folder, shared=True, below=True)
        self._join()

    def _join(self) -> None:
        """Let the name of each table mean its rows in all files, those of the others as they are.

        They are copied to a temporary file, as SQLite opens no more than ten, and plans no queries
        well over a union: whole to read, and to write what :data:`_NEEDED` names.
        """
        others = other_files(self._file)
        if not others:
            return
        prefix = "temp.copied_" if self._is_writer else "temp."
        for statement in (*table_statements(prefix), *index_statements(prefix)):
            self._database.execute(statement)
        turns = [] if self._is_writer else [self._copy("main", prefix)]
        for file in others:
            with self._named(file):
                self._database.execute("ATTACH ? AS other", (uri_of(file, "rw"),))
                if not self._is_writer:
                    check_values(self._database, "other", file)
                turns.append(self._copy("other", prefix))
                self._database.execute("DETACH other")
        if not self._is_writer:
            return
        (own,) = self._database.execute("PRAGMA main.user_version").fetchone()
        self._turn = 1 + max(own, *turns)
        for table, row, key in TABLES:
            names = [name for name in columns_of(row) if name in _NEEDED]
            both = union(f"main.{table}", prefix + table, key.split(", "), names)
            self._database.execute(f"CREATE TEMP VIEW {table} AS {both}")

    def _copy(self, schema: str, prefix: str) -> int:
        """Copy the rows of a file, and return the last turn that it was written in."""
        for table, row, key in TABLES:
            there = columns_there(self._database, schema, table)
            names = [
                n for n in columns_of(row) if n in there and (n in _NEEDED or not self._is_writer)
            ]
            if there:  # else its process was killed before it had made the tables
                copied = copy_rows(f"{schema}.{table}", prefix + table, key.split(", "), names)
                self._database.execute(copied)
        if columns_there(self._database, schema, "classes"):
            named = f"SELECT number, name FROM {schema}.classes"
            self._database.execute(f"INSERT OR IGNORE INTO {prefix}classes {named}")
        (turn,) = self._database.execute(f"PRAGMA {schema}.user_version").fetchone()
        return int(turn)

    @contextmanager
    def _named(self, file: Path) -> Iterator[None]:
        """Give what SQLite says of a file its name."""
        try:
            yield
        except (sqlite3.Error, UnicodeError) as error:
            raise _unopened(file, error) from None

    def _set_journal(self) -> None:
        """Choose how a killed process leaves whole transactions: WAL if it is of one process.

        There readers don't wait for the writer; but all who open the file must share memory, which
        machines can't. SQLite's own timeout does not cover the switch, which processes that start
        together race for.
        """
        mode = "wal" if world_size() == 1 else "delete"
        end = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                (now,) = self._database.execute(f"PRAGMA journal_mode={mode}").fetchone()
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                if time.monotonic() > end:
                    remedy = "close what has it open, such as a notebook"
                    raise sqlite3.OperationalError(f"{error}; {remedy}") from None
                time.sleep(0.01)
                continue
            if now == "wal":  # else a failing power could harm the file
                self._database.execute("PRAGMA synchronous=NORMAL")
            return

    def _add_columns(self) -> None:
        """Add those that a run of an earlier version does not have, empty."""
        if not self._missing_columns():
            return  # a reader takes no lock
        with self._transaction() as database:
            for table, name, kind in self._missing_columns():
                database.execute(f"ALTER TABLE {table} ADD COLUMN {name} {kind}")

    def _missing_columns(self) -> list[tuple[str, str, str]]:
        """Table, name and type of each."""
        there = {table: columns_there(self._database, "main", table) for table, _, _ in TABLES}
        return [
            (table, name, kind)
            for table, row, _ in TABLES
            for name, kind in columns_of(row).items()
            if name not in there[table]
        ]

    def close(self) -> None:
        """Close the database; the rows are safe without it.

        Who was the last to write leaves a file that needs no shared memory to be read.
        """
        if self._connection is None:
            return
        with suppress(sqlite3.Error):  # another process has it open, or there is no room
            if self._is_writer:
                self._database.execute("PRAGMA busy_timeout=0")
                self._database.execute("PRAGMA journal_mode=DELETE")
        self._database.close()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                yield self._database
                self._database.execute("COMMIT")
            except BaseException as error:
                # Of a full disk SQLite has rolled back by itself; again would hide the reason.
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                if isinstance(error, sqlite3.OperationalError):
                    raise _unopened(self._file, error) from None
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
            for (table, row, key), rows in zip(TABLES, (images, results, attacked), strict=True):
                names = [*columns_of(row)]
                marks = ", ".join("?" * len(names))
                new = ", ".join(f"{name} = excluded.{name}" for name in names)
                database.executemany(
                    f"INSERT INTO main.{table} AS old ({', '.join(names)}) VALUES ({marks}) "
                    f"ON CONFLICT ({key}) DO UPDATE SET {new} "
                    f"WHERE excluded.error IS NULL OR old.error IS NOT NULL",
                    ([*map(_plain, vars(one).values()), self._turn] for one in rows),
                )

    def write_classes(self, names: Iterable[str]) -> None:
        """Keep the names of the model's classes with the run."""
        with self._transaction() as database:
            database.executemany(
                "INSERT OR REPLACE INTO main.classes VALUES (?, ?)", enumerate(map(_plain, names))
            )
            if self._turn is not None:
                database.execute(f"PRAGMA main.user_version={self._turn}")

    def of_positions(
        self, table: str, columns: str, start: int, stop: int, keys: Iterable[Mapping[str, str]]
    ) -> list[dict[str, Any]]:
        """Position, error and ``columns`` of the rows of positions from start to stop.

        ``keys`` are the values of the other columns of the table's primary key, by whose index rows
        are found: each call reads what it returns, however many rows there are.
        """
        found = []
        for key in keys:
            same = "".join(f"{name} = ? AND " for name in key)
            named = ", ".join((*key, "position", "error", *filter(None, [columns])))
            sql = f"SELECT {named} FROM {table} WHERE {same}position >= ? AND position < ?"
            with self._lock:
                found += list(self.select(sql, (*key.values(), start, stop)))
        return found

    def version(self) -> int:
        """Another number where another process has written since this was last asked."""
        return int(next(self.select("PRAGMA data_version"))["data_version"])

    def select(self, sql: str, parameters: Iterable[Any] = ()) -> Iterator[dict[str, Any]]:
        """Rows of a query, one at a time.

        Raises:
            ValueError: the file is damaged.
            OSError: it cannot be read now.
        """
        with self._named(self._file):
            cursor = self._database.execute(sql, tuple(parameters))
            names = [column[0] for column in cursor.description or ()]
            for row in cursor:
                yield dict(zip(names, row, strict=True))

    def ask(self, sql: str, parameters: Iterable[Any] = ()) -> list[dict[str, Any]]:
        """Rows of a query of the user's own, which may change nothing.

        Raises:
            ValueError: it can't be run, or would change the rows; or the file is damaged.
            OSError: as of :meth:`select`.
        """
        self._database.execute("PRAGMA query_only=ON")
        try:
            cursor = self._database.execute(sql, tuple(parameters))
            names = [column[0] for column in cursor.description or ()]
            return [dict(zip(names, row, strict=True)) for row in cursor]
        except (sqlite3.Error, sqlite3.Warning) as error:
            text = str(error)
            is_busy = any(reason in text for reason in _NOT_NOW) and "readonly" not in text
            if is_busy or type(error) is sqlite3.DatabaseError:
                raise _unopened(self._file, error) from None
            tables = ", ".join(["classes", *(table for table, _, _ in TABLES)])
            expected = f"expected one query of the tables {tables}, which changes nothing"
            raise ValueError(refusal(f"sql: {expected}, got {sql!r} ({text})")) from None
        finally:
            self._database.execute("PRAGMA query_only=OFF")


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
