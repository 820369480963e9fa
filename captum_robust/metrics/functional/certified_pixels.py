"""How much of an image is certified, and how well: the measures of Anani et al. (ICML 2025).

"Pixel-level Certified Explanations via Randomized Smoothing": the share of the pixels that is
certified, how many of those certified in lie where the class is, in an image that is put together
from four, and how the class goes as pixels are deleted in the order of their certificates. What is
certified in and out comes from :class:`captum_robust.attr.Certified`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captum_robust._checks import check, check_count, check_finite, check_floating, check_shape
from captum_robust.metrics.functional._validate import (
    check_like,
    check_maps,
    check_masks,
    check_size,
    check_within,
    size_of,
)
from captum_robust.metrics.functional.boxes import boxes_to_mask
from captum_robust.metrics.functional.faithfulness import RemovalCurve, deletion_curve
from captum_robust.metrics.functional.saliency import Scores


def certified_share(inside: Tensor, outside: Tensor) -> Tensor:
    """Return the share of the pixels that are certified, in or out.

    Args:
        inside: N×H×W or N×1×H×W truth values, where the pixel is certified in.
        outside: the same, where it is certified out.

    Returns:
        N float32 in [0, 1].

    Raises:
        ValueError: shapes that do not fit, or a pixel that is both.
        TypeError: no truth values.

    >>> inside = torch.tensor([[[True, False], [False, False]]])
    >>> certified_share(inside, torch.tensor([[[False, True], [True, False]]]))
    tensor([0.7500])
    """
    inside, outside = _checked(inside, outside)
    return (inside | outside).flatten(1).double().mean(dim=1).float()


def certified_pointing(inside: Tensor, ground_truth: Tensor | Sequence[Tensor]) -> Tensor:
    """Return how much of what is certified in lies on the object.

    In the paper the object is a cell of an image that is put together from four (:func:`image_grid`
    and :func:`grid_boxes`), the class of which is explained.

    Args:
        inside: N×H×W or N×1×H×W truth values, where the pixel is certified in.
        ground_truth: masks as ``inside``, or a list of N tensors M_i×4, the filled union of whose
            boxes (x0, y0, x1, y1) is the object.

    Returns:
        N float32 in [0, 1]; NaN where no pixel is certified in: there is nothing that could point.
        The paper counts those as 0, as ``nan_to_num`` does.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: no truth values.

    >>> inside = torch.zeros(1, 4, 4, dtype=torch.bool)
    >>> inside[0, 0, :3] = True
    >>> certified_pointing(inside, grid_boxes((4, 4))[:1, None])
    tensor([0.6667])
    """
    inside = check_masks(inside, "inside")
    are_masks = isinstance(ground_truth, Tensor) and not ground_truth.is_floating_point()
    if are_masks:
        assert isinstance(ground_truth, Tensor)
        truth = check_masks(ground_truth, "ground_truth")
    else:
        n = len(ground_truth)
        check(n == len(inside), f"ground_truth: expected one for each of {len(inside)}, got {n}")
        masks = [boxes_to_mask(boxes, size_of(inside)) for boxes in ground_truth]
        truth = torch.stack(masks) if masks else inside
    check_like("ground_truth", truth, "inside", inside)
    hits = (inside & truth.to(inside.device)).flatten(1).sum(dim=1)
    return (hits.double() / inside.flatten(1).sum(dim=1)).float()


def certified_order(inside: Tensor, outside: Tensor, frequency: Tensor) -> Tensor:
    """Return a map that ranks the pixels by their certificates.

    First those that are certified in, then those that abstain, last those certified out; of equal
    ones first what more of the copies show.

    Args:
        inside: N×H×W or N×1×H×W truth values.
        outside: the same.
        frequency: N×H×W or N×1×H×W in [0, 1], the share of the copies that show the pixel.

    Returns:
        N×H×W float32, for :func:`deletion_curve` and every other measure of a map.

    Raises:
        ValueError: shapes that do not fit, a pixel that is certified both in and out, or shares
            outside of [0, 1].
        TypeError: no truth values.
    """
    inside, outside = _checked(inside, outside)
    frequency = check_maps(frequency, "frequency")
    check_like("frequency", frequency, "inside", inside)
    check_within("frequency", frequency, 0, 1)
    # The steps are larger than all shares: no share outranks a certificate.
    return frequency.float() + 2 * (1 + inside.to(frequency) - outside.to(frequency)).float()


def certified_deletion(
    model: Scores,
    images: Tensor,
    inside: Tensor,
    outside: Tensor,
    frequency: Tensor,
    classes: Tensor,
    **settings: Any,
) -> RemovalCurve:
    """Return how the class falls as pixels are deleted in the order of :func:`certified_order`.

    ``settings`` are those of :func:`deletion_curve`, which this is. See there for the other
    arguments, and :class:`captum_robust.metrics.Deletion` for its mean over images.
    """
    ranked = certified_order(inside, outside, frequency)
    return deletion_curve(model, images, ranked, classes, **settings)


def image_grid(images: Tensor, side: int = 2) -> Tensor:
    """Return images that are put together from ``side * side`` each, row by row.

    Args:
        images: (M·side²)×C×H×W.
        side: cells beside each other.

    Returns:
        M×C×(side·H)×(side·W).

    Raises:
        ValueError: another number of images.

    >>> image_grid(torch.arange(4.0).view(4, 1, 1, 1))
    tensor([[[[0., 1.],
              [2., 3.]]]])
    """
    check_floating("images", images)
    check_shape("images", images, "N×C×H×W")
    check_count("side", side, 1)
    check_finite(images, "images")
    n, channels, height, width = images.shape
    whole = n > 0 and n % side**2 == 0
    check(whole, f"images: expected {side**2} for each grid, got {n}")
    cells = images.reshape(-1, side, side, channels, height, width)
    return cells.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, side * height, side * width)


def grid_boxes(size: tuple[int, int], side: int = 2) -> Tensor:
    """Return the boxes side²×4 of the cells of an :func:`image_grid` of ``size`` (H, W).

    Raises:
        ValueError: a side that the cells do not divide.

    >>> grid_boxes((4, 8))[1].tolist()
    [4.0, 0.0, 8.0, 2.0]
    """
    height, width = check_size(size)
    check_count("side", side, 1)
    divides = height % side == width % side == 0
    check(divides, f"size: expected multiples of {side} cells, got {(height, width)}")
    cell = torch.tensor([width, height, width, height]) / side
    first = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(1)
    return torch.cat([first, first + 1], dim=1) * cell


def _checked(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    inside, outside = check_masks(inside, "inside"), check_masks(outside, "outside")
    check_like("outside", outside, "inside", inside)
    both = (inside & outside).any()
    check(not both, "outside: expected no pixel that is certified in")
    return inside, outside
