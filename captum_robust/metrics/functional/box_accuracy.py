"""MaxBoxAcc and MaxBoxAccV2 (Choe et al., 2020), at every threshold from one pass a map.

The authors scale a map to [0, 1], cast it to uint8 and try 1000 thresholds τ of it. No more than
256 of those differ, so an image's result is a vector over the 256 levels; vectors add up over
images and are read at the level ⌊255·τ⌋ of each τ.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check_choice, check_number, check_shape
from captum_robust._progress import counted
from captum_robust.metrics.functional._validate import (
    ROUNDING,
    check_box_list,
    check_flag,
    check_maps,
    check_real,
    check_within,
    numbers_in,
    size_of,
)
from captum_robust.metrics.functional.box_sweep import (
    CHUNK_PIXELS,
    check_strategies,
    kept_by,
    put_back,
    sorted_pixels,
)
from captum_robust.metrics.functional.boxes import best_overlap

CONTOURS = ("component", "polygon")
V2_IOU_THRESHOLDS = (0.3, 0.5, 0.7)


def min_max(maps: Tensor) -> Tensor:
    """Scale each checked map N×H×W to [0, 1] by its extremes; a constant map becomes zeros.

    In float64 like the authors: rounding moves pixels from level to level.
    """
    maps = maps.to(torch.float64)
    shifted = maps - maps.amin(dim=(1, 2), keepdim=True)
    largest = shifted.amax(dim=(1, 2), keepdim=True)
    return shifted / torch.where(largest > 0, largest, torch.ones_like(largest))


def maxboxacc_ious(
    maps: Tensor,
    ground_truth: Tensor | Sequence[Tensor],
    multi: bool = False,
    contours: str = "component",
    inclusive: bool = True,
) -> Tensor:
    """Return the overlap of the predicted box with the ground truth at 256 levels.

    At level t the pixels that are > t of the map as uint8 count as salient.

    Args:
        maps: heat maps N×H×W, any scale.
        ground_truth: N tensors M_i×4, or one N×M×4, in pixels of the map; the best of the M_i
            counts.
        multi: let the best of *all* components count (V2) instead of the largest one (V1).
        contours: ``"component"`` ranks 8-connected components by their pixels (of equal ones,
            the first in raster order) and boxes each; one pass for all levels. ``"polygon"`` is
            the authors' procedure to the letter: OpenCV contours, those around holes too,
            ranked by the area of their polygon; slower. On smooth maps the two agree.
        inclusive: as the authors score boxes: the far corner, one past the last pixel, is
            clipped to the last pixel and both corners count as covered; where nothing is
            salient the box is the one pixel (0, 0). False: plain half-open boxes, and an
            overlap of 0 where nothing is salient.

    Returns:
        N×256 float32 on the maps' device; NaN rows for samples without a ground-truth box.

    Raises:
        ValueError: for NaN or infinity in a map (naming the sample), boxes more than a pixel
            outside of their map, and unknown names.

    >>> heat = torch.zeros(1, 8, 8)
    >>> heat[0, 2:4, 1:6] = 1
    >>> maxboxacc_ious(heat, [torch.tensor([[1.0, 2.0, 6.0, 4.0]])])[0, [0, 254]].tolist()
    [1.0, 1.0]
    """
    maps = check_maps(maps)
    check_choice("contours", contours, CONTOURS)
    check_flag("multi", multi)
    check_flag("inclusive", inclusive)
    check_box_list(ground_truth, len(maps), size=size_of(maps))

    def scored(part: Tensor, truth: list[Tensor]) -> list[Tensor]:
        if contours == "polygon":
            return [_outline_overlaps(levels_of(part), truth, multi, inclusive)]
        overlaps = _best_overlaps if multi else _largest_overlaps
        return [overlaps(part, truth, inclusive)]

    return _by_parts(maps, ground_truth, scored)[0]


def sweep_and_maxboxacc(
    maps: Tensor, strategies: Sequence[str], ground_truth: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return :func:`sweep_boxes` N×A×4 of all families in turn, and :func:`maxboxacc_ious`.

    The last without and with ``multi``, N×256 each; all from one pass.
    """
    maps = check_maps(maps)
    check_strategies(strategies)
    check_box_list(ground_truth, len(maps), size=size_of(maps))
    boxes, one, every = _by_parts(maps, ground_truth, partial(_swept_overlaps, strategies))
    return boxes, one, every


