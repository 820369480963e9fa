"""The loop of a run over batches of its images: what is missing is made, and written at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import torch

from captum_robust._processes import ranks, together
from captum_robust._progress import progress_bar
from captum_robust.benchmark.batches import Batches, BatchReader, Loaded
from captum_robust.runs.machine import Reads, stops
from captum_robust.runs.rows import AttackRow, ImageRow, ResultRow
from captum_robust.runs.store import RunStore

Task = TypeVar("Task")
Rows: TypeAlias = Iterator[tuple[list[ResultRow], list[AttackRow]]]
"""The rows of one task after the other."""


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

    @abstractmethod
    def image_rows(self, loaded: Sequence[Loaded], clean: Batches) -> list[ImageRow]:
        """What the run keeps of the images themselves."""

    @abstractmethod
    def rows(self, tasks: Sequence[Task], start: int, clean: Batches) -> Rows:
        """The rows of each of the tasks in turn, of the batch that begins at ``start``."""

    def run(self, count: int, batch_size: int, unit: str, progress: bool, retry: bool) -> None:
        """Make all rows of the first ``count`` images, shared between processes; then close.

        With ``retry`` rows with errors are made again, but for images that still can't be read.

        Raises:
            MachineError: memory or room ran out, or, with ``retry``, the images are away.
        """
        reads = Reads(self.reader.root)
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
            for start in range(rank * batch_size, count, world * batch_size):
                stop = min(start + batch_size, count)
                positions = range(start, stop)
                tasks = self.missing(start, stop, () if retry else positions)
                loaded = self.reader.load(start, stop) if tasks else []
                if retry:
                    reads.check([item.error if item.is_away else None for item in loaded])
                    unread = {item.position for item in loaded if item.sample is None}
                    tasks = self.missing(start, stop, unread) if unread else tasks
                advance((stop - start) * (len(self.tasks) - len(tasks)))
                if not tasks:
                    continue
                self.store.warn_of_threads()
                clean = self.reader.clean(loaded)
                images = self.image_rows(loaded, clean)
                advance.doing(self.name_of(tasks[0]))
                coming = [*map(self.name_of, tasks[1:]), "reading"]
                rows = zip(coming, self.rows(tasks, start, clean), strict=True)
                for comes, (results, attacked) in rows:
                    self.store.write(results, images, attacked)
                    images = []
                    advance(stop - start)
                    advance.doing(comes)
