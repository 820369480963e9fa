"""Infidelity and sensitivity of maps (Yeh et al., 2019), with the numbers that Captum's have.

"On the (In)fidelity and Sensitivity of Explanations" (arXiv 1901.09392). Infidelity asks whether
the sum of a map over what is removed foretells how far the score falls; here squares are removed,
as in the paper's section 2.2, and the fall is that of the class's probability. The falls do not
depend on the map: :func:`square_drops` computes them once for all methods. Sensitivity is how far
noise that nobody sees moves the map; it explains each image anew for each draw.

``captum.metrics.infidelity`` and ``sensitivity_max`` take any perturbation, and attributions that
are signed in each channel; on the squares and the noise drawn here they give the same numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_count,
    check_number,
    check_shape,
)
from captum_robust._progress import counted
from captum_robust._scores import copies_of
from captum_robust.metrics.functional._validate import check_maps, check_mask, check_seed
from captum_robust.metrics.functional.faithfulness import (
    FILLS,
    REMOVAL_FILLS,
    state_probabilities,
)
from captum_robust.metrics.functional.randomization import Explain
from captum_robust.metrics.functional.saliency import Scores, check_question, images_at_once

INFIDELITY_SQUARES = 32
"""That are removed from each image, one at a time."""
SENSITIVITY_SAMPLES = 10
SENSITIVITY_RADIUS = 0.02
"""Draws of noise and its largest value, as Captum's by default."""


