"""The saliency metric of Dabkowski & Gal (2017): how small a crop the class survives.

"Real Time Image Saliency for Black Box Classifiers" (arXiv 1705.07857), section 5: the smallest
rectangle around the salient pixels is cut out of the image, resized to the classifier's input, and
classified. With a, the share of the image's area that was cut out, and p, the probability of the
class, the metric is log(max(a, .05)) - log p. Lower is better; a crop of at most a twentieth of the
image that is classified without doubt reaches the minimum, log .05 = -3.0.

The paper leaves open, and this module decides: the rectangle holds *all* pixels above the threshold
(no component is left out); of an empty mask it is the whole image; the crop is stretched to the
classifier's input whatever its shape, bilinearly, and antialiased where it is made smaller, as all
images here are. A crop is mostly made larger, where antialiasing changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from captum_robust._checks import (
    check,
    check_callable,
    check_choice,
    check_classes,
    check_count,
    check_finite,
    check_number,
    check_shape,
    check_type,
)
from captum_robust._contexts import evaluation
from captum_robust._progress import counted
from captum_robust._scores import are_probabilities, copies_of, two_classes
from captum_robust.metrics.functional._validate import (
    ROUNDING,
    check_flag,
    check_like,
    check_maps,
    check_real,
    check_seed,
    check_size,
    check_within,
    numbers_in,
    on_device_with_float64,
    without_channel,
)
from captum_robust.metrics.functional.box_sweep import sweep_boxes
from captum_robust.metrics.functional.boxes import covered_pixels
from captum_robust.metrics.functional.components import mask_to_box
from captum_robust.metrics.functional.folds import (
    LARGEST_SUMMAND,
    best_columns,
    fold_sums,
    folds_of,
    millionths,
)
from captum_robust.metrics.functional.thresholding import STRATEGIES, alpha_grid, check_alpha
from captum_robust.metrics.functional.thresholding import threshold as threshold_maps

LARGEST_SCORE = 1e9
"""Of a class; some models take so much from classes that are ruled out."""

SMALLEST_AREA = 0.05
"""Smaller crops count as this share of the image."""

SALIENCY_THRESHOLDS: dict[str, tuple[float, ...]] = {
    "value": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "mean": (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    "percentile": (0.7, 0.8, 0.9, 0.95),
}
"""The thresholds that are tried where one is chosen: each costs a classifier pass an image, less
for those that draw the same box."""

Scores: TypeAlias = Callable[[Tensor], Tensor]
"""A classifier: images N×C×H×W -> class scores (logits) N×K."""


@dataclass(frozen=True, eq=False)
class SaliencyScores:
    """The outcome of :func:`saliency_metric`, N float32 each on the images' device."""

    metric: Tensor
    """log(max(area, .05)) - log probability; lower is better."""
    area: Tensor
    """The area of the crop as a share of the image's."""
    probability: Tensor
    """The probability of the class for the crop."""


def tightest_box(masks: Tensor, threshold: float = 0.5) -> Tensor:
    """Return the smallest box around all pixels of each mask that are above the threshold.

    Args:
        masks: N×H×W, usually in [0, 1].
        threshold: in the unit of the masks.

    Returns:
        N×4 float32 (x0, y0, x1, y1) in pixels, half-open; the whole image where none is above.

    Raises:
        ValueError: NaN or infinity in a mask, another shape, or a threshold that is no number.

    >>> mask = torch.zeros(1, 4, 6)
    >>> mask[0, 1, 1], mask[0, 3, 4] = 0.6, 0.9
    >>> tightest_box(mask).tolist(), tightest_box(mask, 0.8).tolist()
    ([[1.0, 1.0, 5.0, 4.0]], [[4.0, 3.0, 5.0, 4.0]])
    """
    threshold = check_number("threshold", threshold)
    return mask_to_box(check_maps(masks, "masks") > threshold)


