"""The weak localization error as a torchmetrics class."""

from collections.abc import Collection, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from captum_robust.metrics._settings import settings_state
from captum_robust.metrics.functional.box_sweep import sweep_boxes
from captum_robust.metrics.functional.boxes import best_iou
from captum_robust.metrics.functional.thresholding import STRATEGIES, alpha_grid
from captum_robust.metrics.functional.weak_localization import (
    PROTOCOLS,
    best_columns,
    correct_columns,
    correctness_rule,
    millionths,
    split_folds,
)


class LocalizationError(Metric):
    """The share of images whose box misses the object; thresholds tuned on the other half.

    Keeps, for each fold, the number of correct boxes and the sum of the overlaps at every threshold
    of every family. An image's
    fold follows from its id alone, so the value does not depend on batches, order or sharding; it
    is that of :func:`captum_robust.metrics.functional.localization_error` with the same ids.

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

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    correct: Tensor
    overlaps: Tensor
    samples: Tensor
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
        self.strategies = tuple(strategies)
        self.connectivity = connectivity
        self.largest_component_only = largest_component_only
        self.oracle = oracle
        self.seed = seed
        self.blacklist = frozenset(blacklist)
        columns = sum(len(alpha_grid(strategy)) for strategy in self.strategies)
        shape = (2, len(self.iou_thresholds), columns)
        self.add_state("correct", torch.zeros(shape, dtype=torch.int64), dist_reduce_fx="sum")
        overlaps = torch.zeros(2, columns, dtype=torch.int64)
        self.add_state("overlaps", overlaps, dist_reduce_fx="sum")
        self.add_state("samples", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("without_boxes", torch.tensor(0), dist_reduce_fx="sum")
        settings = settings_state(
            self.strategies,
            self.iou_thresholds,
            self.strict,
            self.inclusive,
            connectivity,
            largest_component_only,
            oracle,
            seed,
            sorted(map(repr, self.blacklist)),
        )
        self.add_state("settings", settings, dist_reduce_fx="max")

    def update(
        self,
        maps: Tensor,
        ground_truth: Sequence[Tensor],
        ids: Sequence[Hashable] | None = None,
    ) -> None:
        """Add images: maps N×H×W, N ground-truth boxes M_i×4, and an id each (a file name, say)."""
        if ids is None and (self.blacklist or not self.oracle):
            raise ValueError("ids are needed to split the images into folds and for the blacklist")
        if ids is not None and len(ids) != len(maps):
            raise ValueError(f"ids has {len(ids)} entries for {len(maps)} maps")
        swept = sweep_boxes(maps, self.strategies, self.connectivity, self.largest_component_only)
        boxes = torch.cat(list(swept.values()), dim=1)
        ious = best_iou(boxes, ground_truth, self.inclusive)
        scored = ~ious.isnan().any(dim=1)
        self.without_boxes += (~scored).sum()
        folds = torch.zeros(len(maps), dtype=torch.int64)
        if ids is not None:
            folds = split_folds(ids, self.seed)
            listed = torch.tensor([image in self.blacklist for image in ids], dtype=torch.bool)
            scored &= ~listed.to(scored.device)
        correct = correct_columns(ious, self.iou_thresholds, self.strict)
        for fold in (0, 1):
            chosen = scored & (folds == fold).to(scored.device)
            self.correct[fold] += correct[chosen].sum(dim=0)
            self.overlaps[fold] += millionths(ious[chosen]).sum(dim=0)
            self.samples[fold] += chosen.sum()

    def compute(self) -> Tensor:
        """Return the error in [0, 1]; NaN without images, or if only one fold has any."""
        total = self.samples.sum()
        # Not an error: forward() computes the value of one batch, which may be a single image.
        if total == 0 or (not self.oracle and bool((self.samples == 0).any())):
            return torch.tensor(torch.nan, device=self.device)
        counts, sums, sizes = self.correct, self.overlaps, self.samples
        if self.oracle:
            counts, sums, sizes = counts.sum(0, keepdim=True), sums.sum(0)[None], total[None]
        best = best_columns(counts, sums, sizes, single=self.oracle)
        hits = sum(
            counts[fold, t, column]
            for fold, columns in enumerate(best)
            for t, column in enumerate(columns)
        )
        return 1 - hits / (total * len(self.iou_thresholds))
