"""ROAD: what a class loses with pixels whose places do not show (Rong et al., 2022).

"A Consistent and Efficient Evaluation Strategy for Attribution Methods" (arXiv 2202.00449). A fill
of one colour lets the model see *which* pixels are gone. ROAD puts into each the weighted mean of
its neighbours, 1/6 of each of the four direct ones and 1/12 of each of the four diagonal ones, and
a little noise on top. Neighbours may be gone as well, so the pixels that are gone are the unknowns
of a sparse linear system; beyond the border of the image there are no neighbours, and the weights
of the others grow to a sum of 1.

The system is symmetric and positive definite. It is solved by conjugate gradients after a multigrid
cycle, for all images and channels of a batch at once, on their device, up to a relative residual of
1e-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_robust._checks import check, check_callable, check_number, check_shape
from captum_robust.metrics.functional._validate import check_mask, check_seed, numbers_in
from captum_robust.metrics.functional.faithfulness import state_probabilities
from captum_robust.metrics.functional.regions import pixel_ranks
from captum_robust.metrics.functional.saliency import (
    Scores,
    check_images,
    check_question,
    images_at_once,
)

ROAD_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the pixels of an image, that are imputed."""

_RESIDUAL = 1e-5


@dataclass(frozen=True, eq=False)
class RoadScores:
    """The outcome of :func:`road`, at A shares of the pixels."""

    most: Tensor
    """N×A float32: the probability of the class without the largest pixels; lower is better."""
    least: Tensor
    """N×A float32: that without the smallest pixels; higher is better."""
    most_kept: Tensor
    """N×A Boolean, whether the class is still the prediction; the paper's accuracy is its mean."""
    least_kept: Tensor
    """The same without the smallest pixels."""

    @property
    def combined(self) -> Tensor:
        """N in [-1/2, 1/2]: (least - most) / 2, averaged over the shares; higher is better."""
        return (self.least - self.most).mean(dim=1) / 2


def road(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    shares: Sequence[float] = ROAD_SHARES,
    noise: float = 0.01,
    seed: int = 0,
    batch_size: int | None = None,
) -> RoadScores:
    """Return what the class keeps without the pixels that matter most, and least, by the map.

    Args:
        model: images -> class scores (before the softmax); put in evaluation mode while this lasts.
        images: N×C×H×W.
        maps: N×H×W or N×1×H×W of any scale, where larger means more important; of equal pixels the
            first in raster order comes first.
        classes: N class indices.
        shares: of the pixels that are imputed, in (0, 1); at least one pixel is, and one is left.
        noise: standard deviation of what is added to imputed pixels, in their unit.
        seed: of the noise, which is the same for every image and share.
        batch_size: how many images the model gets at once, as for :func:`deletion_curve`; it gets
            each 2·A times.

    Raises:
        ValueError: shapes that do not fit, values out of range, NaN or infinity.
        TypeError: ``images``, ``maps`` or ``classes`` of another kind.
    """
    check_question(images, classes, batch_size)
    check_callable("model", model)
    rank = pixel_ranks(maps, images)
    chosen = check_imputation(shares, noise, seed)
    images = images.detach()
    pixels = images.shape[2] * images.shape[3]
    check(pixels > 1, "images: expected at least two pixels, got one")
    whole = [min(max(1, round(share * pixels)), pixels - 1) for share in chosen]
    count = torch.tensor(whole, device=images.device).repeat(2)
    drawn = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(seed))
    added = noise * drawn.to(images)

    def shown(sample: Tensor, number: Tensor) -> Tensor:
        place, gone = rank[sample], count[number].view(-1, 1, 1, 1)
        is_most = (number < len(chosen)).view(-1, 1, 1, 1)
        removed = torch.where(is_most, place < gone, place >= pixels - gone)
        imputed = linear_imputation(images[sample], removed[:, 0])
        return torch.where(removed, imputed + added, imputed)

    at_once = images_at_once(images, batch_size)
    scores = state_probabilities(model, shown, len(count), classes, images, at_once)
    probability, kept = (values.chunk(2, dim=1) for values in scores)
    return RoadScores(*probability, *kept)


def check_imputation(shares: Sequence[float], noise: float, seed: int) -> tuple[float, ...]:
    """Return the shares; refuse settings that :func:`road` does not know."""
    check_number("noise", noise, 0)
    check_seed(seed)
    chosen = numbers_in("shares", shares, 0, 1)
    return tuple(check_number("shares", s, 0, 1, open_low=True, open_high=True) for s in chosen)


