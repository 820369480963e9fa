"""Deletion and insertion: how fast a class goes with the pixels of a map, and comes with them.

Petsiuk et al., "RISE: Randomized Input Sampling for Explanation of Black-box Models" (2018, arXiv
1806.07421), section 4.2. The pixels of the image are taken in the order of the map, largest first.
Deletion replaces them by a fill and watches the probability of the class fall; insertion begins
with the fill alone, puts the pixels back and watches it rise. The area under the curve of deletion
is small, and that of insertion large, for a map that ranks the pixels as the model uses them.

The fill is "mean", of each channel over the image, or "blur", a Gaussian of 10 pixels of an image
of 224. The paper fills with zeros of a normalised image, the mean over the data set, which a model
with its normalisation inside does not show, and blurs with a window of 11 pixels. Of equal pixels
the first in raster order comes first, so a constant map is read row by row.

Infidelity and sensitivity are in ``infidelity.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import check_callable, check_choice, check_count
from captum_robust._progress import counted
from captum_robust.metrics.functional.regions import blurred_images, pixel_ranks
from captum_robust.metrics.functional.saliency import (
    Scores,
    check_question,
    class_scores,
    images_at_once,
    log_probabilities,
)

REMOVAL_STEPS = 32
"""In which all pixels of an image are replaced; the paper takes 224."""

FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda images: images.mean(dim=(2, 3), keepdim=True).expand_as(images),
    "blur": blurred_images,
}
REMOVAL_FILLS = tuple(FILLS)
"""What pixels can be replaced by."""


@dataclass(frozen=True, eq=False)
class RemovalCurve:
    """The probability of a class while the pixels of an image go, or come."""

    share: Tensor
    """S+1 float32, how much of the image was deleted or inserted: from 0 to 1."""
    probability: Tensor
    """N×(S+1) float32 of the class."""

    @property
    def area(self) -> Tensor:
        """N in [0, 1]: the area under each curve, by the trapezoidal rule."""
        return torch.trapezoid(self.probability, self.share)


def deletion_curve(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = REMOVAL_STEPS,
    fill: str = "mean",
    batch_size: int | None = None,
) -> RemovalCurve:
    """Return how the probability of the class falls as the largest pixels are replaced.

    Args:
        model: images -> class scores (before the softmax); put in evaluation mode while this lasts.
        images: N×C×H×W.
        maps: N×H×W or N×1×H×W of any scale, where larger means more important.
        classes: N class indices.
        steps: in how many the pixels are replaced; the model gets each image so often and once.
        fill: "mean" or "blur", what pixels are replaced by.
        batch_size: how many images the model gets at once, whichever image and step they are of.
            None: 64, on the CPU 8 a thread, more of which its caches do not hold.

    Raises:
        ValueError: shapes that do not fit, a fill that there is not, more steps than pixels, a
            class that the model does not have, NaN or infinity.
        TypeError: ``images``, ``maps`` or ``classes`` of another kind.

    >>> def model(x):  # the class has the probability of the brightness
    ...     p = x.mean(dim=(1, 2, 3))
    ...     return torch.stack([p, 1 - p], dim=1).log()
    >>> image = torch.tensor([[[[1.0, 0.6], [0.2, 0.2]]]])
    >>> curve = deletion_curve(model, image, image[:, 0], torch.tensor([0]), steps=2)
    >>> curve.share.tolist(), curve.probability.mul(10).round().tolist()  # mean .5
    ([0.0, 0.5, 1.0], [[5.0, 4.0, 5.0]])
    """
    return _curves(model, images, maps, classes, steps, [(False, fill)], batch_size)[0]


def insertion_curve(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = REMOVAL_STEPS,
    fill: str = "blur",
    batch_size: int | None = None,
) -> RemovalCurve:
    """Return how the probability of the class rises as the largest pixels come into the fill.

    Arguments and errors are those of :func:`deletion_curve`.
    """
    return _curves(model, images, maps, classes, steps, [(True, fill)], batch_size)[0]


def removal_curves(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    *,
    steps: int = REMOVAL_STEPS,
    deletion_fill: str = "mean",
    insertion_fill: str = "blur",
    batch_size: int | None = None,
) -> tuple[RemovalCurve, RemovalCurve]:
    """Return the curves of deletion and of insertion, whose ends are computed once.

    The model gets each image 2·``steps`` times, or, where the fills differ, once more. Arguments
    and errors are those of :func:`deletion_curve`.
    """
    both = [(False, deletion_fill), (True, insertion_fill)]
    deletion, insertion = _curves(model, images, maps, classes, steps, both, batch_size)
    return deletion, insertion


def _curves(
    model: Scores,
    images: Tensor,
    maps: Tensor,
    classes: Tensor,
    steps: int,
    wanted: Sequence[tuple[bool, str]],
    batch_size: int | None,
) -> list[RemovalCurve]:
    """The curves that are wanted: whether pixels are inserted, and the fill."""
    check_question(images, classes, batch_size)
    check_callable("model", model)
    rank = pixel_ranks(maps, images)
    pixels = images.shape[2] * images.shape[3]
    check_count("steps", steps, 1, pixels)
    for _, fill in wanted:
        check_choice("fill", fill, REMOVAL_FILLS)
    images = images.detach()
    fills = list(dict.fromkeys(fill for _, fill in wanted))
    filled = torch.stack([FILLS[fill](images) for fill in fills])
    counts = [round(step * pixels / steps) for step in range(steps + 1)]

    def state(inserts: bool, fill: int, count: int) -> tuple[bool, int, int]:
        """What is shown; the same where one curve ends and another begins."""
        hidden = pixels - count if inserts else count
        if hidden == 0:
            return False, 0, 0
        return (False, fill, pixels) if hidden == pixels else (inserts, fill, count)

    each = [[state(inserts, fills.index(fill), c) for c in counts] for inserts, fill in wanted]
    states = list(dict.fromkeys(one for curve in each for one in curve))
    columns = [torch.tensor(c, device=images.device) for c in zip(*states, strict=True)]
    is_insertion, of_fill, count = columns

    def shown(sample: Tensor, number: Tensor) -> Tensor:
        is_largest = rank[sample] < count[number].view(-1, 1, 1, 1)
        hidden = is_largest != is_insertion[number].view(-1, 1, 1, 1)
        return torch.where(hidden, filled[of_fill[number], sample], images[sample])

    at_once = images_at_once(images, batch_size)
    probability, _ = state_probabilities(model, shown, len(states), classes, images, at_once)
    share = torch.tensor(counts, device=images.device) / pixels
    place = {one: i for i, one in enumerate(states)}
    return [RemovalCurve(share, probability[:, [place[s] for s in curve]]) for curve in each]


def state_probabilities(
    model: Scores,
    shown: Callable[[Tensor, Tensor], Tensor],
    states: int,
    classes: Tensor,
    images: Tensor,
    batch_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the probability of the class, N×``states``, and whether it is the prediction.

    ``shown(samples, numbers)`` makes the images n×C×H×W of so many samples and numbers of states;
    at most ``batch_size`` of them are there at once.
    """
    n = len(images)
    classes = classes.to(images.device)
    probability = torch.empty(n * states, device=images.device)
    is_first = torch.empty(n * states, dtype=torch.bool, device=images.device)
    for start in counted(range(0, n * states, batch_size), "batch", None, "removing pixels"):
        items = torch.arange(start, min(start + batch_size, n * states), device=images.device)
        sample = items // states
        scores = class_scores(model, shown(sample, items % states), sample)
        probability[items] = log_probabilities(scores, classes[sample]).exp()
        is_first[items] = scores.argmax(dim=1) == classes[sample]
    return probability.view(n, states), is_first.view(n, states)
