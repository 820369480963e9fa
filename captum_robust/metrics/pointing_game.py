"""The pointing game as a torchmetrics class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_robust.metrics._settings import settings_state
from captum_robust.metrics.functional.pointing import pointing_game_hits


class PointingGame(Metric):
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
    is_differentiable = False
    full_state_update = False
    hits: Tensor
    totals: Tensor

    def __init__(
        self, num_classes: int | None = None, tolerance: float = 15, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes!r}")
        self.num_classes = num_classes
        self.tolerance = tolerance
        empty = torch.zeros(num_classes or 1, dtype=torch.int64)
        self.add_state("hits", empty, dist_reduce_fx="sum")
        self.add_state("totals", empty.clone(), dist_reduce_fx="sum")
        settings = settings_state(num_classes, tolerance)
        self.add_state("settings", settings, dist_reduce_fx="max")

    def update(
        self,
        maps: Tensor,
        ground_truth: Tensor | Sequence[Tensor],
        classes: Tensor | None = None,
    ) -> None:
        """Add maps N×H×W with N masks or box lists, and N class numbers if classes are averaged."""
        if (classes is None) != (self.num_classes is None):
            raise ValueError("classes go with num_classes: give both or neither")
        hits = pointing_game_hits(maps, ground_truth, self.tolerance)
        if classes is None:
            classes = torch.zeros(len(hits), dtype=torch.int64)
        if classes.shape != hits.shape or classes.is_floating_point():
            raise ValueError(
                f"classes must be {len(hits)} integers, not {tuple(classes.shape)} of "
                f"{classes.dtype}"
            )
        size = len(self.hits)
        if ((classes < 0) | (classes >= size)).any():
            raise ValueError(f"classes must be in [0, {size}), not {classes.tolist()}")
        counted = ~hits.isnan()
        classes = classes.to(hits.device)
        self.hits += torch.bincount(classes[counted & (hits == 1)], minlength=size)
        self.totals += torch.bincount(classes[counted], minlength=size)

    def compute(self) -> Tensor:
        """Return the accuracy in [0, 1], NaN without maps."""
        seen = self.totals > 0
        return (self.hits[seen] / self.totals[seen]).mean()