def saliency_boxes(
    maps: Tensor, thresholds: Mapping[str, Sequence[float]] = SALIENCY_THRESHOLDS
) -> Tensor:
    """Return the tightest box at every threshold of maps of any scale.

    Args:
        maps: N×H×W.
        thresholds: for each family (:func:`captum_robust.metrics.functional.threshold`) which of
            the thresholds in its :func:`captum_robust.metrics.functional.alpha_grid`. "value" is a
            share of the map's range, "mean" a multiple of its mean.

    Returns:
        N×A×4 float32, the families one after the other.

    Raises:
        ValueError: an unknown family, or a threshold that is not in its grid.
    """
    check_thresholds(thresholds)
    swept = sweep_boxes(maps, list(thresholds), largest_component_only=False)
    parts = []
    for family, alphas in thresholds.items():
        grid = alpha_grid(family)
        parts.append(swept[family][:, [grid.index(alpha) for alpha in alphas]])
    return torch.cat(parts, dim=1)


def check_thresholds(thresholds: Mapping[str, Sequence[float]]) -> None:
    """Refuse families and thresholds that :func:`saliency_boxes` does not know."""
    check_type("thresholds", thresholds, Mapping, "a mapping from families to thresholds")
    check(thresholds, "thresholds: expected at least one family, got none")
    for family, alphas in thresholds.items():
        check_choice("thresholds", family, STRATEGIES)
        for alpha in numbers_in(f"thresholds of {family!r}", alphas, 0, math.inf):
            check_choice(f"thresholds of {family!r}", alpha, alpha_grid(family))


