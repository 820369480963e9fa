"""Boxes: overlap, and the baselines that no method should fall behind.

All boxes are (x0, y0, x1, y1) in pixels and half-open: they cover the columns x0 … x1 − 1. The
area of such a box is the number of its pixels, which is what Fong & Vedaldi (2017) count when
they add one to the sides of boxes whose corners are pixel numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.nn.utils.rnn import pad_sequence

from captum_robust._checks import check_count, check_number, check_type
from captum_robust.metrics.functional._validate import (
    check_box_list,
    check_boxes,
    check_flag,
    check_size,
)


def box_iou(a: Tensor, b: Tensor, inclusive: bool = False) -> Tensor:
    """Return the intersection over union of boxes, element by element.

    Args:
        a: boxes …×4.
        b: boxes …×4; the leading dimensions broadcast against those of ``a``.
        inclusive: count x1 and y1 as covered pixels, so that every side is one longer.

    Returns:
        … in [0, 1]; 0 where both boxes are empty.

    >>> a = torch.tensor([0.0, 0.0, 2.0, 2.0])
    >>> b = torch.tensor([1.0, 0.0, 3.0, 2.0])
    >>> box_iou(a, b).item(), box_iou(a, b, inclusive=True).item()
    (0.3333333432674408, 0.5)
    """
    check_boxes("a", a)
    check_boxes("b", b)
    shapes = tuple(a.shape), tuple(b.shape)
    try:
        torch.minimum(a, b)
    except RuntimeError:
        expected = f"b: expected a shape that broadcasts against {shapes[0]}, that of a"
        raise ValueError(f"{expected}, got {shapes[1]}") from None
    check_flag("inclusive", inclusive)
    return overlap(a, b, inclusive)


def overlap(a: Tensor, b: Tensor, inclusive: bool = False) -> Tensor:
    """Return what :func:`box_iou` does, of boxes that were checked."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    extra = 1 if inclusive else 0
    sides_a = (a[..., 2:] - a[..., :2] + extra).clamp(min=0)
    sides_b = (b[..., 2:] - b[..., :2] + extra).clamp(min=0)
    corner = torch.maximum(a[..., :2], b[..., :2])
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - corner + extra).clamp(min=0)
    intersection = sides.prod(dim=-1)
    union = sides_a.prod(dim=-1) + sides_b.prod(dim=-1) - intersection
    return torch.where(union > 0, intersection / union, torch.zeros_like(union))


def best_iou(
    boxes: Tensor, ground_truth: Tensor | Sequence[Tensor], inclusive: bool = False
) -> Tensor:
    """Return the overlap of each box with the ground-truth box that it fits best.

    Args:
        boxes: N×A×4, A boxes a sample (one per threshold, say).
        ground_truth: N tensors M_i×4, or one N×M×4, on any device.
        inclusive: as in :func:`box_iou`, for both sides.

    Returns:
        N×A; NaN for a sample without a ground-truth box.

    >>> box = torch.tensor([[[0.0, 0.0, 2.0, 2.0]]])
    >>> best_iou(box, [torch.tensor([[0.0, 0.0, 2.0, 1.0], [5.0, 5.0, 6.0, 6.0]])]).tolist()
    [[0.5]]
    """
    check_boxes("boxes", boxes, "N×A×4")
    check_box_list(ground_truth, len(boxes))
    check_flag("inclusive", inclusive)
    return best_overlap(boxes, ground_truth, inclusive)


def best_overlap(
    boxes: Tensor, ground_truth: Tensor | Sequence[Tensor], inclusive: bool = False
) -> Tensor:
    """Return what :func:`best_iou` does, of boxes that were checked."""
    if not boxes.is_floating_point():
        boxes = boxes.float()
    if len(boxes) == 0:
        return boxes.new_zeros(boxes.shape[:2])
    truth = [sample.to(device=boxes.device, dtype=boxes.dtype) for sample in ground_truth]
    padded = pad_sequence(truth, batch_first=True)
    number = torch.tensor([len(sample) for sample in truth], device=boxes.device)
    if padded.shape[1] == 0:
        return torch.full(boxes.shape[:2], torch.nan, dtype=boxes.dtype, device=boxes.device)
    each = overlap(boxes[:, :, None], padded[:, None], inclusive)
    padding = torch.arange(padded.shape[1], device=boxes.device) >= number[:, None]
    best = each.masked_fill(padding[:, None], -1).amax(dim=2)
    return best.masked_fill((number == 0)[:, None], torch.nan)


