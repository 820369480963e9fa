"""What noisy copies of an image prove of it: randomized smoothing, pixel by pixel and of a box.

Let a pixel be shown (by a map that is made of zeros and ones) with the probability p for noise of
the standard deviation σ. For an image that differs by at most R in L2 it is shown with at least the
probability Φ(Φ⁻¹(p) - R/σ) (Cohen, Rosenfeld and Kolter, "Certified Adversarial Robustness via
Randomized Smoothing", https://arxiv.org/abs/1902.02918): above one half if p > τ = Φ(R/σ). Whether
p > τ is tested on n copies, for all pixels at once, as in Fischer, Baader and Vechev, "Scalable
Certified Segmentation via Randomized Smoothing" (https://arxiv.org/abs/2107.00228), and, of
attributions, Anani et al., "Pixel-level Certified Explanations via Randomized Smoothing" (2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from captum_robust._checks import check, check_choice, check_count, check_number, check_shape
from captum_robust.metrics.functional._validate import (
    check_box_list,
    check_boxes,
    check_real,
    on_device_with_float64,
)
from captum_robust.metrics.functional.boxes import overlap

CORRECTIONS = ("holm", "bonferroni")
"""How tests of many pixels at once keep the confidence, see :func:`certify_counts`."""


def certify_counts(
    shown: Tensor,
    hidden: Tensor,
    n: int,
    tau: float = 0.75,
    confidence: float = 0.999,
    correction: str = "holm",
) -> tuple[Tensor, Tensor]:
    r"""Return which pixels are proven to be shown, and which to be hidden, from counts of copies.

    Of a pixel that is shown in c of n copies the probability p is tested by an exact binomial test
    against the nearest p that proves nothing, τ:

    .. math:: P = P(B_{n,\tau} \ge k) + P(B_{n,1-\tau} \ge k), \qquad k = \max(c, n - c)

    The second term is the chance that a pixel with p = τ looks hidden, so that the same copies can
    say which of the two is tested; it is far below the first one, which is the test of the papers.
    All pixels of a sample that are proven are so at once with the confidence: their tests are
    corrected for as many tests as there are pixels.

    Args:
        shown: N×… counts of copies that show the pixel.
        hidden: N×… counts of those that don't. A copy that can't tell is in neither.
        n: how many copies there are.
        tau: τ in (½, 1); the pixels stay what they are proven to be within the radius σ Φ⁻¹(τ).
        confidence: in (0, 1), that nothing of what is proven of a sample is wrong.
        correction: ``"bonferroni"``: P ≤ (1 - confidence) / pixels, as Anani et al.;
            ``"holm"``: step by step, which proves at least as much, as Fischer et al.

    Returns:
        Two Boolean tensors N×….

    Raises:
        ValueError: counts that do not fit, or numbers out of range.

    >>> shown, hidden = torch.tensor([[100, 88, 50, 1]]), torch.tensor([[0, 12, 50, 99]])
    >>> certify_counts(shown, hidden, 100)
    (tensor([[ True, False, False, False]]), tensor([[False, False, False,  True]]))
    """
    check_real("shown", shown)
    check_real("hidden", hidden)
    check(shown.shape == hidden.shape, "hidden: expected the shape of shown")
    check(shown.ndim > 1 and shown[:1].numel(), f"shown: expected N×…, got {tuple(shown.shape)}")
    check_count("n", n, 1)
    fits = ((shown >= 0) & (hidden >= 0) & (shown + hidden <= n)).all()
    check(fits, f"shown: expected counts of at most n={n} copies with hidden")
    check_choice("correction", correction, CORRECTIONS)
    alpha = _error(tau, confidence)
    most = torch.maximum(shown, hidden).reshape(len(shown), -1)
    most = on_device_with_float64(most).long()
    pixels = most.shape[1]
    p = _p_values(n, tau).to(most.device)[most]
    if correction == "bonferroni":
        proven = p <= alpha / pixels
    else:
        ordered, order = p.sort(dim=1)
        steps = torch.arange(pixels, 0, -1, device=p.device, dtype=p.dtype)
        passed = (ordered <= alpha / steps).cumprod(dim=1).bool()
        proven = torch.zeros_like(passed).scatter_(1, order, passed)
    proven = proven.reshape(shown.shape).to(shown.device)
    return proven & (shown > hidden), proven & (hidden > shown)


def least_samples(pixels: int, tau: float = 0.75, confidence: float = 0.999) -> int:
    """Return how many copies it takes at least for one of the pixels to be proven.

    >>> least_samples(7 * 7), least_samples(224 * 224)
    (38, 62)
    """
    check_count("pixels", pixels, 1)
    alpha = _error(tau, confidence) / pixels
    n = max(1, math.floor(math.log(alpha) / math.log(tau)))
    while tau**n + (1 - tau) ** n > alpha:
        n += 1
    return n


def probability_above(count: Tensor, n: int, confidence: float = 0.999) -> Tensor:
    """Return what the probability of an event exceeds that occurred in so many of n cases.

    The one-sided exact bound of Clopper and Pearson (1934).

    Args:
        count: … whole numbers in [0, n].
        n: cases.
        confidence: that the bound holds.

    Returns:
        … float64; 0 for a count of 0.

    Raises:
        ValueError: a number out of range.

    >>> round(probability_above(torch.tensor(100), 100).item(), 4)  # 0.001 ** (1 / 100)
    0.9333
    """
    from scipy.stats import beta

    check_count("n", n, 1)
    check_number("confidence", confidence, 0, 1, open_low=True, open_high=True)
    check_real("count", count)
    check(((count >= 0) & (count <= n)).all(), f"count: expected numbers from 0 to n={n}")
    k = count.double().cpu().numpy()
    bound = torch.as_tensor(beta.ppf(1 - confidence, k, n - k + 1), dtype=torch.float64)
    return bound.nan_to_num(0).reshape(count.shape).to(count.device)


def order_for(n: int, tau: float, alpha: float) -> int | None:
    """Return the least k for which k of n cases refute, at the level α, a probability ≤ τ.

    None where all n cases do not.
    """
    from scipy.stats import binom

    k = int(binom.isf(alpha, n, tau)) + 1  # P(B > k - 1) ≤ α
    return k if k <= n else None


def certified_iou(inner: Tensor, outer: Tensor, boxes: Tensor) -> Tensor:
    """Return the least overlap with a box of any box that lies between two.

    A box B with inner ⊆ B ⊆ outer has each of its four sides between those of the two. With three
    sides fixed, the overlap as a function of the fourth is monotonic while that side is within the
    given box (numerator and denominator are linear in it), and falls the farther it is outside. So
    it is smallest at one end of the range, whatever the other three are: the least of all boxes is
    the least of the 16 whose sides are each of ``inner`` or of ``outer``.

    Args:
        inner: N×4 (x0, y0, x1, y1) in pixels, half-open; NaN where there is none.
        outer: N×4, NaN likewise.
        boxes: N×4.

    Returns:
        N float32 in [0, 1]; 0 where inner or outer is NaN, as nothing is proven there.

    Raises:
        ValueError: shapes that do not fit, or an inner box that is not within the outer one.

    >>> inner, outer = torch.tensor([[2.0, 2, 6, 6]]), torch.tensor([[0.0, 0, 8, 8]])
    >>> certified_iou(inner, outer, torch.tensor([[0.0, 0, 8, 8]]))
    tensor([0.2500])
    """
    for name, value in (("inner", inner), ("outer", outer)):
        check_shape(name, value, "N×4")
        check(len(value) == len(boxes), f"{name}: expected {len(boxes)} boxes, got {len(value)}")
    check_boxes("boxes", boxes, "N×4")
    known = ~(inner.isnan() | outer.isnan()).any(dim=1)
    # Where nothing is known, both stand for an empty box.
    inner, outer = (torch.where(known[:, None], b, torch.zeros_like(b)) for b in (inner, outer))
    is_within = (inner[:, :2] >= outer[:, :2]) & (inner[:, 2:] <= outer[:, 2:])
    check(is_within.all(), "inner: expected boxes within those of outer")
    corners = torch.tensor([[i >> side & 1 for side in range(4)] for i in range(16)])
    between = torch.where(corners.bool().to(inner.device), inner[:, None], outer[:, None])
    least = overlap(between, boxes[:, None].to(inner)).amin(dim=1).float()
    return torch.where(known, least, torch.zeros_like(least))


def certified_localization_error(
    inner: Tensor, outer: Tensor, boxes: Tensor | Sequence[Tensor], iou_threshold: float = 0.5
) -> float:
    """Return the share of images whose box is not proven to be right, whatever the attacker does.

    It is proven where every box between the two overlaps one of the image's boxes by more than
    ``iou_threshold`` (:func:`certified_iou`). Images without a box are left out.

    Args:
        inner: N×4, NaN where there is none.
        outer: N×4, likewise.
        boxes: N tensors M_i×4, or one N×M×4.
        iou_threshold: the overlap, in [0, 1).

    Raises:
        ValueError: shapes that do not fit; no image with a box.

    >>> inner, outer = torch.tensor([[2.0, 2, 6, 6]]), torch.tensor([[0.0, 0, 8, 8]])
    >>> certified_localization_error(inner, outer, [torch.tensor([[1.0, 1, 7, 7]])])
    1.0
    """
    check_number("iou_threshold", iou_threshold, 0, 1, open_high=True)
    proven = best_certified_iou(inner, outer, boxes)
    proven = proven[~proven.isnan()]
    check(len(proven), f"boxes: expected an image with a box among {len(inner)}")
    return (~(proven > iou_threshold)).double().mean().item()


def best_certified_iou(inner: Tensor, outer: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    """Return the :func:`certified_iou` of each image with the box that it fits best.

    Args:
        inner, outer, boxes: as :func:`certified_localization_error`.

    Returns:
        N float32; NaN for an image without a box.
    """
    each = list(boxes)
    check_box_list(each, len(inner))
    counts = torch.tensor([len(b) for b in each], dtype=torch.long, device=inner.device)
    rows = torch.arange(len(inner), device=inner.device).repeat_interleave(counts)
    best = inner.new_full((len(inner),), torch.nan, dtype=torch.float32)
    if len(rows):
        all_boxes = torch.cat([b.to(inner.device, inner.dtype) for b in each])
        least = certified_iou(inner[rows], outer[rows], all_boxes)
        best = best.nan_to_num(-1).scatter_reduce(0, rows, least, "amax")
        best = best.masked_fill(counts == 0, torch.nan)
    return best


def probability_at(distance: float) -> float:
    """Φ: the probability that a standard normal variable is below ``distance``."""
    return (1 + math.erf(distance / math.sqrt(2))) / 2


def _error(tau: float, confidence: float) -> float:
    check_number("tau", tau, 0.5, 1, open_low=True, open_high=True)
    check_number("confidence", confidence, 0, 1, open_low=True, open_high=True)
    return 1 - confidence


def _p_values(n: int, tau: float) -> Tensor:
    """P for each k from 0 to n."""
    from scipy.stats import binom

    k = torch.arange(n + 1).numpy()
    return torch.from_numpy(binom.sf(k - 1, n, tau) + binom.sf(k - 1, n, 1 - tau))
