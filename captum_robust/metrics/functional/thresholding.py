"""Which pixels of a heat map a threshold keeps: the families of Fong & Vedaldi (2017)."""

import math

import torch
from torch import Tensor

from captum_robust._checks import check_choice, check_number
from captum_robust.metrics.functional._validate import check_maps

STRATEGIES = ("value", "mean", "energy", "percentile")
"""Families of thresholds, see :func:`threshold`."""


def alpha_grid(strategy: str) -> tuple[float, ...]:
    """Return the thresholds α that are tried for a family.

    The grids are those of Fong & Vedaldi (2017): 0, .05, …, .95 for ``value`` and ``energy``,
    0, .5, …, 10 for ``mean``. ``percentile`` takes the first.

    >>> alpha_grid("mean")[:4]
    (0.0, 0.5, 1.0, 1.5)
    >>> len(alpha_grid("energy"))
    20
    """
    check_choice("strategy", strategy, STRATEGIES)
    if strategy == "mean":
        return tuple(i / 2 for i in range(21))
    return tuple(i / 20 for i in range(20))


def threshold(maps: Tensor, strategy: str, alpha: float) -> Tensor:
    """Keep the salient pixels of each map.

    ========== ===========================================================================
    strategy   pixels h that are kept
    ========== ===========================================================================
    value      h − min ≥ α·(max − min)
    mean       h ≥ α·mean
    energy     from the largest down, while the running sum is < α·Σh; the pixel that
               crosses is dropped
    percentile the top (1 − α) of the pixels, at least one
    ========== ===========================================================================

    Equal pixels: ``value``, ``mean`` and ``percentile`` keep all or none of them; ``energy``
    takes them in raster order. Negative pixels: ``energy`` counts them as zeros, so it never
    keeps one; the other families read them as they are. A constant map is kept whole by
    ``value`` and ``percentile``; a map of zeros also by ``mean``, while ``energy`` keeps
    nothing of it (and the box of an empty mask is the whole image).

    Args:
        maps: heat maps N×H×W, any sign and scale.
        strategy: one of :data:`STRATEGIES`.
        alpha: the threshold, in [0, 1]; for ``mean`` any number from 0.

    Returns:
        Boolean masks N×H×W.

    Raises:
        ValueError: for NaN or infinity in a map (naming the sample), an unknown strategy, or
            α out of range.

    >>> heat = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    >>> threshold(heat, "energy", 0.75).int().tolist()  # 4 + 3 < 7.5, and 2 crosses
    [[[1, 1], [0, 0]]]
    """
    maps = check_maps(maps)
    check_alpha(strategy, alpha)
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    descending = maps.flatten(1).gather(1, order)
    count = kept_counts(descending, strategy, (alpha,))
    kept = torch.arange(order.shape[1], device=maps.device) < count
    return torch.zeros_like(kept).scatter_(1, order, kept).view(maps.shape)


def check_alpha(strategy: str, alpha: float, name: str = "alpha") -> None:
    """Refuse a threshold, the argument ``name``, that the family does not define."""
    check_choice("strategy", strategy, STRATEGIES)
    highest = math.inf if strategy == "mean" else 1
    check_number(f"{name} of strategy {strategy!r}", alpha, 0, highest)


def kept_counts(descending: Tensor, strategy: str, alphas: tuple[float, ...]) -> Tensor:
    """Count the pixels that each threshold keeps; they are always the largest ones.

    Args:
        descending: N×P pixels of each map, largest first.
        strategy: one of :data:`STRATEGIES`.
        alphas: A thresholds.

    Returns:
        N×A counts, int64.
    """
    n, pixels = descending.shape
    levels = torch.tensor(alphas, dtype=torch.float64, device=descending.device).expand(n, -1)
    if strategy == "percentile":
        rank = torch.tensor(
            [max(1, round((1 - alpha) * pixels)) for alpha in alphas], device=descending.device
        )
        cut = descending[:, rank - 1]
        # Searching is for ascending sequences, hence the signs here and below.
        return torch.searchsorted(-descending, -cut, right=True)
    if strategy == "energy":
        running = descending.clamp(min=0).double().cumsum_(dim=1)
        return torch.searchsorted(running, levels * running[:, -1:])
    # Comparisons in float64: float32 sums and differences would move pixels across the cut.
    ascending = descending.to(torch.float64, copy=True).neg_()
    if strategy == "value":
        smallest = -ascending[:, -1:]
        ascending += smallest
        cut = levels * ascending[:, :1]
    else:
        cut = levels * ascending.mean(dim=1, keepdim=True)
    return torch.searchsorted(ascending, cut, right=True)