def linear_imputation(images: Tensor, removed: Tensor) -> Tensor:
    """Return the images with each removed pixel as the weighted mean of its neighbours.

    Args:
        images: N×C×H×W floating point.
        removed: N×H×W Boolean; of each image a pixel is left.

    Returns:
        N×C×H×W; pixels that were not removed are as they were.

    Raises:
        ValueError: shapes that do not fit; an image of which nothing is left; NaN or infinity.
        TypeError: images that are not floating point, masks that are not Boolean.

    >>> image = torch.tensor([[[[0.0, 9.0, 8.0]]]])  # what is left counts alike: 0 and 8
    >>> linear_imputation(image, torch.tensor([[[False, True, False]]])).tolist()
    [[[[0.0, 4.0, 8.0]]]]
    """
    check_images(images)
    check_mask(removed, "removed")
    check_shape("removed", removed, "×".join(map(str, (len(images), *images.shape[2:]))))
    gone = removed.flatten(1).all(dim=1).nonzero().flatten().tolist()
    check(not gone, f"removed: expected a pixel left of each image, got none in sample(s) {gone}")
    hole = removed[:, None].to(images.device)
    images = images.detach()
    full = images.float() if images.dtype.itemsize < 4 else images
    known = full.masked_fill(hole, 0)
    # Squares of very large or small pixels would leave the range of floating point.
    largest = known.abs().amax(dim=(2, 3), keepdim=True)
    scale = torch.where(largest > 0, largest, 1)
    x = _solved(_Hole(hole), _neighbours(known / scale) * hole, 10 * sum(images.shape[2:]))
    return torch.where(hole, (x * scale).to(images.dtype), images)


class _Hole:
    """The system of the pixels of a hole N×1×H×W, and coarser ones for the far ends of it."""

    def __init__(self, hole: Tensor) -> None:
        self.hole = hole
        self.weights = _neighbours(torch.ones_like(hole[:1], dtype=torch.float32))
        # Four pixels are one, where all of them are unknown.
        coarse = F.max_pool2d((~hole).float(), 2, ceil_mode=True) == 0
        self.coarser = _Hole(coarse) if coarse.any() else None

    def times(self, x: Tensor) -> Tensor:
        """The left side of the system."""
        return (self.weights * x - _neighbours(x)) * self.hole

    def roughly_solved(self, right: Tensor) -> Tensor:
        """A symmetric multigrid cycle, with a damped Jacobi step before and behind the others."""
        x = 0.8 * right / self.weights
        if self.coarser is not None:
            padded = F.pad(right - self.times(x), (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            sums = F.avg_pool2d(padded, 2, divisor_override=1) * self.coarser.hole
            rough = F.interpolate(self.coarser.roughly_solved(sums), scale_factor=2)
            x = x + rough[..., : x.shape[2], : x.shape[3]] * self.hole
        return x + 0.8 * (right - self.times(x)) / self.weights


def _solved(system: _Hole, right: Tensor, most: int) -> Tensor:
    """The solution by conjugate gradients; a sample and channel that is done is not moved."""
    x = torch.zeros_like(right)
    residual, direction = right, system.roughly_solved(right)
    product = _dot(residual, direction)
    enough = _RESIDUAL**2 * _dot(right, right)
    # In exact arithmetic it ends; rounding must not keep it from that.
    for _ in range(most):
        left = _dot(residual, residual) > enough
        if not left.any():
            break
        moved = system.times(direction)
        step = torch.where(left, product / _dot(direction, moved), 0)
        x = x + step * direction
        residual = residual - step * moved
        rough = system.roughly_solved(residual)
        before, product = product, _dot(residual, rough)
        direction = rough + torch.where(left, product / before, 0) * direction
    return x


def _neighbours(x: Tensor) -> Tensor:
    """The weighted sum of the eight neighbours of each pixel; none lies beyond the border."""
    wide = F.pad(x, (1, 1, 1, 1))
    rows = wide[:, :, :-2] + 2 * wide[:, :, 1:-1] + wide[:, :, 2:]
    # 1 2 1 across and down: 4 for the pixel itself, 2 for direct and 1 for diagonal neighbours.
    return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:] - 4 * x) / 12


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=(2, 3), keepdim=True)
