"""The boxes at every threshold of every family, from one pass over the sorted pixels.

A threshold of any family keeps the k largest pixels for some k. So the components at all
thresholds are snapshots of one union-find forest into which the pixels go from the largest
down.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice
from captum_robust._progress import counted
from captum_robust.metrics.functional._validate import check_connectivity, check_flag, check_maps
from captum_robust.metrics.functional.thresholding import STRATEGIES, alpha_grid, kept_counts

# Keeps the sorted copies of a chunk of 224×224 maps within the processor's cache.
CHUNK_PIXELS = 1 << 18


def sweep_boxes(
    maps: Tensor,
    strategies: Sequence[str] = STRATEGIES,
    connectivity: int = 8,
    largest_component_only: bool = True,
) -> dict[str, Tensor]:
    """Return the box that each threshold of each family draws.

    The same as :func:`threshold`, :func:`largest_component` and :func:`mask_to_box` in turn at
    every α of :func:`alpha_grid`, some times faster.

    Args:
        maps: heat maps N×H×W, any sign and scale; N may be 0.
        strategies: names from :data:`STRATEGIES`.
        connectivity: 8 or 4 neighbours make a component.
        largest_component_only: without it the box is drawn around all kept pixels, as in the
            code of Fong & Vedaldi (2017); with it around the largest component, as in the
            evaluation of perceptual-ball perturbations.

    Returns:
        For each strategy the boxes N×A×4, float32 on the maps' device, half-open pixels
        (x0, y0, x1, y1) of the map; the whole image where a threshold keeps nothing.

    Raises:
        ValueError: for NaN or infinity in a map (naming the sample) and unknown names.

    >>> heat = torch.zeros(1, 8, 8)
    >>> heat[0, 2:4, 1:6] = 1
    >>> sweep_boxes(heat, ["value"])["value"][0, [0, 10]].tolist()
    [[0.0, 0.0, 8.0, 8.0], [1.0, 2.0, 6.0, 4.0]]
    """
    maps = check_maps(maps)
    check_connectivity(connectivity)
    check_strategies(strategies)
    check_flag("largest_component_only", largest_component_only)
    lengths = [len(alpha_grid(strategy)) for strategy in strategies]
    boxes = torch.empty(len(maps), sum(lengths), 4)
    chunk = max(1, CHUNK_PIXELS // maps[0].numel()) if len(maps) else 1
    parts = counted(torch.split(maps, chunk), "part", None, "boxes")
    for part, out in zip(parts, torch.split(boxes, chunk), strict=True):
        out[:] = _sweep(part, strategies, connectivity, largest_component_only)
    families = torch.split(boxes.to(maps.device), lengths, dim=1)
    return dict(zip(strategies, families, strict=True))


def check_strategies(strategies: Sequence[str]) -> None:
    """Refuse what is no list of at least one family, each once."""
    is_list = isinstance(strategies, Sequence) and not isinstance(strategies, str)
    expected = "strategies: expected a sequence of names"
    check(is_list, f"{expected}, got {strategies!r}", TypeError)
    for strategy in strategies:
        check_choice("strategies", strategy, STRATEGIES)
    is_set = len(set(strategies)) == len(strategies) > 0
    check(is_set, f"{expected}, at least one and each once, got {strategies!r}")


def _sweep(
    maps: Tensor, strategies: Sequence[str], connectivity: int, largest_component_only: bool
) -> Tensor:
    from captum_robust.metrics.functional import _union_find

    height, width = maps.shape[1:]
    order, descending = sorted_pixels(maps)
    ascending, position = kept_by(descending, strategies).sort(dim=1)
    steps = (order, ascending.numpy(), height, width)
    if largest_component_only:
        boxes = _union_find.largest_boxes(*steps, connectivity)
    else:
        boxes = _union_find.extents(*steps)
    return put_back(torch.from_numpy(boxes).float(), position)


def sorted_pixels(maps: Tensor) -> tuple[Any, Tensor]:
    """Return the positions (a NumPy array, int32) and the values of pixels N×P, largest first.

    Of equal ones the first in raster order comes first.
    """
    from captum_robust.metrics.functional import _union_find

    pixels = maps.flatten(1)
    if pixels.device.type == "cpu" and pixels.dtype == torch.float32:
        order, descending = _union_find.descending_order(pixels.contiguous().numpy())
        return order, torch.from_numpy(descending)
    values, positions = pixels.sort(dim=1, descending=True, stable=True)
    return positions.int().cpu().numpy(), values


def kept_by(descending: Tensor, strategies: Sequence[str]) -> Tensor:
    """Return how many of N×P pixels, largest first, each α of each family keeps, on the CPU."""
    counts = [kept_counts(descending, family, alpha_grid(family)) for family in strategies]
    return torch.cat(counts, dim=1).cpu()


def put_back(found: Tensor, position: Tensor) -> Tensor:
    """Return N×S… that were found at sorted steps, whose ``position`` N×S it was before."""
    position = position.reshape(*position.shape, *[1] * (found.ndim - 2)).expand_as(found)
    return torch.empty_like(found).scatter_(1, position, found)
