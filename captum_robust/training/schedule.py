"""What each step of a training gets: its images, its learning rate, its seed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from captum_robust._checks import check, check_type
from captum_robust._contexts import seeded, seeded_elsewhere
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
    ) -> Iterator[Batch]:
        """Yield the share of one process of each batch that is left after ``done`` steps."""
        settings = self.settings
        share = settings.batch_size // processes
        for epoch in range(done // self.per_epoch, settings.epochs):
            generator = torch.Generator().manual_seed(derived_seed(settings.seed, "order", epoch))
            order = torch.randperm(self.count, generator=generator).tolist()
            numbers = range(max(0, done - epoch * self.per_epoch), self.per_epoch)
            starts = [b * settings.batch_size + process * share for b in numbers]
            loader = DataLoader(
                SeededItems(dataset, settings.seed, epoch),
                batch_sampler=[order[start : start + share] for start in starts],
                num_workers=settings.workers,
                generator=generator,  # else it draws from torch's global one
            )
            for batch in loader:
                yield tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)


class SeededItems(Dataset[Any]):
    """What the data set draws for an item depends on seed, epoch and item only."""

    def __init__(self, dataset: Dataset[Any], seed: int, epoch: int) -> None:
        self.dataset, self.seed, self.epoch = dataset, seed, epoch

    def __getitem__(self, index: int) -> Any:
        seed = derived_seed(self.seed, "item", self.epoch, index)
        with seeded(seed, None), seeded_elsewhere(seed):
            return self.dataset[index]


def derived_seed(seed: int, *parts: object) -> int:
    """Return a seed of its own for each purpose, from 0 to 2⁶³ - 1."""
    digest = hashlib.sha256(" ".join(map(str, (seed, *parts))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