def crop_and_resize(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut one box out of each image and stretch it to one size, bilinearly and antialiased.

    What ``interpolate(image[:, y0:y1, x0:x1], size, mode="bilinear", antialias=True)`` gives, for
    the whole batch at once: a resize of the rows and one of the columns, each a matrix product.

    Args:
        images: N×C×H×W floating point.
        boxes: N×4 (x0, y0, x1, y1) in pixels of the images, half-open. Of fractions of pixels, a
            pixel is cut out where the box holds its centre; at least one is.
        size: (h, w).

    Returns:
        N×C×h×w, of the images' dtype.

    Raises:
        ValueError: shapes that do not fit; NaN, a box with x1 < x0 or y1 < y0, or outside.
        TypeError: images that are not floating point; boxes that are no tensor.

    >>> image = torch.arange(16.0).view(1, 1, 4, 4)
    >>> crop_and_resize(image, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), (2, 2)).tolist()
    [[[[9.0, 10.0], [13.0, 14.0]]]]
    """
    check_images(images)
    check_real("boxes", boxes, f"a tensor {len(images)}×4")
    check_shape("boxes", boxes, f"{len(images)}×4")
    return _crops(images, _whole_pixels(boxes, images), check_size(size))


def saliency_metric(
    model: Scores,
    images: Tensor,
    masks: Tensor,
    classes: Tensor,
    *,
    threshold: float = 0.5,
    strategy: str | None = None,
    size: tuple[int, int] | None = None,
    batch_size: int | None = None,
) -> SaliencyScores:
    """Return the saliency metric of each image: log(max(a, .05)) - log p.

    Args:
        model: images -> class scores (before the softmax). It is put in evaluation mode while this
            lasts, and gets no gradients.
        images: N×C×H×W as the model takes them, without any mask; may be larger than its input.
        masks: N×h×w, of any size, or boxes N×4 in pixels of the images.
        classes: N class indices.
        threshold: pixels above it are salient.
        strategy: None: the threshold is in the unit of the masks. Or a family of
            :func:`captum_robust.metrics.functional.threshold`, for maps of any scale: "value", a
            share of the map's range; "mean", a multiple of its mean; "energy"; "percentile".
        size: (height, width) that crops are resized to; None: ``model.input_size`` or, where the
            model has none, the size of the images.
        batch_size: how many crops the model gets at once; None: 64, on a CPU 8 a thread.

    Raises:
        ValueError: shapes that do not fit, a class that the model does not have, NaN or infinity.
        TypeError: ``images`` or ``classes`` of another kind.

    >>> def model(x):  # .8 for the first of two classes, whatever the image
    ...     return torch.tensor([0.8, 0.2]).log().expand(len(x), 2)
    >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])  # a quarter of the image
    >>> scores = saliency_metric(model, torch.rand(1, 3, 8, 8), box, torch.tensor([0]))
    >>> round(scores.metric.item(), 4)  # log .25 - log .8
    -1.1632
    """
    n = check_question(images, classes, batch_size)
    check_callable("model", model)
    check_real("masks", masks, f"a tensor {n}×h×w, or boxes {n}×4", truths=True)
    if strategy is None:
        check_number("threshold", threshold)
    else:
        check_alpha(strategy, threshold, "threshold")
    masks = without_channel(masks)
    masks = check_maps(masks, "masks") if masks.ndim == 3 else masks
    shape = tuple(masks.shape)
    fits = shape == (n, 4) or (shape[:1] == (n,) and masks.dim() == 3)
    check(fits, f"masks: expected {n}×h×w, or boxes {n}×4, got {shape}")
    boxes = masks
    if masks.dim() == 3:
        if strategy is None:
            boxes = tightest_box(masks, threshold)
        else:
            boxes = mask_to_box(threshold_maps(masks, strategy, threshold))
        scale = (images.shape[3] / masks.shape[2], images.shape[2] / masks.shape[1])
        boxes = boxes * boxes.new_tensor([*scale, *scale])
    area, log_probability = crop_scores(
        model, images, boxes[:, None], classes, size=size, batch_size=batch_size
    )
    area, log_probability = area[:, 0], log_probability[:, 0]
    return SaliencyScores(saliency_of(area, log_probability), area, log_probability.exp())


def saliency_of(area: Tensor, log_probability: Tensor) -> Tensor:
    """Return log(max(area, .05)) - log probability, element by element.

    Args:
        area: shares in [0, 1] of an image.
        log_probability: of the same shape, from -4e9 to 0.

    Raises:
        ValueError: others, NaN among them.
        TypeError: no tensors of real numbers.

    >>> round(saliency_of(torch.tensor(0.01), torch.tensor(0.0)).item(), 4)  # log .05
    -2.9957
    """
    check_real("area", area)
    check_real("log_probability", log_probability)
    check_like("log_probability", log_probability, "area", area)
    check_within("area", area, 0, 1 + ROUNDING)
    check_within("log_probability", log_probability, -LARGEST_SUMMAND, ROUNDING)
    area = area if area.is_floating_point() else area.float()
    return area.clamp(min=SMALLEST_AREA).log() - log_probability


def crop_scores(
    model: Scores,
    images: Tensor,
    boxes: Tensor,
    classes: Tensor,
    *,
    size: tuple[int, int] | None = None,
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the share of the area and the log probability of every crop.

    Boxes of an image that cut out the same pixels are classified once.

    Args:
        model: as in :func:`saliency_metric`, like the rest.
        images: N×C×H×W.
        boxes: N×A×4, A boxes an image (of as many thresholds, say), in pixels of the images.
        classes: N.
        size: of the crops.
        batch_size: how many crops the model gets at once; None: 64, on a CPU 8 a thread.

    Returns:
        N×A float32 twice, on the images' device.
    """
    n = check_question(images, classes, batch_size)
    check_callable("model", model)
    check_real("boxes", boxes, f"a tensor {n}×A×4")
    check_shape("boxes", boxes, f"{n}×A×4")
    images = images.detach()
    height, width = images.shape[2:]
    own: tuple[int, int] = getattr(model, "input_size", (height, width))
    out = check_size(own if size is None else size)
    pixels = _whole_pixels(boxes, images)
    sides = pixels[..., 2:] - pixels[..., :2]
    area = sides.prod(dim=2) / (height * width)
    number = torch.arange(n).repeat_interleave(boxes.shape[1])
    # On the CPU: not every device finds equal rows.
    rows = torch.cat([number[:, None], pixels.flatten(0, 1).cpu().long()], dim=1)
    different, which = torch.unique(rows, dim=0, return_inverse=True)
    parts = []
    batches = torch.split(different.to(images.device), images_at_once(images, batch_size))
    for part in counted(batches, "batch", None, "crops"):
        crops = _crops(images[part[:, 0]], part[:, 1:].float(), out)
        scores = class_scores(model, crops, part[:, 0])
        parts.append(log_probabilities(scores, classes.to(images.device)[part[:, 0]]))
    every = torch.cat(parts) if parts else torch.zeros(0, device=images.device)
    return area, every[which.to(images.device)].view(area.shape)


