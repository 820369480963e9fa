"""What a map must leave of an image for its class, and what it must take away (Dabkowski & Gal).

"Real Time Image Saliency for Black Box Classifiers" (arXiv 1705.07857), section 2, asks two things
of the evidence: the smallest sufficient region, which alone lets the class be recognised, and the
smallest destroying region, without which it is not recognised any more. Here a map ranks the
pixels; the region grows from its largest pixel over a ladder of areas until the check passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from captum_robust._checks import (
    as_number,
    check,
    check_callable,
    check_number,
    check_shape,
    check_type,
)
from captum_robust._progress import counted
from captum_robust._resize import blurred
from captum_robust.metrics.functional._validate import check_maps, check_seed
from captum_robust.metrics.functional.saliency import (
    Scores,
    check_question,
    class_scores,
    images_at_once,
    log_probabilities,
)

REGION_AREAS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares of the image that are tried, smallest first."""

BLUR = 10.0
"""Standard deviation of the default removal, in pixels of an image of 224."""

Removal: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Images N×C×H×W -> the same images without evidence."""


def smallest_sufficient_region(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    areas: Sequence[float] = REGION_AREAS,
    removal: Removal | None = None,
    share: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Return how much of each image, its most salient pixels first, keeps the class alone.

    The smallest area of the ladder whose region, with evidence removed everywhere else, is enough.
    A larger one need not be.

    Args:
        model: images -> class scores (before the softmax); put in evaluation mode while this lasts.
        images: N×C×H×W.
        maps: N×H×W, where larger means more salient; of equal pixels the first in raster order
            comes first.
        classes: N class indices.
        areas: shares of the image in (0, 1], increasing.
        removal: ``removal(images, generator)`` gives the images without evidence, once for all
            areas, such as :class:`captum_robust.nn.EvidenceRemoval`; None: a Gaussian blur of 10
            pixels (of 224; other sizes scale it).
        share: None: the class is kept where it is the prediction. Or a share in (0, 1]: where its
            probability is at least this share of that for the whole image.
        seed: of the generator that ``removal`` gets. What it draws for an image depends on the
            image's place in the batch.
        batch_size: how many images the model gets at once; None: 64, on a CPU 8 a thread.

    Returns:
        N float32 shares; NaN where no area was enough (``nan_to_num(1.0)`` counts those as the
        whole image).

    Raises:
        ValueError: shapes that do not fit, values out of range, NaN or infinity.
        TypeError: ``images``, ``maps`` or ``classes`` of another kind.
    """
    return _smallest(
        model, images, maps, classes, areas, removal, share, seed, batch_size, destroys=False
    )


def smallest_destroying_region(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    areas: Sequence[float] = REGION_AREAS,
    removal: Removal | None = None,
    share: float | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Return how much of each image, its most salient pixels first, must go for the class to go.

    Arguments and errors are those of :func:`smallest_sufficient_region`; the class is gone where it
    is not kept in that sense.

    Returns:
        N float32 shares; NaN where the class stays even at the largest area, and where it is not
        the prediction in the first place, so that nothing can be destroyed.
    """
    return _smallest(
        model, images, maps, classes, areas, removal, share, seed, batch_size, destroys=True
    )


def _smallest(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    areas: Sequence[float],
    removal: Removal | None,
    share: float | None,
    seed: int,
    batch_size: int | None,
    *,
    destroys: bool,
) -> Tensor:
    n = check_question(images, classes, batch_size)
    at_once = images_at_once(images, batch_size)
    rank = pixel_ranks(maps, images)
    check_callable("model", model)
    check_callable("removal", removal, optional=True)
    check_seed(seed)
    check_type("areas", areas, Sequence, "a list of shares")
    ladder = [as_number(area) for area in areas]  # NaN of what is none
    rises = ladder and ladder == sorted(set(ladder)) and 0 < ladder[0] <= ladder[-1] <= 1
    check(rises, f"areas: expected shares in (0, 1] that increase, got {ladder}")
    if share is not None:
        check_number("share", share, 0, 1, open_low=True)
    smallest = torch.full((n,), torch.nan, device=images.device)
    if n == 0:
        return smallest
    classes = classes.to(images.device)
    removed = _removed(images, removal, seed)
    left = torch.arange(n, device=images.device)
    wanted: Tensor | None = None

    def kept(x: Tensor, samples: Tensor) -> Tensor:
        """Whether the class is the prediction, or has the probability that is wanted."""
        scores = _scores(model, x, samples, at_once)
        if wanted is None:
            return scores.argmax(dim=1) == classes[samples]
        return log_probabilities(scores, classes[samples]).exp() >= wanted[samples]

    if share is not None:
        whole = _scores(model, images, left, at_once)
        wanted = log_probabilities(whole, classes).exp() * share
    if destroys:
        left = left[kept(images, left)]
    for area in counted(ladder, "area", None, "regions"):
        if len(left) == 0:
            break
        region = rank[left] < max(1, round(area * rank[0].numel()))
        inside, outside = (removed, images) if destroys else (images, removed)
        done = kept(torch.where(region, inside[left], outside[left]), left) != destroys
        smallest[left[done]] = area
        left = left[~done]
    return smallest


def pixel_ranks(maps: Tensor, images: Tensor) -> Tensor:
    """Return the place of each pixel N×1×H×W in its map, from 0, the largest first.

    Of equal pixels the first in raster order comes first, so a constant map is read row by row.

    Args:
        maps: N×H×W or N×1×H×W of any scale.
        images: N×C×H×W; the places lie on their device.

    Raises:
        ValueError: maps of another size or number than the images; NaN or infinity.
        TypeError: maps of another kind.

    >>> pixel_ranks(torch.tensor([[[0.5, -1.0], [2.0, 0.5]]]), torch.zeros(1, 3, 2, 2)).tolist()
    [[[[1, 3], [0, 2]]]]
    """
    maps = check_maps(maps).to(images.device)
    size = (len(images), *images.shape[2:])
    check_shape("maps", maps, "×".join(map(str, size)))
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(order.shape[1], device=images.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place).view(len(maps), 1, *maps.shape[1:])


def blurred_images(images: Tensor) -> Tensor:
    """Return images N×C×H×W under a Gaussian blur of :data:`BLUR`."""
    with torch.autocast(images.device.type, enabled=False):
        return blurred(images, BLUR * min(images.shape[2:]) / 224)


def _scores(model: Scores, images: Tensor, samples: Tensor, batch_size: int) -> Tensor:
    batches = list(zip(*(torch.split(t, batch_size) for t in (images, samples)), strict=True))
    each = counted(batches, "batch", None, "regions")
    return torch.cat([class_scores(model, x, numbers) for x, numbers in each])


def _removed(images: Tensor, removal: Removal | None, seed: int) -> Tensor:
    if removal is None:
        return blurred_images(images)
    with torch.no_grad():
        removed = removal(images, torch.Generator().manual_seed(seed))
    check_shape("images from removal", removed, "×".join(map(str, images.shape)))
    return removed.to(images)
