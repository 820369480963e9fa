"""What the masks of a localization network cover, fool, and find."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from captum_robust._checks import check, check_shape
from captum_robust._contexts import frozen
from captum_robust._processes import device_of
from captum_robust._progress import counted
from captum_robust.metrics.functional import (
    best_iou,
    gt_known_localization,
    localization_error,
    split_folds,
    sweep_boxes,
    top1_localization,
)
from captum_robust.nn import LocalizationNetwork
from captum_robust.training.preparation import class_scores

BOX_STRATEGIES = ("value", "mean", "energy")


@dataclass
class LocalizationEvaluation:
    """How much the masks of held-out images cover, what they fool, and what boxes they give.

    Args:
        network: what is evaluated.
        images: a data set of (3×H×W, class), or of (3×H×W, segments H×W, class).
        boxes: those of each image, M×4 in its pixels; None: there are none, and nothing is scored.
        superpixels: pool the probabilities over the segments.
        batch_size: images at once.

    Raises:
        ValueError: boxes of another number of images.
    """

    network: LocalizationNetwork
    images: Dataset[Any]
    boxes: Sequence[Tensor] | None = None
    superpixels: bool = True
    batch_size: int = 64

    def __post_init__(self) -> None:
        count = len(self.images)  # type: ignore[arg-type]
        boxes = count if self.boxes is None else len(self.boxes)
        check(boxes == count, f"boxes: expected those of {count} images, got {boxes}")

    @property
    def can_score(self) -> bool:
        """Whether boxes are known to compare with, of two images at least."""
        return sum(len(b) > 0 for b in self.boxes or ()) > 1

    def __call__(self, _: nn.Module | None = None) -> dict[str, float]:
        """Means over the images.

        ``mask``, the probability of removal; ``total_variation``, the sum of its absolute
        differences between neighbours over the number of pixels; ``clean_accuracy`` of the images,
        and ``masked_accuracy`` without what is removed with a probability above .5. Of the images
        with boxes also ``box_accuracy``, the share of those whose own box overlaps one of them by
        more than half, and ``box_and_class_accuracy``, of those whose class is right as well. The
        threshold that turns masks into boxes is chosen for each half of the images on the other
        one.
        """
        masks, clean, masked = (torch.cat(parts) for parts in zip(*self._measured(), strict=True))
        means = {
            "mask": masks.mean(),
            "total_variation": total_variation(masks).mean(),
            "clean_accuracy": clean.float().mean(),
            "masked_accuracy": masked.float().mean(),
        }
        if self.can_score:
            assert self.boxes is not None
            has_box = torch.tensor([len(b) > 0 for b in self.boxes])
            swept = sweep_boxes(masks[has_box, 0], BOX_STRATEGIES)
            truth = [b for b in self.boxes if len(b) > 0]
            half = split_folds(len(truth))  # the first two are not in one fold
            correct = localization_error(
                {name: best_iou(boxes, truth) for name, boxes in swept.items()}, folds=half
            ).correct
            means["box_accuracy"] = gt_known_localization(correct)
            means["box_and_class_accuracy"] = top1_localization(correct, clean[has_box])
        return {name: float(value) for name, value in means.items()}

    def _measured(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield masks of a batch, and whether its clean and its masked images are seen right."""
        device = device_of(self.network)
        # With a generator: else it draws from torch's global one.
        loader = DataLoader(self.images, self.batch_size, generator=torch.Generator())
        with torch.no_grad(), frozen(self.network):
            for images, *maps, labels in counted(loader, "batch", None, "evaluation"):
                x = images.to(device)
                segments = maps[0].to(device) if maps and self.superpixels else None
                probabilities = self.network(x, segments).float()
                removed = self.network.remove(x, (probabilities > 0.5).to(x.dtype))
                scores = class_scores(self.network.classifier, torch.cat([x, removed]))
                right = scores.argmax(dim=1).cpu() == labels.repeat(2)
                clean, masked = right.split(len(x))
                yield probabilities.cpu(), clean, masked


def total_variation(masks: Tensor) -> Tensor:
    """Return the sum of absolute differences between neighbours over the number of pixels: N.

    Args:
        masks: N×1×H×W.

    Raises:
        ValueError: masks of another shape.

    >>> total_variation(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]))
    tensor([0.5000])
    """
    check_shape("masks", masks, "N×1×H×W")
    across = masks.diff(dim=3).abs().flatten(1).sum(dim=1)
    down = masks.diff(dim=2).abs().flatten(1).sum(dim=1)
    return (across + down) / (masks.shape[2] * masks.shape[3])
