"""The largest connected component of a mask, and the box around a mask."""

import torch
from torch import Tensor

from captum_robust.metrics.functional._validate import check_connectivity, check_mask


def largest_component(mask: Tensor, connectivity: int = 8) -> Tensor:
    """Keep the connected component with the most pixels.

    Among components of one size, the one whose first pixel comes first in raster order stays.

    Args:
        mask: Boolean masks N×H×W; an empty one stays empty.
        connectivity: 8 or 4 neighbours.

    Returns:
        Boolean masks N×H×W on the mask's device.

    >>> mask = torch.tensor([[[1, 0, 1], [0, 0, 1]]], dtype=torch.bool)
    >>> largest_component(mask).int().tolist()
    [[[0, 0, 1], [0, 0, 1]]]
    """
    import cv2

    check_mask(mask)
    check_connectivity(connectivity)
    kept = torch.zeros(mask.shape, dtype=torch.bool)
    for i, sample in enumerate(mask.cpu()):
        _, labels, statistics, _ = cv2.connectedComponentsWithStats(
            sample.to(torch.uint8).numpy(), connectivity=connectivity
        )
        area = torch.from_numpy(statistics)[1:, cv2.CC_STAT_AREA]
        if len(area) == 0:
            continue
        label = torch.from_numpy(labels)
        largest = 1 + (area == area.max()).nonzero().flatten()
        # OpenCV's labels are not promised to follow the raster order.
        first = torch.isin(label.flatten(), largest).int().argmax()
        kept[i] = label == label.flatten()[first]
    return kept.to(mask.device)


def mask_to_box(mask: Tensor) -> Tensor:
    """Return the tightest box around the pixels of each mask.

    Args:
        mask: Boolean masks N×H×W.

    Returns:
        N×4 float32, (x0, y0, x1, y1) in pixels, half-open: x1 is the last column plus one. For
        an empty mask, the whole image.

    >>> mask = torch.zeros(1, 4, 6, dtype=torch.bool)
    >>> mask[0, 1:3, 2:5] = True
    >>> mask_to_box(mask).tolist()
    [[2.0, 1.0, 5.0, 3.0]]
    """
    check_mask(mask)
    height, width = mask.shape[1:]
    columns, rows = mask.any(dim=1).int(), mask.any(dim=2).int()
    # argmax finds the first of equal values; an empty mask gives 0 and the far end.
    x0, y0 = columns.argmax(dim=1), rows.argmax(dim=1)
    x1 = width - columns.flip(1).argmax(dim=1)
    y1 = height - rows.flip(1).argmax(dim=1)
    return torch.stack([x0, y0, x1, y1], dim=1).to(torch.float32)
