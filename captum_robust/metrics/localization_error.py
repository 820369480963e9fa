"""The weak localization error as a torchmetrics class."""

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust.metrics._counts import FoldMetric
from captum_robust.metrics.functional._validate import (
    check_box_list,
    check_connectivity,
    check_flag,
    check_maps,
    check_seed,
    size_of,
)
from captum_robust.metrics.functional.box_sweep import check_strategies, sweep_boxes
from captum_robust.metrics.functional.boxes import best_overlap
from captum_robust.metrics.functional.folds import best_columns, texts_of
from captum_robust.metrics.functional.thresholding import STRATEGIES, alpha_grid
from captum_robust.metrics.functional.weak_localization import (
    PROTOCOLS,
    correct_columns,
    correctness_rule,
    listed_samples,
    localization_sums,
)


class LocalizationError(FoldMetric):
    """The share of images whose box misses the object; thresholds tuned on the other half.

    Keeps, for each fold, the number of correct boxes and the sum of the overlaps at every threshold
    of every family. An image's fold follows from its id alone, so the value does not depend on
    batches, order or sharding; it is that of
    :func:`captum_robust.metrics.functional.localization_error` with the same ids.

    Args:
        strategies: the families of thresholds to choose from.
        protocol: which boxes are correct, as in the function.
        iou_threshold: replaces the protocol's overlap.
        strict: replaces the protocol's choice between > and ≥.
        inclusive: replaces the protocol's choice of how sides are measured
            (:func:`captum_robust.metrics.functional.box_iou`).
        connectivity: 8 or 4.
        largest_component_only: as in :func:`captum_robust.metrics.functional.sweep_boxes`.
        oracle: tune on the very images that are reported; ids are then not needed.
        seed: of the split.
        blacklist: ids to leave out.
        kwargs: of ``torchmetrics.Metric``.

    >>> metric = LocalizationError(["value"], oracle=True)
    >>> heat = torch.zeros(1, 8, 8)
    >>> heat[0, 2:4, 1:6] = 1
    >>> metric.update(heat, [torch.tensor([[1.0, 2.0, 6.0, 4.0]])])
    >>> metric.compute().item()
    0.0
    """

    correct: Tensor
    overlaps: Tensor
    without_boxes: Tensor

    def __init__(
        self,
        strategies: Sequence[str] = STRATEGIES,
        *,
        protocol: str = "whi2020",
        iou_threshold: float | None = None,
        strict: bool | None = None,
        inclusive: bool | None = None,
        connectivity: int = 8,
        largest_component_only: bool = True,
        oracle: bool = False,
        seed: int = 0,
        blacklist: Collection[Hashable] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.iou_thresholds, self.strict = correctness_rule(protocol, iou_threshold, strict)
        self.inclusive = PROTOCOLS[protocol].inclusive if inclusive is None else inclusive
        check_strategies(strategies)
        check_connectivity(connectivity)
        check_flag("inclusive", inclusive, optional=True)
        check_flag("largest_component_only", largest_component_only)
        check_flag("oracle", oracle)
        check_seed(seed)
        self.strategies = tuple(strategies)
        self.connectivity = connectivity
        self.largest_component_only = largest_component_only
        self.oracle = self.single = oracle
        self.seed = seed
        self.blacklist = frozenset(texts_of("blacklist", blacklist))
        columns = sum(len(alpha_grid(strategy)) for strategy in self.strategies)
        self._count("correct", 2, len(self.iou_thresholds), columns)
        self._count("overlaps", 2, columns)
        self._count("samples", 2)
        self._count("without_boxes")
        self._keep_apart(
            self.strategies,
            self.iou_thresholds,
            self.strict,
            self.inclusive,
            connectivity,
            largest_component_only,
            oracle,
            seed,
            sorted(self.blacklist),
        )

    def update(
        self,
        maps: Tensor,
        ground_truth: Tensor | Sequence[Tensor],
        ids: Sequence[Hashable] | None = None,
    ) -> None:
        """Add images: maps N×H×W, N ground-truth boxes M_i×4, and an id each (a file name, say).

        Boxes are in pixels of the maps; those more than a pixel outside are a ``ValueError``. They
        may be one tensor N×M×4, and the ids one of N numbers, as wrappers need them that draw from
        the images (``torchmetrics.wrappers.BootStrapper``).
        """
        maps = check_maps(maps)
        check_box_list(ground_truth, len(maps), size=size_of(maps))
        ids = None if ids is None else texts_of("ids", ids)
        folds = self._folds(len(maps), ids)
        listed = listed_samples(self.blacklist or None, ids, len(maps))
        swept = sweep_boxes(maps, self.strategies, self.connectivity, self.largest_component_only)
        boxes = torch.cat(list(swept.values()), dim=1)
        ious = best_overlap(boxes, ground_truth, self.inclusive)
        scored = ~ious.isnan().any(dim=1)
        self.without_boxes += (~scored).sum()
        scored &= ~listed.to(scored.device)
        folds = folds.to(scored.device).masked_fill(~scored, -1)
        correct = correct_columns(ious, self.iou_thresholds, self.strict)
        counts, sums, sizes = localization_sums(ious, correct, folds)
        self.correct += counts
        self.overlaps += sums
        self.samples += sizes

    def _value(self) -> Tensor:
        """Return the error in [0, 1]."""
        best = best_columns(self.correct, self.overlaps, self.samples, self.single)
        hits = sum(
            self.correct[fold, t, column]
            for fold, columns in enumerate(best)
            for t, column in enumerate(columns)
        )
        return 1 - hits / (self.samples.sum() * len(self.iou_thresholds))
