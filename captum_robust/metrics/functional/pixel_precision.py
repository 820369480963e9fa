"""PxAP: the average precision of pixels against masks (Choe et al., 2020)."""

import torch
from torch import Tensor

from captum_robust._checks import check, check_shape
from captum_robust.metrics.functional._validate import (
    check_like,
    check_maps,
    check_masks,
    check_real,
    check_within,
    on_device_with_float64,
)
from captum_robust.metrics.functional.box_accuracy import min_max

THRESHOLDS = 1000
MOST_PIXELS = 2.0**53
"""Of a bin: float64 counts no further."""


def pxap_histograms(maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Count the pixels of each map by score, on and off the object.

    Each map is scaled to [0, 1] by its minimum and maximum (a constant map to zeros), as in the
    authors' evaluation, and its pixels go into the bins [0, .001), …, [.999, 1), {1}.

    Args:
        maps: heat maps N×H×W.
        masks: masks N×H×W or N×1×H×W, true on the object: Boolean, or uint8 of 0 and 1 or of 0 and
            255.
        ignore: such masks, true on pixels that count nowhere.

    Returns:
        N×2×1001 int64: first the background, then the object. They add up over images.

    >>> maps = torch.tensor([[[0.0, 1.0]]])
    >>> pxap_histograms(maps, torch.tensor([[[False, True]]]))[0, :, [0, -1]].tolist()
    [[1, 0], [0, 1]]
    """
    maps = check_maps(maps)
    masks = check_masks(masks, "masks")
    check_like("masks", masks, "maps", maps)
    if ignore is not None:
        ignore = check_masks(ignore, "ignore")
        check_like("ignore", ignore, "maps", maps)
    scores = min_max(maps)
    edges = torch.arange(THRESHOLDS + 1, dtype=torch.float64, device=maps.device) * 0.001
    edges[-1] = 1
    # Rounding in the product can put a score one bin off; its edges decide.
    bins = (scores * THRESHOLDS).long()
    bins -= (scores < edges[bins]).long()
    bins += (scores >= edges[(bins + 1).clamp(max=THRESHOLDS)]).long() * (bins < THRESHOLDS)
    n = len(maps)
    row = 2 * torch.arange(n, device=maps.device)[:, None, None] + masks.to(maps.device)
    index = row * (THRESHOLDS + 1) + bins
    if ignore is not None:
        index = index[~ignore.to(maps.device)]
    counts = torch.bincount(index.flatten(), minlength=2 * n * (THRESHOLDS + 1))
    return counts.view(n, 2, THRESHOLDS + 1)


def pxap_from_histograms(histograms: Tensor) -> Tensor:
    """Return the average precision over all pixels of all images, a float64 scalar in [0, 1].

    Args:
        histograms: N×2×1001 counts of :func:`pxap_histograms`, or their sum 2×1001.

    Raises:
        ValueError: when no pixel lies on an object.
    """
    check_real("histograms", histograms, f"a tensor N×2×{THRESHOLDS + 1}")
    each = histograms[None] if histograms.dim() == 2 else histograms
    check_shape("histograms", each, f"N×2×{THRESHOLDS + 1}")
    each = on_device_with_float64(each)
    check_within("histograms", each, 0, MOST_PIXELS)
    false, true = each.sum(dim=0).flip(1).cumsum(dim=1).double()
    check(
        true[-1] > 0, "histograms: expected a pixel on an object, got none: recall is not defined"
    )
    precision = true / (true + false).clamp(min=1)
    recall = true / true[-1]
    gain = torch.diff(recall, prepend=recall.new_zeros(1))
    return torch.sum(precision * gain)


def pxap(maps: Tensor, masks: Tensor, ignore: Tensor | None = None) -> Tensor:
    """Return PxAP in [0, 1] of one batch; arguments as in :func:`pxap_histograms`.

    >>> maps = torch.tensor([[[1.0, 0.5, 0.0]]])
    >>> masks = torch.tensor([[[True, False, True]]])
    >>> round(pxap(maps, masks).item(), 4)  # recall rises by half at precision 1, half at 2/3
    0.8333
    """
    return pxap_from_histograms(pxap_histograms(maps, masks, ignore))
