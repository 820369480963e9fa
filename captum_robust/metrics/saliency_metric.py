"""The saliency metric as a torchmetrics class."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_robust.metrics._settings import settings_state
from captum_robust.metrics.functional.saliency import (
    Scores,
    check_level,
    check_thresholds,
    crop_scores,
    lowest_columns,
    saliency_boxes,
    saliency_metric,
    saliency_of,
)
from captum_robust.metrics.functional.thresholding import check_alpha
from captum_robust.metrics.functional.weak_localization import millionths, split_folds


class SaliencyMetric(Metric):
    """log(max(a, .05)) - log p of the tightest crop, averaged over the images; lower is better.

    See :mod:`captum_robust.metrics.functional.saliency`. The classifier is an argument of
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
        batch_size: how many crops the classifier gets at once.
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

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    sums: Tensor
    samples: Tensor

    def __init__(
        self,
        threshold: float = 0.5,
        strategy: str | None = None,
        *,
        thresholds: Mapping[str, Sequence[float]] | None = None,
        oracle: bool = False,
        seed: int = 0,
        batch_size: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if thresholds is not None:
            check_thresholds(thresholds)
            thresholds = {family: tuple(alphas) for family, alphas in thresholds.items()}
        if strategy is None:
            check_level(threshold)
        else:
            check_alpha(strategy, threshold)
        self.threshold = threshold
        self.strategy = strategy
        self.thresholds = thresholds
        self.oracle = oracle
        self.seed = seed
        self.batch_size = batch_size
        self.single = oracle or thresholds is None
        columns = 1 if thresholds is None else sum(map(len, thresholds.values()))
        sums = torch.zeros(2, columns, dtype=torch.int64)
        self.add_state("sums", sums, dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        settings = settings_state(threshold, strategy, thresholds, oracle, seed)
        self.add_state("settings", settings, dist_reduce_fx="max")

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
        if ids is None and not self.single:
            raise ValueError("ids are needed to split the images into folds")
        if ids is not None and len(ids) != len(images):
            raise ValueError(f"ids has {len(ids)} entries for {len(images)} images")
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
            if masks.shape != (len(images), *images.shape[2:]):
                raise ValueError(
                    f"masks must be {len(images)}×{images.shape[2]}×{images.shape[3]}, as large as "
                    f"the images, not {tuple(masks.shape)}"
                )
            boxes = saliency_boxes(masks, self.thresholds)
            found = crop_scores(model, images, boxes, classes, batch_size=self.batch_size)
            values = saliency_of(*found)
        folds = torch.zeros(len(images), dtype=torch.int64)
        if not self.single and ids is not None:
            folds = split_folds(ids, self.seed)
        whole = millionths(values.cpu().double())
        for fold in (0, 1):
            self.sums[fold] += whole[folds == fold].sum(dim=0).to(self.sums.device)
            self.samples[fold] += int((folds == fold).sum())

    def compute(self) -> Tensor:
        """Return the mean of the metric; NaN without images, or if only one fold has any."""
        total = self.samples.sum()
        # Not an error: forward() computes the value of one batch, which may be a single image.
        if total == 0 or (not self.single and bool((self.samples == 0).any())):
            return torch.tensor(torch.nan, device=self.device)
        best = lowest_columns(self.sums, self.samples, self.single)
        picked = sum(self.sums[fold, column] for fold, column in enumerate(best))
        return picked / (1e6 * total)
