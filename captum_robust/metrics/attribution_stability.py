"""The stability of attribution maps under attack as a torchmetrics class."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust.metrics._counts import CountMetric
from captum_robust.metrics.functional.folds import millionths
from captum_robust.metrics.functional.stability import (
    STABILITY_MEASURES,
    check_stability_settings,
    stability,
)


class AttributionStability(CountMetric):
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
        check_stability_settings(measures, reduce, share, strategy, alpha)
        self.measures = tuple(measures)
        self.reduce = reduce
        self.share = share
        self.strategy = strategy
        self.alpha = alpha
        self._count("sums", len(self.measures))
        self._count("images")
        self._keep_apart(self.measures, reduce, share, strategy, alpha)

    def update(self, clean: Tensor, attacked: Tensor) -> None:
        """Add images: their clean maps N×H×W, and those under attack A×N×H×W or N×H×W."""
        values = stability(
            clean,
            attacked,
            measures=self.measures,
            reduce=self.reduce,
            share=self.share,
            strategy=self.strategy,
            alpha=self.alpha,
        )
        sums = torch.stack([millionths(v).sum() for v in values.values()])
        self.sums += sums.to(self.sums.device)
        self.images += len(clean)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each measure over the images; NaN without any."""
        means = self.sums / (1e6 * self.images)
        return dict(zip(self.measures, means, strict=True))
