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


class MeasureValues(dict[str, Tensor]):
    """Measure -> value. What is computed of all, as in ``1 - metric``, is of each."""

    @classmethod
    def __torch_function__(
        cls, func: Any, _: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        every = [one for arg in args for one in (arg if isinstance(arg, list) else [arg])]
        names = next(one for one in every if isinstance(one, cls))

        def of(name: str, one: Any) -> Any:
            if isinstance(one, list):  # as torch.stack has
                return [of(name, each) for each in one]
            return one[name] if isinstance(one, cls) else one

        return cls({n: func(*(of(n, one) for one in args), **(kwargs or {})) for n in names})

    def __neg__(self) -> "MeasureValues":
        return MeasureValues({name: -value for name, value in self.items()})

    def __abs__(self) -> "MeasureValues":
        return MeasureValues({name: abs(value) for name, value in self.items()})

    def mean(self, **options: Any) -> "MeasureValues":
        """Return the mean of each, with the arguments of ``torch.mean``; for ``BootStrapper``."""
        return MeasureValues({name: value.mean(**options) for name, value in self.items()})

    def std(self, **options: Any) -> "MeasureValues":
        """Return the standard deviation of each, with the arguments of ``torch.std``."""
        return MeasureValues({name: value.std(**options) for name, value in self.items()})


class AttributionStability(CountMetric):
    """How far maps stay the same under attack, averaged over the images.

    Arguments are those of :func:`captum_robust.metrics.functional.stability`; ``reduce`` is over
    the attacks on an image. The value does not depend on batches, order or sharding: sums are of
    whole millionths.

    Of a single measure, given by its name alone, the value is one number, as
    ``torchmetrics.MetricTracker`` and ``MinMaxMetric`` need; of several it is a dictionary. A
    ``MetricCollection`` of one metric a measure can be tracked as a whole.

    >>> metric = AttributionStability(measures=["spearman", "top_k"])
    >>> maps = torch.arange(4.0).view(1, 2, 2)
    >>> metric.update(maps, 2 * maps)
    >>> {name: value.item() for name, value in metric.compute().items()}
    {'spearman': 1.0, 'top_k': 1.0}
    >>> unstable = 1 - AttributionStability("spearman")
    >>> unstable.update(maps, -maps)
    >>> unstable.compute().item()
    2.0
    """

    higher_is_better = True
    sums: Tensor
    images: Tensor

    def __init__(
        self,
        measures: str | Sequence[str] = STABILITY_MEASURES,
        reduce: str = "mean",
        share: float = 0.1,
        strategy: str = "value",
        alpha: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.single = isinstance(measures, str)
        measures = (measures,) if isinstance(measures, str) else measures
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

    def compute(self) -> Tensor | MeasureValues:
        """Return the mean of each measure, or of the single one, over the images; NaN of none."""
        means = self.sums / (1e6 * self.images)
        return means[0] if self.single else MeasureValues(zip(self.measures, means, strict=True))
