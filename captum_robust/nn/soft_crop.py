"""The crop of the saliency metric, with a gradient: a mask can be trained for it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 0.1
"""Crops have at least this share of each side of the image."""


def soft_boxes(masks: Tensor) -> Tensor:
    """The mean, over all thresholds from 0 to 1, of the smallest box around what is above each.

    As for the metric, the box is the whole image where nothing is above. A side stands at the mean,
    over the columns (or rows), of what the largest value from that side on lacks to the largest of
    all, which has a gradient to the pixels that hold the box open.

    Args:
        masks: N×1×H×W in [0, 1].

    Returns:
        N×4 float32 (x0, y0, x1, y1) as shares of the sides, of boxes with at least a tenth of each.

    >>> mask = torch.zeros(1, 1, 8, 16)
    >>> mask[..., 2:6, 4:12] = 1
    >>> soft_boxes(mask).tolist()
    [[0.25, 0.25, 0.75, 0.75]]
    >>> soft_boxes(mask / 2).tolist()  # of half of the thresholds the whole image
    [[0.125, 0.125, 0.875, 0.875]]
    """
    values = masks[:, 0].float()
    most = values.amax(dim=(1, 2))[:, None]
    low, high = [], []
    for largest in (values.amax(dim=1), values.amax(dim=2)):
        low.append((most - largest.cummax(dim=1).values).mean(dim=1))
        high.append(1 - (most - largest.flip(1).cummax(dim=1).values).mean(dim=1))
    starts, ends = torch.stack(low, dim=1), torch.stack(high, dim=1)
    half = ((ends - starts) / 2).clamp(min=_SMALLEST / 2)
    middle = ((starts + ends) / 2).clamp(_SMALLEST / 2, 1 - _SMALLEST / 2)
    return torch.cat([middle - half, middle + half], dim=1)


def cropped(images: Tensor, boxes: Tensor) -> Tensor:
    """Each image's box at the size of the whole image, N×C×H×W, with a gradient to the boxes.

    Args:
        images: N×C×H×W.
        boxes: N×4 (x0, y0, x1, y1) as shares of the sides.
    """
    starts, ends = boxes[:, :2], boxes[:, 2:]
    # Of what affine_grid takes, x in [-1, 1]: in the image, of x in the crop.
    scales, shifts = ends - starts, starts + ends - 1
    rows = torch.cat([torch.diag_embed(scales), shifts[:, :, None]], dim=2)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(
        images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False
    ).to(images.dtype)
