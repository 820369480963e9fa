"""PxAP (Choe et al., 2020) as a torchmetrics class."""

from typing import Any

import torch
from torch import Tensor

from captum_robust.metrics._counts import CountMetric
from captum_robust.metrics.functional.pixel_precision import (
    THRESHOLDS,
    pxap_from_histograms,
    pxap_histograms,
)


class PxAP(CountMetric):
    """The average precision of all pixels of all images against masks.

    >>> metric = PxAP()
    >>> metric.update(torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[True, False]]]))
    >>> metric.compute().item()
    1.0
    """

    higher_is_better = True
    histograms: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._count("histograms", 2, THRESHOLDS + 1)

    def update(self, maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> None:
        """Add images: maps N×H×W, masks N×H×W, and pixels that count nowhere, see the function."""
        self.histograms += pxap_histograms(maps, masks, ignore).sum(dim=0)

    def compute(self) -> Tensor:
        """Return PxAP in [0, 1]; NaN when no pixel lay on an object."""
        # Not an error: forward() computes the value of one batch, which may hold empty masks only.
        if not self.histograms[1].any():
            return torch.tensor(torch.nan, device=self.device)
        return pxap_from_histograms(self.histograms)
