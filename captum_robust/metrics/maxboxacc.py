"""MaxBoxAcc and MaxBoxAccV2 (Choe et al., 2020) as torchmetrics classes."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from captum_robust._checks import check_choice
from captum_robust.metrics._counts import CountMetric
from captum_robust.metrics.functional._validate import check_flag
from captum_robust.metrics.functional.box_accuracy import (
    CONTOURS,
    V2_IOU_THRESHOLDS,
    level_hits,
    maxboxacc_ious,
    read_levels,
)


class MaxBoxAcc(CountMetric):
    """The share of images whose largest component's box overlaps by .5, at the best threshold.

    Args:
        contours: ``"component"`` (fast) or ``"polygon"`` (the authors' procedure to the letter).
        inclusive: as in :func:`captum_robust.metrics.functional.maxboxacc_ious`.
        kwargs: of ``torchmetrics.Metric``.

    >>> metric = MaxBoxAcc()
    >>> heat = torch.zeros(1, 8, 8)
    >>> heat[0, 2:4, 1:6] = 1
    >>> metric.update(heat, [torch.tensor([[1.0, 2.0, 6.0, 4.0]])])
    >>> metric.compute().item()
    1.0
    """

    higher_is_better = True
    iou_thresholds: ClassVar[tuple[float, ...]] = (0.5,)
    multi: ClassVar[bool] = False
    hits: Tensor
    samples: Tensor

    def __init__(self, contours: str = "component", inclusive: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice("contours", contours, CONTOURS)
        check_flag("inclusive", inclusive)
        self.contours = contours
        self.inclusive = inclusive
        self._count("hits", len(self.iou_thresholds), 256)
        self._count("samples")
        self._keep_apart(self.iou_thresholds, self.multi, contours, inclusive)

    def update(self, maps: Tensor, ground_truth: Tensor | Sequence[Tensor]) -> None:
        """Add images: maps N×H×W, N ground-truth boxes M_i×4; those without a box don't count.

        The boxes may be one tensor N×M×4, as ``torchmetrics.wrappers.BootStrapper`` needs them.
        """
        ious = maxboxacc_ious(maps, ground_truth, self.multi, self.contours, self.inclusive)
        hits = [level_hits(ious, threshold).sum(dim=0) for threshold in self.iou_thresholds]
        self.hits += torch.stack(hits)
        self.samples += (~ious.isnan().any(dim=1)).sum()

    def compute(self) -> Tensor:
        """Return the accuracy in [0, 1], NaN without images."""
        return read_levels(self.hits / self.samples).amax(dim=1).mean()


class MaxBoxAccV2(MaxBoxAcc):
    """The same with the best of all components' boxes, averaged over overlaps of .3, .5 and .7."""

    iou_thresholds = V2_IOU_THRESHOLDS
    multi = True
