"""The loop of a run over batches of its images: what is missing is made, and written beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

import torch

from captum_robust._processes import device_of, ranks, together, world_size
from captum_robust._progress import Advance, progress_bar
from captum_robust.benchmark.batches import Batches, BatchReader
from captum_robust.benchmark.beside import Pool, Turns, Writer
from captum_robust.benchmark.reading import Loaded, read_ahead
from captum_robust.runs.machine import Reads, stops
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore

Task = TypeVar("Task")


@dataclass(frozen=True)
class Coming:
    """The rows of one task on one batch, of which some are still measured beside the model."""

    results: Callable[[], list[ResultRow]] = list
    """Waits for them."""
    is_ready: Callable[[], bool] = lambda: True
    attacked: list[AttackRow] = field(default_factory=list)


@dataclass(frozen=True)
class Runner(ABC, Generic[Task]):
    """Makes the rows of a run: each task has one of each image.

    Args:
        reader: of the images.
        store: of the rows; those that are there are not made again.
        tasks: in the order in which they are done.
    """

    reader: BatchReader
    store: RunStore
    tasks: Sequence[Task]

    @abstractmethod
    def missing(self, start: int, stop: int, kept: Collection[int]) -> list[Task]:
        """The tasks that have not all their rows of the positions from start to stop.

        A row with an error is one of the positions ``kept`` only.
        """

    @abstractmethod
    def name_of(self, task: Task) -> str:
        """What the progress bar calls a task."""

    def clean(self, tasks: Sequence[Task], start: int, loaded: Sequence[Loaded]) -> Batches:  # noqa: ARG002
        """The images that could be read, with the classes that the model gives them."""
        return self.reader.clean(loaded)

    @abstractmethod
    def image_rows(self, loaded: Sequence[Loaded], clean: Batches) -> list[ImageRow]:
        """What the run keeps of the images themselves."""

    @abstractmethod
    def rows(
        self, tasks: Sequence[Task], start: int, clean: Batches, pool: Pool
    ) -> Iterator[Coming]:
        """The rows of each of the tasks in turn, of the batch that begins at ``start``."""

    @cached_property
    def turns(self) -> Turns:
        """Who uses the cores when."""
        return Turns(device_of(self.reader.model))

    def run(
        self,
        count: int,
        batch_size: int,
        unit: str,
        progress: bool,
        retry: bool,
        workers: int,
    ) -> None:
        """Make all rows of the first ``count`` images, shared between processes; then close.

        With ``retry`` rows with errors are made again, but for images that still can't be read.

        Raises:
            MachineError: memory or room ran out, or, with ``retry``, the images are away.
        """
        with (
            stops(),
            torch.inference_mode(False),
            ranks() as (rank, world),
            together() as wait,
            closing(self.store),  # before another one reads it
            progress_bar(count * len(self.tasks), unit, progress and rank == 0) as advance,
        ):
            self.store.begin()
            wait()  # nobody writes a file that another one still reads
            self.store.write_classes(self.reader.model.class_names or ())
            starts = range(rank * batch_size, count, world * batch_size)
            batches = [range(start, min(start + batch_size, count)) for start in starts]
            missing = [self.missing(b.start, b.stop, () if retry else b) for b in batches]
            todo = [(b, tasks) for b, tasks in zip(batches, missing, strict=True) if tasks]
            for batch, tasks in zip(batches, missing, strict=True):
                advance(len(batch) * (len(self.tasks) - len(tasks)))
            if todo:
                self._make(todo, advance, retry, workers)

    def _make(
        self,
        todo: Sequence[tuple[range, list[Task]]],
        advance: Advance,
        retry: bool,
        workers: int,
    ) -> None:
        """Make the rows of the tasks of each batch."""
        reads = Reads(self.reader.root)
        self.store.warn_of_threads()
        batches = [batch for batch, _ in todo]
        turn = self.turns.reading
        with (
            # Processes before threads, of which a forked one would have the locks.
            read_ahead(self.reader.samples, batches, workers, turn) as items,
            Writer(self.store) as writer,
            Pool(self.turns) as pool,
            _Waiting(writer, pool, advance) as waiting,
        ):
            for (batch, tasks), loaded in zip(todo, items, strict=True):
                if retry:
                    reads.check([item.error if item.is_away else None for item in loaded])
                    unread = {item.position for item in loaded if item.sample is None}
                    if unread:
                        left = self.missing(batch.start, batch.stop, unread)
                        advance(len(batch) * (len(tasks) - len(left)))
                        tasks = left
                if not tasks:
                    continue
                clean = self.clean(tasks, batch.start, loaded)
                images = self.image_rows(loaded, clean)
                advance.doing(self.name_of(tasks[0]))
                coming = [*map(self.name_of, tasks[1:]), "reading"]
                rows = self.rows(tasks, batch.start, clean, pool)
                for comes, made in zip(coming, rows, strict=True):
                    waiting.add(made, images, len(batch))
                    images = []
                    advance.doing(comes)


class _Waiting:
    """The rows that are still measured, in their order; a few, so that memory is bounded.

    Those of what was explained before an error ends the run are written too.
    """

    def __init__(self, writer: Writer, pool: Pool, advance: Advance) -> None:
        self._writer, self._advance = writer, advance
        # What a killed rank had explained another one would explain again, so it is kept at once.
        self._is_shared = world_size() > 1
        self._most = 0 if self._is_shared else pool.size
        self._rows: deque[tuple[Coming, list[ImageRow], int]] = deque()

    def add(self, coming: Coming, images: list[ImageRow], count: int) -> None:
        self._rows.append((coming, images, count))
        while len(self._rows) > self._most or (self._rows and self._rows[0][0].is_ready()):
            self._write()

    def _write(self) -> None:
        coming, images, count = self._rows.popleft()
        self._writer.write(coming.results(), images, coming.attacked)
        if self._is_shared:
            self._writer.wait()
        self._advance(count)

    def __enter__(self) -> _Waiting:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(*() if kind is None else (Exception,)):  # the first error is the reason
            while self._rows:
                self._write()
