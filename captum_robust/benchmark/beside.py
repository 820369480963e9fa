"""What runs beside the model: metrics in a pool of threads, and one writer of the rows."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from queue import Queue
from types import TracebackType
from typing import Any, TypeVar

import torch

from captum_robust._processes import local_world_size
from captum_robust._threads import begin_thread
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore

Made = TypeVar("Made")
_MOST_THREADS = 4
_WAITING = 8
"""So many tasks' rows may wait for the writer; then the model waits too, so memory is bounded."""


class Turns:
    """Who uses the cores when. Where the model needs all, what is timed has them for itself.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        spare = cores() - torch.get_num_threads()
        self._is_shared = device.type == "cpu" and spare < 1
        free = cores() if self._is_shared or device.type != "cpu" else spare
        self.threads = max(1, min(_MOST_THREADS, free))
        """That measure beside the model."""
        self._changed = threading.Condition()
        self._is_timed = False
        self._working = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Inside, the time of a method is taken."""
        if not self._is_shared:
            yield
            return
        with self._changed:
            self._is_timed = True
            self._changed.wait_for(lambda: self._working == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_timed = False
                self._changed.notify_all()

    @contextmanager
    def working(self) -> Iterator[None]:
        """Inside, a thread of the pool works; what is timed later waits for it."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_timed)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, an image is read; nothing waits for its end, as it may be that of a network."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_timed)
        yield


class Pool:
    """Threads that measure beside the model.

    Args:
        turns: say how many, and when they may.
    """

    def __init__(self, turns: Turns) -> None:
        self._turns = turns
        self.size = turns.threads
        self._threads = ThreadPoolExecutor(turns.threads, "captum-robust-measuring", begin_thread)

    def submit(self, make: Callable[..., Made], *arguments: Any) -> Future[Made]:
        """What the call will return."""

        def work() -> Made:
            with self._turns.working():
                return make(*arguments)

        return self._threads.submit(work)

    def submit_parts(self, make: Callable[..., Made], *columns: Any) -> list[Future[Made]]:
        """What the calls with a part of each column will return, a part for each thread.

        Columns are as long as each other, or None.
        """
        n = len(columns[0])
        count = min(self.size, n)
        parts = [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
        return [
            self.submit(make, *(None if column is None else column[part] for column in columns))
            for part in parts
        ]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)


class Writer:
    """Writes rows in a thread of its own, those that wait in one transaction.

    Left without an error, or by Ctrl-C, all that it was given is written.

    Args:
        store: of the run.

    Raises:
        OSError: as of :meth:`RunStore.write`, at the next call or the end.
    """

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._given: Queue[_Rows | None] = Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._work, name="captum-robust-writing", daemon=True
        )

    def write(
        self, results: list[ResultRow], images: list[ImageRow], attacked: list[AttackRow]
    ) -> None:
        """Have rows written, together or not at all."""
        self._raise()
        self._given.put((results, images, attacked))

    def wait(self) -> None:
        """Return when all that was given is written."""
        self._given.join()
        self._raise()

    def __enter__(self) -> Writer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._given.put(None)
        self._thread.join()
        if error is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        more = True
        while more:
            waiting = [self._given.get()]
            while not self._given.empty():
                waiting.append(self._given.get_nowait())
            more = waiting[-1] is not None
            rows = [one for one in waiting if one is not None]
            if self._error is None and rows:
                try:
                    self._store.write(*map(chain.from_iterable, zip(*rows, strict=True)))
                except BaseException as error:  # for the thread of the model
                    self._error = error
            for _ in waiting:
                self._given.task_done()


_Rows = tuple[list[ResultRow], list[ImageRow], list[AttackRow]]


def cores() -> int:
    """How many cores this process has, of those that its machine lends to all its ranks."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (mine or 1) // local_world_size())
