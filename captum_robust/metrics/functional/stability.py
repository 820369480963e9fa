"""How far an attribution map stays the same under an attack, and how much of the loss is made good.

Each measure takes the maps of the clean images and those of the attacked ones, both N×H×W, and
gives N float64: 1 for a map that did not change. None sees the scale of a map, nor (at the default
threshold of the boxes) what is added to it; the rank correlation and the top-k intersection depend
on the order of the pixels only.

A constant map, such as the class activation map of an image with nothing positive, says nothing
about places. Its correlation is undefined; here it is 0 with any other map, and 1 with another
constant one, so that an attack which empties a map counts as one that moved it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_number, check_shape
from captum_robust.metrics.functional._validate import (
    check_like,
    check_maps,
    check_real,
    without_channel,
)
from captum_robust.metrics.functional.bootstrap import (
    check_resampling,
    one_a_sample,
    percentiles,
    resampled_means,
)
from captum_robust.metrics.functional.box_accuracy import min_max
from captum_robust.metrics.functional.boxes import overlap
from captum_robust.metrics.functional.components import largest_component, mask_to_box
from captum_robust.metrics.functional.thresholding import check_alpha, threshold

# Wang et al.'s, a Gaussian of 1.5 pixels.
SSIM_WINDOW = 11


def spearman_correlation(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return the rank correlation of each pair of maps; equal pixels have the mean of their ranks.

    Args:
        clean: maps N×H×W, any sign and scale.
        attacked: maps N×H×W of the same images.

    Returns:
        N float64 in [-1, 1]; see :mod:`captum_robust.metrics.functional.stability` for constants.

    Raises:
        ValueError: shapes that differ or are not N×H×W; NaN or infinity (naming the sample).
        TypeError: no tensors, or complex ones.

    >>> a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> spearman_correlation(a, a.exp()).item()
    1.0
    """
    a, b = _pair(clean, attacked)
    return _correlation(_ranks(a), _ranks(b))