@dataclass(frozen=True, eq=False)
class TunedSaliency:
    """The outcome of :func:`tuned_saliency`."""

    per_sample: Tensor
    """N float64, each at the threshold that does best on the other half; NaN where not scored."""
    columns: Tensor
    """N, which threshold that is."""
    chosen: tuple[int, ...]
    """The threshold of each half; one where nothing was tuned, or on the reported images."""
    oracle: bool
    """The threshold was tuned on the very samples that are reported."""


def tuned_saliency(
    values: Tensor,
    *,
    ids: Sequence[Hashable] | None = None,
    folds: Tensor | None = None,
    seed: int = 0,
    oracle: bool = False,
) -> TunedSaliency:
    """Score each half of the samples with the threshold whose mean is lowest on the other half.

    Args:
        values: N×A, the metric at A thresholds; a sample with NaN is not scored.
        ids: an id a sample, for the split (:func:`captum_robust.metrics.functional.split_folds`).
        folds: N zeros and ones in place of that split.
        seed: of the split.
        oracle: tune on the reported samples; optimistic.

    Raises:
        ValueError: shapes that do not fit, infinity, no scored sample in a half.

    >>> values = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 0.0], [2.0, 0.0]])
    >>> tuned_saliency(values, folds=torch.tensor([0, 0, 1, 1])).per_sample.tolist()
    [2.0, 2.0, 2.0, 2.0]
    >>> tuned_saliency(values, oracle=True).per_sample.tolist()
    [2.0, 2.0, 0.0, 0.0]
    """
    check_real("values", values, "a tensor N×A")
    check_shape("values", values, "N×A")
    n, count = values.shape
    check(count, "values: expected N×A, A from 1, got none")
    values = on_device_with_float64(values.detach()).double()
    check(not values.isinf().any(), "values: expected no infinity, got some")
    check_flag("oracle", oracle)
    check_seed(seed)
    single = oracle or count == 1
    folds = folds_of(n, ids, folds, seed, single).to(values.device)
    scored = ~values.isnan().any(dim=1)
    members = folds.masked_fill(~scored, -1)
    sums, sizes = fold_sums(millionths(values), members), fold_sums(scored, members)
    chosen = lowest_columns(sums, sizes, single)
    columns = torch.tensor(chosen, device=values.device)[folds]
    picked = values.gather(1, columns[:, None])[:, 0].masked_fill(~scored, torch.nan)
    return TunedSaliency(picked, columns, tuple(chosen), oracle and count > 1)


def lowest_columns(sums: Tensor, sizes: Tensor, single: bool) -> list[int]:
    """Return for each fold the column with the lowest of 2×A sums on the other fold.

    Among equal ones the first counts; arguments and errors are those of
    :func:`captum_robust.metrics.functional.folds.best_columns`.
    """
    best = best_columns(-sums[:, None], torch.zeros_like(sums), sizes, single)
    return [column for (column,) in best]


def log_probabilities(scores: Tensor, classes: Tensor) -> Tensor:
    """Return the log probability N of each image's class, of scores, or probabilities, N×K."""
    check_classes(classes, len(scores), scores.shape[1])
    smallest = torch.finfo(scores.dtype).tiny
    are_ready = are_probabilities(scores)
    logs = scores.clamp(min=smallest).log() if are_ready else scores.log_softmax(dim=1)
    return logs.gather(1, classes[:, None])[:, 0]


def class_scores(model: Scores, images: Tensor, samples: Tensor) -> Tensor:
    """Return the scores N×K in float32, in evaluation mode and without gradients.

    ``samples`` are the numbers of the images in the caller's batch, for errors.
    """
    with torch.no_grad(), evaluation(model):
        scores: Tensor = two_classes(model(copies_of(images)), len(images), "model")
    check_shape("scores of the model", scores, f"{len(images)}×K")
    scores = scores.float()
    finite = (scores.abs() <= LARGEST_SCORE).all(dim=1)  # not so of NaN
    if not finite.all():
        broken = sorted(set(samples[~finite].tolist()))
        expected = f"finite scores, at most {LARGEST_SCORE:g}"
        raise ValueError(f"model: expected {expected}, got others for sample(s) {broken}")
    return scores


