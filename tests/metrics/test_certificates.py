"""What counts of noisy copies prove, beside SciPy, hand work, brute force and the paper's rule."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.stats import binom, binomtest
from torch import Tensor

from captum_robust.metrics.functional import (
    best_certified_iou,
    box_iou,
    certified_iou,
    certified_localization_error,
    certify_counts,
    least_samples,
    probability_above,
)
from captum_robust.metrics.functional.certificates import order_for, probability_at


def counts(*values: int, n: int = 100) -> tuple[Tensor, Tensor]:
    shown = torch.tensor([values])
    return shown, n - shown


def test_hand_worked_p_value() -> None:
    # τ = 3/4, 3 of 3: (3/4)³ + (1/4)³ = 28/64.
    shown, hidden = counts(3, n=3)
    for confidence, proven in ((1 - 28 / 64 - 1e-9, True), (1 - 28 / 64 + 1e-9, False)):
        inside, outside = certify_counts(shown, hidden, 3, 0.75, confidence)
        assert inside.item() is proven
        assert not outside.any()


@pytest.mark.parametrize("tau", [0.6, 0.75, 0.9])
@pytest.mark.parametrize("n", [100, 400])
def test_agrees_with_the_papers_rule_on_equal_counts(tau: float, n: int) -> None:
    # Anani et al.: the mode is given, one-sided binomial test, Bonferroni over the pixels.
    shown = torch.arange(n + 1)[None]
    inside, outside = certify_counts(shown, n - shown, n, tau, 0.999, "bonferroni")
    for c in range(n + 1):
        k = max(c, n - c)
        p = binomtest(k, n, tau, alternative="greater").pvalue
        expected = p <= 0.001 / (n + 1)
        assert (inside | outside)[0, c].item() == expected
        assert inside[0, c].item() == (expected and c > n / 2)


def test_holm_is_that_of_statistics_books() -> None:
    generator = torch.Generator().manual_seed(0)
    shown = torch.randint(23, 31, (5, 40), generator=generator)
    inside, outside = certify_counts(shown, 30 - shown, 30, 0.6, 0.9)
    for row in range(5):
        most = [max(int(c), 30 - int(c)) for c in shown[row]]
        p = [float(binom.sf(k - 1, 30, 0.6) + binom.sf(k - 1, 30, 0.4)) for k in most]
        rejected: set[int] = set()
        for step, i in enumerate(sorted(range(40), key=p.__getitem__)):
            if p[i] > 0.1 / (40 - step):
                break
            rejected.add(i)
        assert set((inside | outside)[row].nonzero().flatten().tolist()) == rejected
    plain = certify_counts(shown, 30 - shown, 30, 0.6, 0.9, "bonferroni")
    assert (inside | ~plain[0]).all()
    assert inside.sum() > plain[0].sum()


@pytest.mark.parametrize("tau", [0.55, 0.75])
def test_an_error_is_as_rare_as_is_promised(tau: float) -> None:
    # At the p that is hardest: of all counts, those that would be proven are together rare enough.
    n, alpha = 40, 0.05
    shown = torch.arange(n + 1)[:, None]
    inside, outside = certify_counts(shown, n - shown, n, tau, 1 - alpha)
    for p in torch.linspace(1 - tau, tau, 41).tolist():
        chance = torch.from_numpy(binom.pmf(shown[:, 0].numpy(), n, p))
        assert chance[(inside | outside)[:, 0]].sum() <= alpha


def test_a_copy_that_cannot_tell_counts_for_neither() -> None:
    full = certify_counts(torch.tensor([[20]]), torch.tensor([[0]]), 20, 0.75, 0.99)[0]
    less = certify_counts(torch.tensor([[16]]), torch.tensor([[0]]), 20, 0.75, 0.99)[0]
    assert full.item()
    assert not less.item()


@pytest.mark.parametrize(("pixels", "tau"), [(1, 0.6), (49, 0.75), (224 * 224, 0.9)])
def test_least_samples_is_the_least(pixels: int, tau: float) -> None:
    n = least_samples(pixels, tau, 0.999)
    for copies, passes in ((n, True), (n - 1, False)):
        shown = torch.full((1, pixels), copies)
        assert certify_counts(shown, copies - shown, copies, tau)[0].any().item() is passes


def test_probability_above_is_clopper_pearson() -> None:
    found = probability_above(torch.tensor([0, 50, 99, 100]), 100, 0.975)
    expected = [binomtest(k, 100).proportion_ci(0.95).low for k in (0, 50, 99, 100)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("n", "tau", "alpha"), [(100, 0.84, 1e-3), (400, 0.66, 1e-4), (9, 0.5, 0.1)]
)
def test_order_for_is_the_least_that_refutes(n: int, tau: float, alpha: float) -> None:
    expected = next(k for k in range(n + 2) if binom.sf(k - 1, n, tau) <= alpha)
    assert order_for(n, tau, alpha) == (expected if expected <= n else None)
    assert order_for(10, 0.9, 1e-6) is None


def test_probability_at_is_the_normal_distribution() -> None:
    for distance, expected in ((0.0, 0.5), (1.0, 0.8413447461), (-1.959963985, 0.025)):
        assert math.isclose(probability_at(distance), expected, rel_tol=1e-8)


def test_certified_iou_is_the_least_of_all_boxes_between() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        edges = torch.randint(0, 9, (2, 4), generator=generator).sort(dim=1).values
        outer = torch.tensor([edges[0, 0], edges[1, 0], edges[0, 3], edges[1, 3]])
        inner = torch.tensor([edges[0, 1], edges[1, 1], edges[0, 2], edges[1, 2]])
        given = torch.randint(0, 9, (2, 2), generator=generator).sort(dim=1).values
        truth = torch.tensor([given[0, 0], given[1, 0], given[0, 1], given[1, 1]]).double()
        ranges = [
            range(int(min(i, o)), int(max(i, o)) + 1) for i, o in zip(inner, outer, strict=True)
        ]
        all_boxes = torch.tensor(list(itertools.product(*ranges)), dtype=torch.float64)
        expected = box_iou(all_boxes, truth).min()
        found = certified_iou(inner[None].double(), outer[None].double(), truth[None])
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-7)


def test_nothing_is_proven_without_boxes() -> None:
    nothing = torch.full((1, 4), torch.nan)
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert certified_iou(nothing, box, box).item() == 0
    assert certified_iou(box, nothing, box).item() == 0
    assert certified_iou(box, box, box).item() == 1


def test_the_error_takes_the_box_that_fits_best_and_leaves_out_images_without() -> None:
    inner = torch.tensor([[1.0, 1, 3, 3], [0, 0, 1, 1], [0, 0, 2, 2], [torch.nan] * 4])
    outer = torch.tensor([[0.0, 0, 4, 4], [0, 0, 8, 8], [0, 0, 2, 2], [torch.nan] * 4])
    truths = [
        torch.tensor([[6.0, 6, 7, 7], [0.5, 0.5, 3.5, 3.5]]),  # 9/16 at best
        torch.tensor([[0.0, 0, 4, 4]]),  # 1/16
        torch.empty(0, 4),
        torch.tensor([[0.0, 0, 4, 4]]),  # nothing is proven
    ]
    found = best_certified_iou(inner, outer, truths)
    expected = torch.tensor([min(4 / 9, 9 / 16), 1 / 16, torch.nan, 0])
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert certified_localization_error(inner, outer, truths) == 1
    assert certified_localization_error(inner, outer, truths, 0.4) == pytest.approx(2 / 3)
    assert best_certified_iou(inner[:0], outer[:0], []).shape == (0,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: certify_counts(*counts(5), 100, tau=0.5), "tau"),
        (lambda: certify_counts(*counts(5), 100, tau=1.0), "tau"),
        (lambda: certify_counts(*counts(5), 100, confidence=1.0), "confidence"),
        (lambda: certify_counts(*counts(5), 99), "n=99"),
        (lambda: probability_above(torch.tensor(101), 100), "count: expected numbers from 0 to n"),
        (lambda: probability_above(torch.tensor([5, -1]), 100), "count"),
        (lambda: certify_counts(*counts(5), 100, correction="none"), "correction"),
        (lambda: certify_counts(counts(5)[0], counts(5, 6)[0], 100), "hidden"),
        (lambda: certified_localization_error(torch.zeros(1, 4), torch.zeros(1, 4), []), "1"),
        (
            lambda: certified_iou(
                torch.tensor([[0.0, 0, 9, 9]]),
                torch.tensor([[0.0, 0, 8, 8]]),
                torch.tensor([[0.0, 0, 8, 8]]),
            ),
            "inner",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
