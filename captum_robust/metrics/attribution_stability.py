"""The stability of attribution maps under attack as a torchmetrics class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_robust.metrics._settings import settings_state
from captum_robust.metrics.functional.stability import (
    STABILITY_MEASURES,
    check_measures,
    check_stability_settings,
    stability,
)
from captum_robust.metrics.functional.weak_localization import millionths


class AttributionStability(Metric):
    """How far maps stay the same under attack, averaged over the images.

    Arguments are those of :func:`captum_robust.metrics.functional.stability`; ``reduce`` is over
    the attacks on an image. The value does not depend on batches, order or sharding: sums are of
    whole millionths.

    >>> metric = AttributionStability(measures=["spearman", "top_k"])
    >>> maps = torch.arange(4.0).view(1, 2, 2)
    >>> metric.update(maps, 2 * maps)
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'spearman': 1.0, 'top_k': 1.0}
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    sums: Tensor
    images: Tensor

    def __init__(
        self,
        measures: Sequence[str] = STABILITY_MEASURES,
        reduce: str = "mean",
        share: float = 0.1,
        strategy: str = "value",
        alpha: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_measures(measures)
        check_stability_settings(reduce, share, strategy, alpha)
        self.measures = tuple(measures)
        self.reduce = reduce
        self.share = share
        self.strategy = strategy
        self.alpha = alpha
        empty = torch.zeros(len(self.measures), dtype=torch.int64)
        self.add_state("sums", empty, dist_reduce_fx="sum")
        self.add_state("images", torch.tensor(0), dist_reduce_fx="sum")
        settings = settings_state(self.measures, reduce, share, strategy, alpha)
        self.add_state("settings", settings, dist_reduce_fx="max")

    def update(self, clean: Tensor, attacked: Tensor) -> None:
        """Add images: their clean maps N×H×W, and those under attack A×N×H×W or N×H×W."""
        found = stability(
            clean,
            attacked,
            measures=self.measures,
            reduce=self.reduce,
            share=self.share,
            strategy=self.strategy,
            alpha=self.alpha,
        )
        self.sums += torch.stack([millionths(v).sum() for v in found.values()]).to(self.sums.device)
        self.images += len(clean)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each measure over the images; NaN without any."""
        means = self.sums / (1e6 * self.images)
        return dict(zip(self.measures, means, strict=True))
