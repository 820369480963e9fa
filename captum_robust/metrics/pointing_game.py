"""The pointing game as a torchmetrics class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_classes, check_count, check_number
from captum_robust.metrics._counts import CountMetric
from captum_robust.metrics.functional.pointing import (
    class_hits,
    mean_over_classes,
    pointing_game_hits,
)


class PointingGame(CountMetric):
    """The share of maps whose largest pixel lies on the object, or close to it.

    Args:
        num_classes: with it, the mean over classes, as published; classes without a map are left
            out. Without it, the plain mean over maps.
        tolerance: in pixels, as in :func:`captum_robust.metrics.functional.pointing_game_hits`.
        kwargs: of ``torchmetrics.Metric``.

    >>> metric = PointingGame(num_classes=3)
    >>> maps = torch.eye(4).view(4, 2, 2)[:2]
    >>> boxes = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])] * 2
    >>> metric.update(maps, boxes, torch.tensor([2, 2]))
    >>> metric.compute().item()
    1.0
    """

    higher_is_better = True
    hits: Tensor
    totals: Tensor

    def __init__(
        self, num_classes: int | None = None, tolerance: float = 15, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_count("num_classes", num_classes, 1, optional=True)
        check_number("tolerance", tolerance, 0, open_low=True)
        self.num_classes = num_classes
        self.tolerance = tolerance
        self._count("hits", num_classes or 1)
        self._count("totals", num_classes or 1)
        self._keep_apart(num_classes, tolerance)

    def update(
        self, maps: Tensor, ground_truth: Tensor | Sequence[Tensor], classes: Tensor | None = None
    ) -> None:
        """Add maps N×H×W with N masks or boxes M_i×4, and N classes if these are averaged."""
        both = (classes is None) == (self.num_classes is None)
        check(both, "classes: expected them with num_classes, got one without the other")
        values = pointing_game_hits(maps, ground_truth, self.tolerance)
        count = len(self.hits)
        if classes is None:
            classes = torch.zeros(len(values), dtype=torch.int64)
        check_classes(classes, len(values), count)
        hits, totals = class_hits(values, classes, count)
        self.hits += hits.long()
        self.totals += totals

    def compute(self) -> Tensor:
        """Return the accuracy in [0, 1], NaN without maps."""
        return mean_over_classes(self.hits, self.totals)
