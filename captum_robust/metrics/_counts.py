"""What the metric classes share: whole numbers that add up, and settings that keep them apart."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_robust._checks import check
from captum_robust.metrics.functional.folds import folds_of


class CountMetric(Metric):
    """A metric whose states are whole numbers, summed over batches and processes.

    So its value does not depend on batches, order or sharding.
    """

    is_differentiable = False
    full_state_update = False

    def _count(self, name: str, *shape: int) -> None:
        """Add a state of zeros, int64."""
        self.add_state(name, torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **options: Any) -> Any:
        def moved(state: Tensor) -> Tensor:
            cast = fn(state)
            # set_dtype would make numbers with a fraction, or too small, of counts.
            return cast if cast.dtype == state.dtype else state.to(cast.device)

        return super()._apply(moved, *args, **options)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Draw a value, or a list of them in order, as torchmetrics' own metrics do.

        Args:
            val: what ``compute`` or ``forward`` returned, or a list of that; None: the value now.
            ax: the matplotlib axes to draw on; None: new ones.

        Returns:
            The figure and its axes.

        Raises:
            ModuleNotFoundError: no matplotlib.
        """
        return self._plot(val, ax)

    def _keep_apart(self, *settings: object) -> None:
        """Add a number for the settings as a state reduced by "max".

        ``MetricCollection`` lets metrics share their states once these have been equal after a
        first batch; this one differs wherever the settings do.
        """
        number = torch.tensor(crc32(repr(settings).encode()))
        self.add_state("settings", number, dist_reduce_fx="max")


class FoldMetric(CountMetric):
    """A metric with a threshold that is tuned on one fold of the images and read on the other.

    ``samples`` counts the images of each fold; with ``single`` all are in the first one.
    """

    higher_is_better = False
    single: bool
    seed: int
    samples: Tensor

    def _folds(self, n: int, ids: Sequence[Hashable] | None) -> Tensor:
        """Return the fold of each of n images."""
        known = ids is not None or self.single
        check(known, "ids: expected those of the images, for the folds, got None")
        return folds_of(n, ids, None, self.seed, self.single).to(self.device)

    def _value(self) -> Tensor:
        """Return the value of the images so far, where each fold that is needed has any."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """Return the value; NaN without images, or if only one of two folds has any."""
        # Not an error: forward() computes the value of one batch, which may be a single image.
        if not self.samples[: 1 if self.single else 2].all():
            return torch.tensor(torch.nan, device=self.device)
        return self._value()