def _by_parts(
    maps: Tensor,
    ground_truth: Tensor | Sequence[Tensor],
    scored: Callable[[Tensor, list[Tensor]], Sequence[Tensor]],
) -> list[Tensor]:
    """Return what is scored of a few maps at a time, put together.

    Scores N×256 are NaN where there is no ground truth.
    """
    chunk = max(1, CHUNK_PIXELS // (maps.shape[1] * maps.shape[2]))
    truth = [boxes.detach().to(device="cpu", dtype=torch.float64) for boxes in ground_truth]
    starts = range(0, len(maps), chunk) or range(1)
    parts = [
        scored(maps[start : start + chunk], truth[start : start + chunk])
        for start in counted(starts, "part", None, "boxes")
    ]
    without = torch.tensor([len(boxes) == 0 for boxes in truth], dtype=torch.bool)[:, None]
    whole = [torch.cat(each) for each in zip(*parts, strict=True)]
    known = [each.masked_fill(without, torch.nan) if each.ndim == 2 else each for each in whole]
    return [each.to(maps.device) for each in known]


def levels_of(maps: Tensor) -> Tensor:
    """Return the maps N×H×W as uint8 on the CPU, from their smallest to their largest value."""
    # Truncates, like the authors' astype(uint8).
    return (min_max(maps) * 255).to(device="cpu", dtype=torch.uint8)


def _above_levels(descending: Tensor, size: Sequence[int]) -> Tensor:
    """Return how many of N×P pixels, largest first, lie above the levels 255 … 0, N×256."""
    levels = levels_of(descending.reshape(-1, *size)).flatten(1).short()
    # Searching is for ascending sequences, hence the signs.
    sought = torch.arange(-255, 1, dtype=torch.int16).expand(len(levels), -1)
    return torch.searchsorted(-levels, sought.contiguous())


def _largest_overlaps(maps: Tensor, truth: list[Tensor], inclusive: bool) -> Tensor:
    """Return N×256 overlaps of the largest component."""
    from captum_robust.metrics.functional import _union_find

    order, descending = sorted_pixels(maps)
    counts = _above_levels(descending, size_of(maps))
    boxes = _union_find.largest_boxes(order, counts.numpy(), *size_of(maps), 8)
    return _of_largest(torch.from_numpy(boxes), counts, maps, truth, inclusive)


def _best_overlaps(maps: Tensor, truth: list[Tensor], inclusive: bool) -> Tensor:
    """Return N×256 overlaps of the best component."""
    order, descending = sorted_pixels(maps)
    counts = _above_levels(descending, size_of(maps))
    best, _ = _scored(order, counts, maps, truth, inclusive)
    return _of_best(best, counts, maps, truth, inclusive)


def _swept_overlaps(
    strategies: Sequence[str], maps: Tensor, truth: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the boxes of the sweep, and the overlaps of the largest and of the best component."""
    order, descending = sorted_pixels(maps)
    kept, counts = kept_by(descending, strategies), _above_levels(descending, size_of(maps))
    steps, position = torch.cat([kept, counts], dim=1).sort(dim=1)
    best, boxes = (put_back(f, position) for f in _scored(order, steps, maps, truth, True))
    swept = kept.shape[1]
    one = _of_largest(boxes[:, swept:], counts, maps, truth, True)
    every = _of_best(best[:, swept:], counts, maps, truth, True)
    return boxes[:, :swept].float(), one, every


def _scored(
    order: Any, counts: Tensor, maps: Tensor, truth: list[Tensor], inclusive: bool
) -> tuple[Tensor, Tensor]:
    """Return the best overlap N×S at each step, and the box N×S×4 of the largest component."""
    from captum_robust.metrics.functional import _union_find

    start = torch.tensor([0] + [len(boxes) for boxes in truth]).cumsum(0).numpy()
    every = torch.cat([torch.zeros(0, 4, dtype=torch.float64), *truth]).numpy()
    size = size_of(maps)
    found = _union_find.best_overlaps(order, counts.numpy(), every, start, *size, inclusive)
    best, boxes = map(torch.from_numpy, found)
    return best, boxes


def _of_best(
    best: Tensor, counts: Tensor, maps: Tensor, truth: list[Tensor], inclusive: bool
) -> Tensor:
    """Return the best overlaps N×256, lowest level first."""
    nowhere = torch.zeros(len(maps), 1, 4, dtype=torch.float64)
    nothing = _overlaps(nowhere, truth, size_of(maps), inclusive)
    return torch.where(counts == 0, nothing, best).flip(1)


def _of_largest(
    boxes: Tensor, counts: Tensor, maps: Tensor, truth: list[Tensor], inclusive: bool
) -> Tensor:
    """Return the overlaps N×256 of the boxes N×256×4 of the largest components, lowest first."""
    drawn = boxes.double().masked_fill((counts == 0)[:, :, None], 0)
    return _overlaps(drawn, truth, size_of(maps), inclusive).flip(1)


def _outline_overlaps(levels: Tensor, truth: list[Tensor], multi: bool, inclusive: bool) -> Tensor:
    """Return N×256 overlaps of the largest contour, or with ``multi`` of the best one."""
    import cv2

    overlaps = torch.empty(len(levels), 256)
    for level, boxes, row in zip(levels, truth, overlaps, strict=True):
        present = torch.bincount(level.flatten(), minlength=256) > 0
        drawn: list[list[Sequence[int]]] = []
        for t in range(255, -1, -1):
            if drawn and not present[t + 1]:
                drawn.append(drawn[-1])
                continue
            salient = (level > t).to(torch.uint8).numpy()
            outlines = cv2.findContours(salient, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[-2]
            if outlines and not multi:
                outlines = [max(outlines, key=cv2.contourArea)]
            drawn.append([cv2.boundingRect(outline) for outline in outlines] or [(0, 0, 0, 0)])
        every = torch.tensor([box for rectangles in drawn for box in rectangles]).double()
        every[:, 2:] += every[:, :2]
        overlap = _overlaps(every[None], [boxes], level.shape, inclusive)[0]
        each = torch.split(overlap, [len(rectangles) for rectangles in drawn])
        row[:] = torch.stack([part.max() for part in each]).flip(0)
    return overlaps


def _overlaps(boxes: Tensor, truth: list[Tensor], size: Sequence[int], inclusive: bool) -> Tensor:
    """Return the overlap of each half-open box N×A×4 with the best of its image's, float32.

    Where no pixel is salient the box is (0, 0, 0, 0).
    """
    if inclusive:
        last = [size[1] - 1, size[0] - 1]
        boxes = torch.minimum(boxes, boxes.new_tensor(last * 2))
    return best_overlap(boxes, truth, inclusive).float()


def maxboxacc_curve(
    ious: Tensor, iou_threshold: float = 0.5, strict: bool = False, interval: float = 0.001
) -> Tensor:
    """Return the share of images that are localized at each τ = 0, interval, … below 1.

    Args:
        ious: N×256 overlaps of :func:`maxboxacc_ious`; NaN rows are left out.
        iou_threshold: the overlap that makes a box correct.
        strict: ask for more than that overlap, not just for as much.
        interval: the step of τ.

    Returns:
        float64 in [0, 1], one per τ; NaN when there is no image.
    """
    return read_levels(level_hits(ious, iou_threshold, strict).double().mean(dim=0), interval)


def maxboxacc_from_ious(
    ious: Tensor,
    iou_thresholds: Sequence[float] = (0.5,),
    strict: bool = False,
    interval: float = 0.001,
) -> Tensor:
    """Return MaxBoxAcc: the accuracy at the best τ of all, averaged over overlap thresholds.

    The best τ is tuned on the images that are reported, as published.

    Args:
        ious: N×256 overlaps of :func:`maxboxacc_ious`; NaN rows are left out.
        iou_thresholds: (.5,) for V1, (.3, .5, .7) for V2.
        strict: ask for more than that overlap, not just for as much.
        interval: the step of τ, from a millionth.

    Returns:
        A float64 scalar in [0, 1]; NaN when there is no image.
    """
    thresholds = numbers_in("iou_thresholds", iou_thresholds, 0, 1)
    best = [maxboxacc_curve(ious, t, strict, interval).max() for t in thresholds]
    return torch.stack(best).mean()


def maxboxacc(
    maps: Tensor, ground_truth: Tensor | Sequence[Tensor], contours: str = "component"
) -> Tensor:
    """Return MaxBoxAcc of one batch: the largest component's box, an overlap of at least .5.

    Arguments as in :func:`maxboxacc_ious`.
    """
    return maxboxacc_from_ious(maxboxacc_ious(maps, ground_truth, contours=contours))


def maxboxacc_v2(
    maps: Tensor, ground_truth: Tensor | Sequence[Tensor], contours: str = "component"
) -> Tensor:
    """Return MaxBoxAccV2 of one batch: any component's box, overlaps of at least .3, .5 and .7.

    Arguments as in :func:`maxboxacc_ious`.
    """
    ious = maxboxacc_ious(maps, ground_truth, multi=True, contours=contours)
    return maxboxacc_from_ious(ious, V2_IOU_THRESHOLDS)


def level_hits(ious: Tensor, iou_threshold: float, strict: bool = False) -> Tensor:
    """Return which levels localize, Boolean, for the rows that are not NaN."""
    check_real("ious", ious, "a tensor N×256")
    check_shape("ious", ious, "N×256")
    check_within("ious", ious, 0, 1 + ROUNDING, may_be_nan=True)
    check_number("iou_threshold", iou_threshold, 0, 1)
    check_flag("strict", strict)
    ious = ious[~ious.isnan().any(dim=1)]
    return ious > iou_threshold if strict else ious >= iou_threshold


def read_levels(by_level: Tensor, interval: float = 0.001) -> Tensor:
    """Read …×256 values at the level ⌊255·τ⌋ of every τ = 0, interval, … below 1."""
    check_number("interval", interval, 1e-6, 1)
    tau = torch.arange(0, 1, interval, dtype=torch.float64, device=by_level.device)
    return by_level[..., (tau * 255).long()]
