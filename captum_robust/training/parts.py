"""The parts that a batch is cut into, and what is drawn for each image of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust.training.schedule import Batch, derived_seed


@dataclass(frozen=True)
class Part:
    """The images of a batch that one process takes at once.

    What is drawn depends on the seed of the step and on the place of an image in the batch of all
    processes, not on how the batch is cut.
    """

    seed: int
    """Of the step."""
    start: int
    """The place of the first image in the batch of all processes."""
    batch_size: int
    """Images in that batch."""
    share: float = 1.0
    """Of the images that this process has in the batch."""
    is_first: bool = True
    """Of the parts of this process."""
    is_last: bool = True
    generator: torch.Generator | None = None
    """For all that is drawn, where a loss is called with a plain number."""

    def of_batch(self) -> torch.Generator:
        """Return a generator for what is drawn once for the whole batch."""
        return self.generator or torch.Generator().manual_seed(self.seed)

    def of_images(self, n: int) -> list[torch.Generator]:
        """Return a generator for each of the ``n`` images of the part."""
        if self.generator is not None:
            return [self.generator] * n
        seeds = (derived_seed(self.seed, "image", self.start + i) for i in range(n))
        return [torch.Generator().manual_seed(seed) for seed in seeds]


class PartSeed(int):
    """The seed that a loss gets: a number of the part's own, which knows the part."""

    part: Part


def part_of(seed: int, n: int) -> Part:
    """Return the part that a loss of ``n`` images is for; of a plain number the whole batch."""
    if isinstance(seed, PartSeed):
        return seed.part
    return Part(seed, 0, n, generator=torch.Generator().manual_seed(seed))


def parts_of(
    batch: Sequence[Tensor], seed: int, size: int | None, process: int, processes: int, step: int
) -> Iterator[tuple[Batch, PartSeed]]:
    """Yield the parts of what one process has of a batch, each with its seed.

    Args:
        batch: tensors n×…, the share of the process.
        seed: of the training.
        size: images in a part; the last may have fewer; None: all.
        process: its number among ``processes``, each of which has as many images.
        processes: how many share the batch.
        step: its number.
    """
    n = len(batch[0])
    size = n if size is None else min(size, n)
    of_step = derived_seed(seed, "step", step, 0)
    for first in range(0, n, size):
        last = min(first + size, n)
        start = process * n + first
        own = PartSeed(derived_seed(seed, "step", step, start))
        share, is_last = (last - first) / n, last == n
        own.part = Part(of_step, start, n * processes, share, first == 0, is_last)
        yield tuple(t[first:last] for t in batch), own
