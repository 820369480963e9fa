"""The pointing game (Zhang et al., 2016), by the rule of TorchRay (Fong et al., 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_robust._checks import check, check_number, check_shape
from captum_robust.metrics.functional._validate import (
    check_box_list,
    check_like,
    check_maps,
    check_masks,
    check_real,
    check_within,
    on_device_with_float64,
)
from captum_robust.metrics.functional.boxes import covered_pixels


def pointing_game_hits(
    maps: Tensor, ground_truth: Tensor | Sequence[Tensor], tolerance: float = 15
) -> Tensor:
    """Say for each map whether its largest pixel lies on the object, or close to it.

    A hit: some pixel of the object lies at a distance d < tolerance, strictly, of the map's
    largest pixel (of equal ones the first in raster order). The tolerance is meant in pixels of
    the original image, so maps and ground truth come at that size.

    Args:
        maps: heat maps N×H×W, one per image and class.
        ground_truth: masks as in :func:`pxap_histograms`, or a list of N boxes M_i×4, or N×M×4 of
            floating point, whose filled union is the object; (x0, y0, x1, y1) half-open.
        tolerance: in pixels; with 1 or less only the object itself is a hit.

    Returns:
        N float32: 1 for a hit, 0 for a miss, NaN where the ground truth covers no pixel.

    Raises:
        ValueError: boxes more than a pixel outside of their map.

    >>> heat = torch.zeros(1, 40, 40)
    >>> heat[0, 20, 20] = 1
    >>> pointing_game_hits(heat, [torch.tensor([[34.0, 20.0, 40.0, 21.0]])]).item()  # 14 away
    1.0
    >>> pointing_game_hits(heat, [torch.tensor([[35.0, 20.0, 40.0, 21.0]])]).item()  # 15 away
    0.0
    """
    maps = check_maps(maps)
    tolerance = check_number("tolerance", tolerance, 0, open_low=True)
    n, height, width = maps.shape
    largest = maps.flatten(1).argmax(dim=1)
    x, y = largest % width, largest // width
    if isinstance(ground_truth, Tensor) and not _are_boxes(ground_truth, maps):
        ground_truth = check_masks(ground_truth, "ground_truth")
        check_like("ground_truth", ground_truth, "maps", maps)
        across = torch.arange(width, device=maps.device) - x[:, None]
        down = torch.arange(height, device=maps.device) - y[:, None]
        squared = (down**2)[:, :, None] + (across**2)[:, None, :]
        near = squared < tolerance**2
        mask = ground_truth.to(maps.device)
        hit, empty = (near & mask).flatten(1).any(1), ~mask.flatten(1).any(1)
        return hit.float().masked_fill(empty, torch.nan)
    check_box_list(ground_truth, n, size=(height, width))
    points = torch.stack([x, y], dim=1)
    return _box_hits(points, [b.to(maps.device) for b in ground_truth], (height, width), tolerance)


def _are_boxes(truth: Tensor, maps: Tensor) -> bool:
    """Whether a tensor holds boxes N×M×4, not masks."""
    is_of_four = truth.ndim == 3 and truth.shape[2] == 4 and truth.shape != maps.shape
    return truth.is_floating_point() and is_of_four


def _box_hits(
    points: Tensor, truth: list[Tensor], size: tuple[int, int], tolerance: float
) -> Tensor:
    """Return N: whether each point (x, y) is close to one of its boxes; NaN where none has area."""
    n = len(points)
    hits, filled = (torch.zeros(n, dtype=torch.bool, device=points.device) for _ in range(2))
    if sum(map(len, truth)):
        counts = torch.tensor([len(boxes) for boxes in truth], device=points.device)
        owner = torch.arange(n, device=points.device).repeat_interleave(counts)
        first, stop = covered_pixels(torch.cat(truth), size)
        point = points[owner]
        has_area = (first < stop).all(dim=1)
        away = torch.maximum(first - point, point - (stop - 1)).clamp(min=0)
        near = has_area & ((away**2).sum(dim=1) < tolerance**2)
        filled[owner[has_area]] = True
        hits[owner[near]] = True
    return hits.float().masked_fill(~filled, torch.nan)


def pointing_game_accuracy(hits: Tensor, classes: Tensor | None = None) -> Tensor:
    """Return the accuracy of the pointing game in [0, 1].

    Args:
        hits: N values of :func:`pointing_game_hits` in [0, 1], or truth values; NaN ones count
            nowhere.
        classes: N integers. With them, the mean over the classes of hits / (hits + misses), as
            published; classes without a sample are left out. Without them, the plain mean.

    Returns:
        A scalar; NaN when there is nothing to average.

    >>> hits = torch.tensor([1.0, 1.0, 0.0, 0.0])
    >>> pointing_game_accuracy(hits).item()
    0.5
    >>> round(pointing_game_accuracy(hits, torch.tensor([7, 7, 7, 2])).item(), 4)
    0.3333
    """
    check_real("hits", hits, "a tensor N", truths=True)
    check_shape("hits", hits, "N")
    hits = on_device_with_float64(hits.detach())
    hits = hits if hits.is_floating_point() else hits.float()
    check_within("hits", hits, 0, 1, may_be_nan=True)
    if classes is None:
        classes = torch.zeros(len(hits), dtype=torch.int64)
    check_real("classes", classes, "a tensor of integers")
    got = f"{tuple(classes.shape)} of {classes.dtype}"
    fits = classes.shape == hits.shape and not classes.is_floating_point()
    check(fits, f"classes: expected {len(hits)} integers, one a hit, got {got}")
    _, numbers = torch.unique(classes, return_inverse=True)
    return mean_over_classes(*class_hits(hits.double(), numbers)).to(hits.dtype)


def class_hits(hits: Tensor, classes: Tensor, count: int = 0) -> tuple[Tensor, Tensor]:
    """Return the hits and the maps of each class, from 0 to the largest or to ``count`` - 1.

    Args:
        hits: N values of :func:`pointing_game_hits`; NaN ones count nowhere.
        classes: N integers from 0.
        count: the least number of classes.
    """
    counted = ~hits.isnan()
    hits, classes = hits[counted], classes.to(hits.device)[counted]
    total = torch.bincount(classes, minlength=count)
    return torch.bincount(classes, weights=hits, minlength=count), total


def mean_over_classes(hits: Tensor, total: Tensor) -> Tensor:
    """Return the mean of hits / total over the classes with a map; NaN if there are none."""
    seen = total > 0
    return (hits[seen] / total[seen]).mean()