def random_squares(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Return random squares of images of H×W as count×H×W Boolean, the same for a seed.

    A side is between an eighth and a half of the shorter one of the image, and at least a pixel.

    >>> random_squares(3, (8, 8)).flatten(1).sum(dim=1).sqrt().tolist()
    [4.0, 3.0, 2.0]
    """
    check_count("count", count, 1)
    check_seed(seed)
    height, width = size
    shorter = min(size)
    smallest = max(1, shorter // 8)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(3, count, 1, dtype=torch.float64, generator=generator)
    side = smallest + (drawn[0] * (max(1, shorter // 2) - smallest + 1)).long()
    down, right = (
        (u * (whole - side + 1)).long() for u, whole in zip(drawn[1:], size, strict=True)
    )
    rows, columns = torch.arange(height), torch.arange(width)
    tall = (rows >= down) & (rows < down + side)
    wide = (columns >= right) & (columns < right + side)
    return torch.logical_and(tall[:, :, None], wide[:, None])


def square_drops(
    model: Scores,
    images: Tensor,
    squares: Tensor,
    classes: Tensor,
    *,
    fill: str = "mean",
    batch_size: int | None = None,
) -> Tensor:
    """Return how far the probability of the class falls without each square, N×S float32.

    Args:
        model: images -> class scores (before the softmax); put in evaluation mode while this lasts.
        images: N×C×H×W.
        squares: S×H×W Boolean, such as of :func:`random_squares`; each is removed from each image.
        classes: N class indices.
        fill: "mean" or "blur", what pixels are replaced by.
        batch_size: as for :func:`captum_robust.metrics.functional.deletion_curve`; the model gets
            each image once for each square, and once.

    Raises:
        ValueError: shapes that do not fit, a fill that there is not, a class that the model does
            not have, NaN or infinity.
        TypeError: arguments of another kind.
    """
    check_question(images, classes, batch_size)
    check_callable("model", model)
    check_choice("fill", fill, REMOVAL_FILLS)
    check_mask(squares, "squares")
    check_shape("squares", squares, "S×" + "×".join(map(str, images.shape[2:])))
    images, squares = images.detach(), squares.to(images.device)
    filled = FILLS[fill](images)
    # The last state is the image as it is.
    nothing = squares.new_zeros(1, *squares.shape[1:])
    removed = torch.cat([squares, nothing])[:, None]

    def shown(sample: Tensor, number: Tensor) -> Tensor:
        return torch.where(removed[number], filled[sample], images[sample])

    at_once = images_at_once(images, batch_size)
    probability, _ = state_probabilities(model, shown, len(removed), classes, images, at_once)
    return probability[:, -1:] - probability[:, :-1]


def infidelity_of(
    maps: Tensor, squares: Tensor, drops: Tensor, *, normalize: bool = True
) -> Tensor:
    """Return the mean squared error of each map's sums over the squares as falls of the score.

    Args:
        maps: N×H×W or N×1×H×W.
        squares: S×H×W Boolean, the ones of ``drops``.
        drops: N×S, as of :func:`square_drops`.
        normalize: scale each map to the least error first, as a heat map has no unit.

    Returns:
        N float32; lower is better. With ``normalize`` a map that says nothing has the mean squared
        fall, and none has more.

    Raises:
        ValueError: shapes that do not fit; NaN or infinity.
        TypeError: arguments of another kind.

    >>> squares = torch.tensor([[[True, False]], [[False, True]]])
    >>> infidelity_of(torch.tensor([[[0.0, 1.0]]]), squares, torch.tensor([[0.6, 0.2]]))
    tensor([0.1800])
    """
    maps = check_maps(maps).to(drops.device)
    check_mask(squares, "squares")
    check_shape("maps", maps, "N×" + "×".join(map(str, squares.shape[1:])))
    check_shape("drops", drops, f"{len(maps)}×{len(squares)}")
    whole = squares.flatten(1).to(drops.device, maps.dtype)
    rows = maps.flatten(1)
    if normalize:
        rows = rows / _largest(rows)
    sums = rows @ whole.T
    falls = drops.to(sums.dtype)
    if normalize:
        # By its largest sum too: squares of tiny sums would be 0.
        sums = sums / _largest(sums)
        length = sums.square().sum(dim=1, keepdim=True)
        scale = (sums * falls).sum(dim=1, keepdim=True) / torch.where(length > 0, length, 1)
        sums = scale * sums
    return (sums - falls).square().mean(dim=1).float()


def _largest(rows: Tensor) -> Tensor:
    """N×1: the largest magnitude in each row of N×K, 1 where all are 0."""
    largest = rows.abs().amax(dim=1, keepdim=True)
    return torch.where(largest > 0, largest, 1)


def infidelity(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    squares: int = INFIDELITY_SQUARES,
    fill: str = "mean",
    normalize: bool = True,
    seed: int = 0,
    batch_size: int | None = None,
) -> Tensor:
    """Return :func:`infidelity_of` maps N×H×W, N numbers, for so many :func:`random_squares`.

    Arguments and errors are those of these functions and of :func:`square_drops`.
    """
    check_question(images, classes, 1)
    maps = check_maps(maps)
    check_shape("maps", maps, "×".join(map(str, (len(images), *images.shape[2:]))))
    drawn = random_squares(squares, (images.shape[2], images.shape[3]), seed)
    drops = square_drops(model, images, drawn, classes, fill=fill, batch_size=batch_size)
    return infidelity_of(maps, drawn, drops, normalize=normalize)


def sensitivity(
    explain: Explain,
    images: Tensor,
    classes: Tensor,
    *,
    maps: Tensor | None = None,
    radius: float = SENSITIVITY_RADIUS,
    samples: int = SENSITIVITY_SAMPLES,
    seed: int = 0,
) -> Tensor:
    """Return how far uniform noise moves each map at most, as a part of its length.

    Args:
        explain: ``explain(images, classes)`` gives maps N×H×W or N×1×H×W.
        images: N×C×H×W.
        classes: N class indices.
        maps: those of the images as they are, where they are known.
        radius: the largest value of the noise, in the unit of the pixels.
        samples: draws of noise; ``explain`` is called for each, with all images.
        seed: of the noise, which is the same for all images.

    Returns:
        N float32, the largest of the draws; lower is steadier. A map of zeros counts as one of
        length 1.

    Raises:
        ValueError: values out of range, maps of another shape, NaN or infinity.
        TypeError: arguments of another kind.
    """
    check_question(images, classes, 1)
    check_callable("explain", explain)
    check_number("radius", radius, 0, open_low=True)
    check_count("samples", samples, 1)
    check_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def explained(x: Tensor) -> Tensor:
        made = check_maps(explain(x, classes.clone()), "maps of explain")
        check(len(made) == len(images), f"maps of explain: expected {len(images)}, got {len(made)}")
        return made.detach().flatten(1)

    first = explained(copies_of(images)) if maps is None else check_maps(maps).flatten(1)
    scale = _largest(first)  # squares of very large or small values would leave the range
    first = first / scale
    length = first.norm(dim=1)
    length = torch.where(length > 0, length, 1)
    largest = torch.zeros_like(length)
    for _ in counted(range(samples), "draw", None, "sensitivity"):
        noise = torch.empty(1, *images.shape[1:]).uniform_(-radius, radius, generator=generator)
        moved = explained(images.detach() + noise.to(images)).to(first)
        check(moved.shape == first.shape, "maps: expected those of explain, got others")
        largest = torch.maximum(largest, (first - moved / scale).norm(dim=1) / length)
    return largest.float()