def pearson_correlation(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return the linear correlation of the pixels of each pair of maps, N float64 in [-1, 1].

    Arguments and errors are those of :func:`spearman_correlation`.

    >>> a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    >>> pearson_correlation(a, 5 - 2 * a).item()
    -1.0
    """
    a, b = _pair(clean, attacked)
    return _correlation(a.flatten(1).double(), b.flatten(1).double())


def structural_similarity(clean: Tensor, attacked: Tensor) -> Tensor:
    """Return the structural similarity (SSIM) of each pair of maps, N float64 in [-1, 1].

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004),
    with its Gaussian window of 11 pixels, averaged over the windows that lie within the map. Each
    map is scaled to [0, 1] by its own smallest and largest pixel (a constant one to zeros), and the
    data range is 1: maps have no unit.

    Arguments and errors are those of :func:`spearman_correlation`; a map smaller than the window
    is a ``ValueError``.
    """
    a, b = _pair(clean, attacked)
    check(
        min(a.shape[1:]) >= SSIM_WINDOW,
        f"clean: expected maps of at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels for the structural "
        f"similarity, got {a.shape[1]}×{a.shape[2]}; enlarge them to the size of the image",
    )
    if len(a) == 0:
        return torch.zeros(0, dtype=torch.float64, device=a.device)
    from torchmetrics.functional.image import structural_similarity_index_measure

    scaled_a, scaled_b = (min_max(maps).to(maps.dtype)[:, None] for maps in (a, b))
    _, similarity = structural_similarity_index_measure(
        scaled_a, scaled_b, data_range=1.0, reduction="none", return_full_image=True
    )
    # torchmetrics also counts windows that hang over the edge, on mirrored pixels.
    edge = SSIM_WINDOW // 2
    inside = similarity[:, 0, edge : a.shape[1] - edge, edge : a.shape[2] - edge]
    return inside.double().mean(dim=(1, 2))


def top_k_intersection(clean: Tensor, attacked: Tensor, share: float = 0.1) -> Tensor:
    """Return the part of the largest pixels of one map that are among the largest of the other.

    Ghorbani et al., "Interpretation of Neural Networks is Fragile" (2019). Where several equal
    pixels compete for the last places, each has an equal part of them. So a constant map shares
    ``share`` with any map without ties: what chance gives.

    Arguments and errors are those of :func:`spearman_correlation`, and:

    Args:
        clean: N×H×W.
        attacked: N×H×W.
        share: of the pixels that count as the largest ones, in (0, 1]; at least one pixel.

    Returns:
        N float64 in [0, 1].

    >>> a = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
    >>> b = torch.tensor([[[4.0, 1.0], [2.0, 3.0]]])
    >>> top_k_intersection(a, b, share=0.5).item()
    0.5
    """
    a, b = _pair(clean, attacked)
    check_number("share", share, 0, 1, open_low=True)
    count = max(1, round(share * a[0].numel())) if len(a) else 1
    return torch.minimum(_places(a, count), _places(b, count)).sum(dim=1) / count


def map_box_iou(
    clean: Tensor, attacked: Tensor, strategy: str = "value", alpha: float = 0.2
) -> Tensor:
    """Return the overlap (intersection over union) of the boxes that a threshold draws.

    A box is drawn around the largest connected region above the threshold, as for
    :func:`captum_robust.metrics.functional.localization_error`.

    Arguments and errors are those of :func:`spearman_correlation`, and:

    Args:
        clean: N×H×W.
        attacked: N×H×W.
        strategy: a family of :func:`captum_robust.metrics.functional.threshold`.
        alpha: its threshold.

    Returns:
        N float64 in [0, 1].

    >>> a = torch.zeros(1, 4, 6)
    >>> b = a.clone()
    >>> a[0, 1:3, 1:3], b[0, 1:3, 2:4] = 1, 1
    >>> round(map_box_iou(a, b).item(), 3)
    0.333
    """
    boxes = [
        mask_to_box(largest_component(threshold(maps, strategy, alpha)))
        for maps in _pair(clean, attacked)
    ]
    return overlap(boxes[0].double(), boxes[1].double())


_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spearman": spearman_correlation,
    "pearson": pearson_correlation,
    "ssim": structural_similarity,
    "top_k": top_k_intersection,
    "box_iou": map_box_iou,
}
STABILITY_MEASURES = tuple(_MEASURES)
"""The names that :func:`stability` knows; a higher value is more stable."""


def stability(
    clean: Tensor,
    attacked: Tensor,
    *,
    measures: Sequence[str] = STABILITY_MEASURES,
    reduce: str = "mean",
    share: float = 0.1,
    strategy: str = "value",
    alpha: float = 0.2,
) -> dict[str, Tensor]:
    """Return how far the map of each image stays the same under one or several attacks.

    Args:
        clean: maps N×H×W or N×1×H×W of the clean images.
        attacked: maps A×N×H×W under A attacks (or draws of one), or N×H×W under a single one; each
            may have the one channel that attributions return, as in A×N×1×H×W.
        measures: names of :data:`STABILITY_MEASURES`: the correlations of Spearman and Pearson, the
            structural similarity, the top-k intersection, and the overlap of the boxes.
        reduce: over the attacks on an image: ``"mean"``, or ``"worst"``, the lowest value, which
            each measure takes from an attack of its own.
        share: of the pixels, for :func:`top_k_intersection`.
        strategy, alpha: the threshold of the boxes, for :func:`map_box_iou`.

    Returns:
        For each measure N float64.

    Raises:
        ValueError: unknown names, shapes that do not fit, no attack, NaN or infinity.

    >>> clean = torch.arange(4.0).view(1, 2, 2)
    >>> two = torch.stack([clean, -clean])
    >>> stability(clean, two, measures=["spearman"], reduce="worst")["spearman"].item()
    -1.0
    """
    check_stability_settings(measures, reduce, share, strategy, alpha)
    clean = check_maps(clean, "clean")
    check_real("attacked", attacked, "a tensor A×N×H×W", truths=True)
    check(attacked.ndim, "attacked: expected A×N×H×W, got a single number")
    if attacked.dim() == 5 and attacked.shape[2] == 1:
        attacked = attacked[:, :, 0]
    elif len(attacked) == len(clean):  # else A×1×H×W of one image
        attacked = without_channel(attacked)
    attacks = attacked[None] if attacked.dim() == 3 else attacked
    check_shape("attacked", attacks, "A×N×H×W")
    check(len(attacks), "attacked: expected the maps of at least one attack, got none")
    chosen = _MEASURES | {
        "top_k": lambda a, b: top_k_intersection(a, b, share),
        "box_iou": lambda a, b: map_box_iou(a, b, strategy, alpha),
    }
    each = {n: torch.stack([chosen[n](clean, maps) for maps in attacks]) for n in measures}
    return {n: v.mean(dim=0) if reduce == "mean" else v.amin(dim=0) for n, v in each.items()}


def check_stability_settings(
    measures: Sequence[str], reduce: str, share: float, strategy: str, alpha: float
) -> None:
    """Refuse names and settings that :func:`stability` does not know."""
    is_list = isinstance(measures, Sequence) and not isinstance(measures, str)
    check(is_list, f"measures: expected a sequence of names, got {measures!r}", TypeError)
    for name in measures:
        check_choice("measures", name, STABILITY_MEASURES)
    once = measures and len(set(measures)) == len(measures)
    check(once, f"measures: expected at least one, and each once, got {list(measures)}")

    check_choice("reduce", reduce, ("mean", "worst"))
    check_number("share", share, 0, 1, open_low=True)
    check_alpha(strategy, alpha)


@dataclass(frozen=True)
class GapClosed:
    """How much of what an attack costs a method is not lost by another one.

    Attributes:
        value: 1: as good under attack as the baseline on clean images; 0: no better under attack
            than the baseline; below 0: worse. NaN where the attack costs the baseline nothing.
        low: the lower end of the bootstrap interval; NaN along with the value, and of one image.
        high: the upper end.
        level: the share of the resamples with a gap that lies between the ends.
        n: the images that have all three outcomes.
        gap: what the attack costs the baseline: its error attacked - clean.
        without_gap: the share of the resamples in which there is no gap to close; they are not in
            the interval, which says little where they are many.
        reason: why there is no value, or None.
    """

    value: float
    low: float
    high: float
    level: float
    n: int
    gap: float
    without_gap: float
    reason: str | None


def gap_closed(
    attacked: Tensor,
    baseline_attacked: Tensor,
    baseline_clean: Tensor,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> GapClosed:
    """Return the part of the gap that an attack opens for the baseline, and that a method closes.

    (error of the baseline attacked - error of the method attacked) / (error of the baseline
    attacked - error of the baseline clean), with the interval of the paired bootstrap: each
    resample draws the same images for all three.

    Args:
        attacked: N failures of the method under attack: 1 or True where its box misses (or any
            error of an image, as ``LocalizationResult.per_sample_error``); NaN where not scored.
        baseline_attacked: those of the baseline (Grad-CAM, say) under the attack.
        baseline_clean: those of the baseline on the clean images. An image with a NaN in any of
            the three is left out.
        level: as in :func:`captum_robust.metrics.functional.bootstrap_interval`, like the rest.
        resamples: how often N images are drawn with replacement.
        seed: the same seed gives the same interval.

    Raises:
        ValueError: shapes other than N or that differ; infinity; no image with all three;
            arguments out of range.
        TypeError: no tensors, or complex ones.

    >>> ours, clean = torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 2)
    >>> gap_closed(ours, torch.tensor([1.0, 1.0, 1.0, 0.0]), clean).value
    1.0
    """
    names = ("attacked", "baseline_attacked", "baseline_clean")
    outcomes = (attacked, baseline_attacked, baseline_clean)
    checked = [one_a_sample(name, v) for name, v in zip(names, outcomes, strict=True)]
    for name, values in zip(names, checked, strict=True):
        check_like(name, values, "attacked", checked[0])
    check_resampling(level, resamples, seed)
    columns = torch.stack(checked)
    columns = columns[:, ~columns.isnan().any(dim=0)]
    every = ", ".join(names)
    n = columns.shape[1]
    check(n, f"{every}: expected an image with all three outcomes, got none")
    ours, hit, clean = columns.mean(dim=1).tolist()
    gap = hit - clean
    means = resampled_means(columns, resamples, seed)
    gaps = means[1] - means[2]
    # Means of ones and zeros: a gap is at least 1/n, and rounding leaves less than that.
    is_open = gaps > 1e-9
    without = 1 - is_open.double().mean().item()
    if gap <= 1e-9:
        reason = (
            f"the attack costs the baseline nothing: its error is {hit:.4f} attacked and "
            f"{clean:.4f} clean"
        )
        return GapClosed(math.nan, math.nan, math.nan, level, n, gap, without, reason)
    ratios = ((means[1] - means[0]) / gaps)[is_open]
    interval = percentiles(ratios, level, n)
    return GapClosed((hit - ours) / gap, *interval, level, n, gap, without, None)


def _pair(clean: Tensor, attacked: Tensor) -> tuple[Tensor, Tensor]:
    """Checked maps of one shape, dtype and device."""
    a, b = check_maps(clean, "clean"), check_maps(attacked, "attacked")
    check_like("attacked", b, "clean", a)
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(device=a.device, dtype=dtype)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """N, of values N×P in float64."""
    constant, centered = [], []
    for values in (a, b):
        constant.append(values.amax(dim=1) == values.amin(dim=1))
        # Divided by the largest: squares of float64 pixels must not overflow.
        scaled = values / values.abs().amax(dim=1, keepdim=True).clamp(min=1e-300)
        scaled = scaled - scaled.mean(dim=1, keepdim=True)
        centered.append(scaled / scaled.norm(dim=1, keepdim=True).clamp(min=1e-300))
    cosine: Tensor = (centered[0] * centered[1]).sum(dim=1).clamp(-1, 1)
    cosine = cosine.masked_fill(constant[0] ^ constant[1], 0)
    return cosine.masked_fill(constant[0] & constant[1], 1)


def _ranks(maps: Tensor) -> Tensor:
    """N×P, from 1, in float64: sums of the ranks of an image's pixels exceed float32."""
    values = maps.flatten(1).contiguous()
    ascending = values.sort(dim=1).values
    first = torch.searchsorted(ascending, values)
    behind = torch.searchsorted(ascending, values, right=True)
    return (first + behind + 1).double() / 2


def _places(maps: Tensor, count: int) -> Tensor:
    """N×P float64: 1 for the ``count`` largest pixels; equal ones share the last places."""
    values = maps.flatten(1)
    last = values.topk(count, dim=1).values[:, -1:]
    above, tied = values > last, values == last
    left = count - above.sum(dim=1, keepdim=True).double()
    return above.double() + tied * (left / tied.sum(dim=1, keepdim=True))