def check_images(images: Tensor) -> None:
    """Refuse what is no batch N×C×H×W of floating point."""
    check_real("images", images, "a tensor N×C×H×W", truths=True)
    check_shape("images", images, "N×C×H×W")
    dtype, shape = images.dtype, tuple(images.shape)
    check(dtype.is_floating_point, f"images: expected floating point, got {dtype}", TypeError)
    check(0 not in shape[1:], f"images: expected at least one pixel, got shape {shape}")
    check_finite(images, "images")


def images_at_once(images: Tensor, batch_size: int | None) -> int:
    """Return how many images the model gets at once, where that is not given.

    64 at once take a CPU some 1.6 times as long as 8 do.
    """
    if batch_size is not None:
        return batch_size
    return 8 * torch.get_num_threads() if images.device.type == "cpu" else 64


def check_question(images: Tensor, classes: Tensor, batch_size: int | None) -> int:
    """Return how many images there are; refuse what is not one class index an image."""
    check_images(images)
    check_count("batch_size", batch_size, 1, optional=True)
    n = len(images)
    check_real("classes", classes, f"a tensor of {n} indices")
    got = f"{tuple(classes.shape)} of {classes.dtype}"
    fits = classes.dtype == torch.int64 and classes.shape == (n,)
    check(fits, f"classes: expected {n} indices (int64), got {got}")
    return n


def _whole_pixels(boxes: Tensor, images: Tensor) -> Tensor:
    """The boxes N×…×4 of the pixels whose centre lies in each; at least the one in its middle.

    They are float32, on the images' device.
    """
    boxes = boxes.detach().to(device=images.device, dtype=torch.float32)
    near, far = boxes[..., :2], boxes[..., 2:]
    end = boxes.new_tensor([images.shape[3], images.shape[2]])
    # Also false where a corner is NaN.
    fits = (near <= far) & (near < end) & (far > 0) & near.isfinite() & far.isfinite()
    if not fits.all():
        broken = (~fits).flatten(1).any(dim=1).nonzero().flatten().tolist()
        raise ValueError(
            "boxes: expected x0 ≤ x1, y0 ≤ y1 and a part within the image, got others in "
            f"sample(s) {broken}"
        )
    first, stop = covered_pixels(boxes, (images.shape[2], images.shape[3]))
    middle = torch.minimum(((near + far) / 2).floor().clamp(min=0), end - 1)
    thin = stop <= first
    return torch.cat(
        [torch.where(thin, middle, first), torch.where(thin, middle + 1, stop)], dim=-1
    )


def _crops(images: Tensor, pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Whole-pixel boxes N×4 of the images, resized."""
    across = _resampling(pixels[:, 0], pixels[:, 2], images.shape[3], size[1])
    down = _resampling(pixels[:, 1], pixels[:, 3], images.shape[2], size[0])
    # Autocast would round the pixels to half precision.
    with torch.autocast(images.device.type, enabled=False):
        crops: Tensor = down[:, None] @ images.float() @ across[:, None].mT
    return crops.to(images.dtype)


def _resampling(start: Tensor, stop: Tensor, pixels: int, out: int) -> Tensor:
    """N×out×pixels: what each of ``pixels`` adds to each of ``out`` that stretch start…stop."""
    scale = ((stop - start) / out)[:, None]
    centre = start[:, None] + scale * (torch.arange(out, device=start.device) + 0.5)
    position = torch.arange(pixels, device=start.device) + 0.5
    # Made smaller, an output pixel is a mean over as many input pixels as it covers.
    reach = scale.clamp(min=1)[:, :, None]
    weight = (1 - (position - centre[:, :, None]).abs() / reach).clamp(min=0)
    inside = (position > start[:, None]) & (position < stop[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(dim=2, keepdim=True)
