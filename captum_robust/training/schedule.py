"""What each step of a training gets: its images, its learning rate, its seed."""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Generator, Iterator, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from captum_robust._checks import check, check_type
from captum_robust._contexts import seeded, seeded_elsewhere
from captum_robust._processes import begin_worker
from captum_robust.data import DataError
from captum_robust.training.settings import TrainingSettings

Batch = tuple[Tensor, ...]


class Schedule:
    """The steps of a training, all of which follow from its settings and the number of samples.

    Args:
        dataset: what is trained on; only its length counts.
        settings: those of the training.

    Raises:
        TypeError: a data set without a length.
        ValueError: fewer samples than a batch.
    """

    def __init__(self, dataset: Dataset[Any], settings: TrainingSettings) -> None:
        check_type("dataset", dataset, Sized, "one with a length")
        self.count = len(dataset)  # type: ignore[arg-type]
        self.settings = settings
        size = settings.batch_size
        check(self.count >= size, f"batch_size: {size}, but there are {self.count} samples")
        self.per_epoch = self.count // size
        self.steps = self.per_epoch * settings.epochs

    def rate(self, step: int) -> float:
        """Return the share of the highest learning rate in a step; steps count from 0."""
        rising = self.settings.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1.0, self.steps - rising)))

    def batches(
        self, dataset: Dataset[Any], done: int, process: int, processes: int
    ) -> Generator[Batch, None, None]:
        """Yield the share of one process of each batch that is left after ``done`` steps.

        Raises:
            ValueError: what the data set raised in a process that loads images, as it was.
        """
        loader = DataLoader(
            SeededItems(dataset, self.settings.seed),
            batch_sampler=self._numbers(done, process, processes),
            num_workers=self.settings.workers,
            collate_fn=_collated,
            worker_init_fn=begin_worker,
            generator=torch.Generator(),  # else it draws from torch's global one
        )
        for batch in loader:
            if isinstance(batch, _Refusal):
                raise batch.error from RuntimeError(batch.traceback)
            yield tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)

    def _numbers(self, done: int, process: int, processes: int) -> Iterator[list[tuple[int, int]]]:
        """Yield epoch and number of the images of each of these batches."""
        settings = self.settings
        share = settings.batch_size // processes
        for epoch in range(done // self.per_epoch, settings.epochs):
            generator = torch.Generator().manual_seed(derived_seed(settings.seed, "order", epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
            for number in range(max(0, done - epoch * self.per_epoch), self.per_epoch):
                start = number * settings.batch_size + process * share
                yield [(epoch, i) for i in order[start : start + share]]


@dataclass(frozen=True)
class _Refusal:
    """What the data set raised in a process that loads images: torch would wrap its message."""

    error: ValueError
    traceback: str


class SeededItems(Dataset[Any]):
    """What the data set draws for an item depends on seed, epoch and item only.

    Args:
        dataset: its items are asked for by pairs (epoch, index).
        seed: of the training.
    """

    def __init__(self, dataset: Dataset[Any], seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, place: tuple[int, int]) -> Any:
        epoch, index = place
        seed = derived_seed(self.seed, "item", epoch, index)
        try:
            with seeded(seed, None), seeded_elsewhere(seed):
                return self.dataset[index]
        except ValueError as error:
            # Others may not survive the way to the process that trains.
            if get_worker_info() is None or type(error) not in (ValueError, DataError):
                raise
            return _Refusal(error, traceback.format_exc())


def _collated(items: list[Any]) -> Any:
    """The tensors of a batch, or the first refusal."""
    refusals = (item for item in items if isinstance(item, _Refusal))
    return next(refusals, None) or default_collate(items)


def derived_seed(seed: int, *parts: object) -> int:
    """Return a seed of its own for each purpose, from 0 to 2⁶³ - 1."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
