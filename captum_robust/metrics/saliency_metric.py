"""The saliency metric as a torchmetrics class."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check_count, check_number, check_shape
from captum_robust.metrics._counts import FoldMetric
from captum_robust.metrics.functional._validate import check_flag, check_maps, check_seed
from captum_robust.metrics.functional.folds import fold_sums, millionths
from captum_robust.metrics.functional.saliency import (
    Scores,
    check_question,
    check_thresholds,
    crop_scores,
    lowest_columns,
    saliency_boxes,
    saliency_metric,
    saliency_of,
)
from captum_robust.metrics.functional.thresholding import check_alpha


class SaliencyMetric(FoldMetric):
    """log(max(a, .05)) - log p of the tightest crop, averaged over the images; lower is better.

    See :func:`captum_robust.metrics.functional.saliency_metric`. The classifier is an argument of
    ``update``, so that the metric holds no copy of it. The value does not depend on batches, order
    or sharding: sums are of whole millionths, and an image's fold follows from its id.

    Args:
        threshold: pixels above it are salient.
        strategy: the family of the threshold, as in the function; None: the unit of the masks.
        thresholds: choose instead: for each family the thresholds to choose from (such as
            :data:`captum_robust.metrics.functional.SALIENCY_THRESHOLDS`), each half of the images
            scored with the one that does best on the other half.
        oracle: choose on the very images that are reported; ids are then not needed.
        seed: of the split.
        batch_size: how many crops the classifier gets at once; None: as for the function.
        kwargs: of ``torchmetrics.Metric``.

    >>> def model(x):
    ...     return torch.tensor([0.8, 0.2]).log().expand(len(x), 2)
    >>> metric = SaliencyMetric()
    >>> mask = torch.zeros(1, 8, 8)
    >>> mask[0, 2:6, 2:6] = 1
    >>> metric.update(model, torch.rand(1, 3, 8, 8), mask, torch.tensor([0]))
    >>> round(metric.compute().item(), 4)  # log .25 - log .8
    -1.1632
    """

    sums: Tensor

    def __init__(
        self,
        threshold: float = 0.5,
        strategy: str | None = None,
        *,
        thresholds: Mapping[str, Sequence[float]] | None = None,
        oracle: bool = False,
        seed: int = 0,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if thresholds is not None:
            check_thresholds(thresholds)
            thresholds = {family: tuple(alphas) for family, alphas in thresholds.items()}
        if strategy is None:
            check_number("threshold", threshold)
        else:
            check_alpha(strategy, threshold, "threshold")
        check_flag("oracle", oracle)
        check_seed(seed)
        check_count("batch_size", batch_size, 1, optional=True)
        self.threshold = threshold
        self.strategy = strategy
        self.thresholds = thresholds
        self.oracle = oracle
        self.seed = seed
        self.batch_size = batch_size
        self.single = oracle or thresholds is None
        columns = 1 if thresholds is None else sum(map(len, thresholds.values()))
        self._count("sums", 2, columns)
        self._count("samples", 2)
        self._keep_apart(threshold, strategy, thresholds, oracle, seed)

    def update(
        self,
        model: Scores,
        images: Tensor,
        masks: Tensor,
        classes: Tensor,
        ids: Sequence[Hashable] | None = None,
    ) -> None:
        """Add images N×C×H×W: masks N×h×w (or, with a fixed threshold, boxes N×4), N classes.

        Where thresholds are chosen, masks are as large as the images, and an id each (a file name,
        say) puts them into a half.
        """
        check_question(images, classes, self.batch_size)
        folds = self._folds(len(images), ids)
        if self.thresholds is None:
            scores = saliency_metric(
                model,
                images,
                masks,
                classes,
                threshold=self.threshold,
                strategy=self.strategy,
                batch_size=self.batch_size,
            )
            values = scores.metric[:, None]
        else:
            masks = check_maps(masks, "masks")
            check_shape("masks", masks, "×".join(map(str, (len(images), *images.shape[2:]))))
            boxes = saliency_boxes(masks, self.thresholds)
            crops = crop_scores(model, images, boxes, classes, batch_size=self.batch_size)
            values = saliency_of(*crops)
        # In float64, which not every device has.
        self.sums += fold_sums(millionths(values.cpu().double()).to(folds.device), folds)
        self.samples += fold_sums(torch.ones_like(folds), folds)

    def _value(self) -> Tensor:
        """Return the mean of the metric."""
        best = lowest_columns(self.sums, self.samples, self.single)
        picked = sum(self.sums[fold, column] for fold, column in enumerate(best))
        return picked / (1e6 * self.samples.sum())