def whole_image_box(size: tuple[int, int]) -> Tensor:
    """Return the box of the whole image of (height, width) ``size``, 4 float32.

    >>> whole_image_box((3, 5)).tolist()
    [0.0, 0.0, 5.0, 3.0]
    """
    height, width = check_size(size)
    return torch.tensor([0.0, 0.0, width, height])


def center_box(size: tuple[int, int], area_fraction: float = 0.5) -> Tensor:
    """Return the box with the image's centre, aspect and a fraction of its area, 4 float32.

    Half the area is the baseline of Dabkowski & Gal (2017).

    >>> center_box((100, 200), area_fraction=0.25).tolist()
    [50.0, 25.0, 150.0, 75.0]
    """
    height, width = check_size(size)
    check_number("area_fraction", area_fraction, 0, 1, open_low=True)
    margin = (1 - area_fraction**0.5) / 2
    near = torch.tensor([width * margin, height * margin])
    return torch.cat([near, torch.tensor([width, height]) - near])


def center_box_map(n: int, size: tuple[int, int], area_fraction: float = 0.5) -> Tensor:
    """Return :func:`center_box` as N×H×W heat maps, to send through the methods' pipeline.

    0 outside; inside a flat cone from 0.99 up to 1 at the centre, so that the largest pixel
    is the central one (the point of the pointing game) and every ``value`` threshold of the
    grid above 0 cuts out the box.
    """
    check_count("n", n)
    height, width = check_size(size)
    inside = boxes_to_mask(center_box(size, area_fraction)[None], size)
    return (inside * _cone(height, width)).expand(n, -1, -1).clone()


def whole_image_map(n: int, size: tuple[int, int]) -> Tensor:
    """Return the whole image as N×H×W heat maps, to send through the methods' pipeline.

    A flat cone from 0.99 up to 1 at the centre. One corner pixel is 0: it keeps min–max
    normalisation from stretching the cone, so that every ``value`` threshold cuts out the
    whole image. (``energy`` and ``percentile`` rank pixels and see discs.)
    """
    check_count("n", n)
    height, width = check_size(size)
    cone = _cone(height, width)
    if min(height, width) > 1:
        cone[-1, -1] = 0
    return cone.expand(n, -1, -1).clone()


def random_map(n: int, size: tuple[int, int], generator: torch.Generator | None = None) -> Tensor:
    """Return N×H×W maps of 7×7 uniform noise, upsampled bilinearly: a map that knows nothing."""
    check_count("n", n)
    check_size(size)
    check_type("generator", generator, torch.Generator | None, "a torch.Generator or None")
    noise = torch.rand(n, 1, 7, 7, generator=generator)
    if n == 0:
        return torch.zeros(0, *size)
    return interpolate(noise, size=size, mode="bilinear", align_corners=False)[:, 0]


def boxes_to_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the union of filled boxes, H×W Boolean: the pixels whose centre a box covers.

    Args:
        boxes: M×4.
        size: (height, width) of the image, which boxes may leave.

    >>> boxes_to_mask(torch.tensor([[1.0, 0.0, 3.0, 1.0]]), (2, 4)).int().tolist()
    [[0, 1, 1, 0], [0, 0, 0, 0]]
    """
    height, width = check_size(size)
    check_boxes("boxes", boxes, "M×4")
    first, stop = covered_pixels(boxes, (height, width))
    column = torch.arange(width, device=boxes.device)
    row = torch.arange(height, device=boxes.device)
    in_column = (column >= first[:, :1]) & (column < stop[:, :1])
    in_row = (row >= first[:, 1:]) & (row < stop[:, 1:])
    return (in_row[:, :, None] & in_column[:, None, :]).any(dim=0)


def covered_pixels(boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the half-open range of pixels (x, y) whose centre each box …×4 covers: …×2 twice.

    Clipped to the image of (height, width) ``size``; empty where the box covers no pixel.
    """
    boxes = boxes if boxes.is_floating_point() else boxes.double()
    end = boxes.new_tensor([size[1], size[0]])
    first = (boxes[..., :2] - 0.5).ceil().clamp(min=0)
    return first, torch.minimum((boxes[..., 2:] - 0.5).ceil(), end)


def _cone(height: int, width: int) -> Tensor:
    y = torch.arange(height)[:, None] - (height - 1) / 2
    x = torch.arange(width)[None, :] - (width - 1) / 2
    distance = (x**2 + y**2).sqrt()
    return 1 - 0.01 * distance / distance.max().clamp(min=1)
