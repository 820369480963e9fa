"""Boxes that several methods agree on, in place of true ones, to tune thresholds on."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._checks import check, check_shape
from captum_robust.metrics.functional import box_iou

LEAST_METHODS = 2
"""Whose boxes can agree or not."""


def agreed_boxes(boxes: Tensor) -> Tensor:
    """N×4, of M boxes an image the one whose mean overlap with the others is largest.

    The idea is that of thresholds tuned on pseudo-boxes (https://arxiv.org/abs/2404.10034), which
    come from a region proposal network there, and from the other methods of a run here.

    Args:
        boxes: N×M×4, (x0, y0, x1, y1), from M = 2; of two the first.

    Raises:
        ValueError: another shape, fewer methods.

    >>> boxes = torch.tensor([[[0.0, 0, 4, 4], [0.0, 0, 5, 4], [8.0, 8, 9, 9]]])
    >>> agreed_boxes(boxes).tolist()
    [[0.0, 0.0, 4.0, 4.0]]
    """
    check_shape("boxes", boxes, "N×M×4")
    count = boxes.shape[1]
    expected = f"expected the boxes of at least {LEAST_METHODS} other methods"
    check(count >= LEAST_METHODS, f"boxes: {expected}, got those of {count}")
    overlaps = box_iou(boxes[:, :, None], boxes[:, None]).sum(dim=2)
    return boxes[torch.arange(len(boxes)), overlaps.argmax(dim=1)]
