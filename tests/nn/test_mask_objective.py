"""The objectives of a mask against values worked by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_robust.nn import CodeObjective, PaperObjective
from captum_robust.nn.mask_objective import objective_named, squared_variation


def scores_of(*probabilities: float) -> Tensor:
    """Scores N×2 whose softmax gives class 0 these probabilities."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    return torch.stack([p.log(), (1 - p).log()], dim=1).float()


ZERO = torch.tensor([0])


def box() -> Tensor:
    """A quarter of an image of 224 pixels: 112×112, in the middle."""
    mask = torch.zeros(1, 1, 224, 224)
    mask[..., 56:168, 56:168] = 1
    return mask


# The paper's form


def test_the_box_costs_less_than_the_whole_image_with_the_weights_by_default() -> None:
    """Four edges of 112 differences of 1; a quarter of the area; assumed probabilities."""
    terms = PaperObjective()(box(), scores_of(0.8), scores_of(0.05), ZERO)
    assert set(terms) == {"total_variation", "area", "kept", "destroyed", "total"}
    assert float(terms["total_variation"]) == pytest.approx(0.448)
    assert float(terms["area"]) == pytest.approx(2.5)
    assert float(terms["kept"]) == pytest.approx(0.2231, abs=1e-4)  # -log .8
    assert float(terms["destroyed"]) == pytest.approx(2.0356, abs=1e-3)  # 5 · .05^.3
    assert float(terms["total"]) == pytest.approx(5.21, abs=0.005)
    whole = PaperObjective()(torch.ones(1, 1, 224, 224), scores_of(0.9), scores_of(0.02), ZERO)
    assert whole["total_variation"] == 0
    # 10 - log .9 + 5 · .02^.3 = 10 + .105 + 1.546
    assert float(whole["total"]) == pytest.approx(11.65, abs=0.005)


def test_in_the_order_that_the_paper_prints_them_the_whole_image_wins() -> None:
    printed = PaperObjective(total_variation=10, area=1e-3)
    of_box = printed(box(), scores_of(0.8), scores_of(0.05), ZERO)["total"]
    of_all = printed(torch.ones(1, 1, 224, 224), scores_of(0.9), scores_of(0.02), ZERO)["total"]
    assert float(of_box) == pytest.approx(4482.26, abs=0.01)
    assert float(of_all) == pytest.approx(1.65, abs=0.005)


def test_a_sample_does_not_see_another() -> None:
    masks = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    kept, destroyed = scores_of(0.9, 0.2, 0.5), scores_of(0.3, 0.1, 0.7)
    classes = torch.tensor([0, 1, 0])
    for objective in (PaperObjective(), CodeObjective()):
        together = objective(masks, kept, destroyed, classes)
        for i in range(3):
            rows = slice(i, i + 1)
            alone = objective(masks[rows], kept[rows], destroyed[rows], classes[rows])
            for name, term in alone.items():
                torch.testing.assert_close(together[name][rows], term)


def test_gradients_are_finite_where_the_probability_is_zero() -> None:
    """The slope of f^.3 is infinite at 0, and so is -log 0."""
    kept = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    destroyed = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    mask = torch.zeros(1, 1, 4, 4, requires_grad=True)
    for objective in (PaperObjective(), CodeObjective()):
        terms = objective(mask, kept, destroyed, ZERO)
        for tensor in (mask, kept, destroyed):
            (gradient,) = torch.autograd.grad(terms["total"].sum(), tensor, retain_graph=True)
            assert torch.isfinite(gradient).all()
    at_zero = PaperObjective()(mask, kept, destroyed, ZERO)
    assert at_zero["kept"].item() == pytest.approx(400)
    assert at_zero["destroyed"].item() == pytest.approx(5 * 1e-6**0.3)


def test_total_variation_sums_squares_of_both_directions() -> None:
    masks = torch.tensor([[[[0.0, 0.5, 0.5], [1.0, 0.0, 0.5]]], [[[1.0, 1, 1], [1, 1, 1]]]])
    # Across: .25 + 0 + 1 + .25; down: 1 + .25 + 0.
    assert squared_variation(masks).tolist() == [2.75, 0]


# The form of the authors' code


@pytest.mark.parametrize(
    ("scores", "hinge"),
    [([3.0, 1, 0], 0), ([3.0, 2, 0], 0), ([3.0, 2.5, 0], 0.5), ([0.0, 2, 5], 6), ([1.0, 1, 1], 1)],
)
def test_the_preserver_wants_the_class_one_above_all_others(
    scores: list[float], hinge: float
) -> None:
    terms = CodeObjective()(
        torch.zeros(1, 1, 4, 4), torch.tensor([scores]), torch.zeros(1, 3), ZERO
    )
    assert float(terms["kept"]) == pytest.approx(0.3 * hinge)


@pytest.mark.parametrize(
    ("scores", "hinge"),
    [([0.0, 5, 1], 0), ([0.0, 1, 7], 0), ([0.0, 4, 1], 1), ([2.0, 1, 0], 6), ([1.0, 1, 1], 5)],
)
def test_the_destroyer_wants_the_class_five_below_another(
    scores: list[float], hinge: float
) -> None:
    terms = CodeObjective()(
        torch.zeros(1, 1, 4, 4), torch.zeros(1, 3), torch.tensor([scores]), ZERO
    )
    assert float(terms["destroyed"]) == pytest.approx(hinge)


def test_area_and_smoothness_of_a_mask_by_hand() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:3, 1:3] = 1  # inside: the border is 0
    terms = CodeObjective().of_mask(mask)
    # Eight differences of 1, halved.
    assert float(terms["smoothness"]) == pytest.approx(0.005 * 8 / 2)
    low, high = 0.0005**0.3, 1.0005**0.3
    assert float(terms["area"]) == pytest.approx(8 * (12 * low + 4 * high) / 16)


def test_the_border_counts_the_corners_twice_as_in_the_authors_code() -> None:
    mask = torch.zeros(1, 1, 3, 5)
    mask[..., 0, 0] = 1
    terms = CodeObjective(smoothness=1).of_mask(mask)
    # Two differences, and the corner is in a row and in a column of the border.
    assert float(terms["smoothness"]) == pytest.approx((2 + 0.3 * 2) / 2)
    whole = CodeObjective(smoothness=1).of_mask(torch.ones(1, 1, 3, 5))
    assert float(whole["smoothness"]) == pytest.approx(0.3 * (5 + 5 + 3 + 3) / 2)


def test_the_total_is_the_sum_of_the_weighted_terms() -> None:
    mask = torch.rand(2, 1, 6, 7, generator=torch.Generator().manual_seed(0))
    classes = torch.tensor([0, 1])
    for objective in (PaperObjective(), CodeObjective()):
        terms = objective(mask, scores_of(0.7, 0.2), scores_of(0.4, 0.9), classes)
        total = terms.pop("total")
        torch.testing.assert_close(sum(terms.values()), total)
        assert total.shape == (2,)


# What is of both


@pytest.mark.parametrize("objective", [PaperObjective(), CodeObjective()], ids=["paper", "code"])
def test_of_a_fake_class_the_mask_alone_counts(objective: PaperObjective | CodeObjective) -> None:
    """The best mask is then empty."""
    masks = torch.stack([torch.full((1, 6, 6), v) for v in (0.0, 0.5, 1.0)])
    terms = objective.of_mask(masks)
    assert "kept" not in terms
    assert "destroyed" not in terms
    whole = objective(masks, scores_of(0.5, 0.5, 0.5), scores_of(0.5, 0.5, 0.5), ZERO.expand(3))
    for name, term in terms.items():
        assert torch.equal(term, whole[name])
    empty, half, full = torch.stack(list(terms.values())).sum(dim=0).tolist()
    assert empty < half < full


def test_scores_of_half_precision_are_compared_in_single() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    scores = torch.tensor([[3.0, 1.0, 0.5]])
    for objective in (PaperObjective(), CodeObjective()):
        exact = objective(mask, scores, -scores, ZERO)
        half = objective(mask, scores.bfloat16(), -scores.bfloat16(), ZERO)
        assert half["total"].dtype == torch.float32
        torch.testing.assert_close(half["total"], exact["total"])


@pytest.mark.parametrize("kind", [PaperObjective, CodeObjective])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "much", None])
def test_a_weight_that_is_no_number_from_zero_is_named(kind: type[Any], bad: Any) -> None:
    with pytest.raises(ValueError, match=r"area: expected a number from 0, got"):
        kind(area=bad)


def test_an_objective_is_found_by_its_name() -> None:
    assert objective_named("paper") == PaperObjective()
    assert objective_named("code", area=11, smoothness=0.5) == CodeObjective(11, smoothness=0.5)
    with pytest.raises(ValueError, match=r"objective: .*got 'papper'; did you mean 'paper'"):
        objective_named("papper")
    with pytest.raises(ValueError, match=r"weight of the objective 'paper': .*got 'are'"):
        objective_named("paper", are=3)
    with pytest.raises(ValueError, match=r"area.*-1"):
        objective_named("code", area=-1)


@pytest.mark.parametrize("objective", [PaperObjective(), CodeObjective()])
def test_scores_of_one_class_are_refused(objective: PaperObjective | CodeObjective) -> None:
    one = torch.zeros(2, 1)  # their margin would be infinite, their probability 1
    with pytest.raises(ValueError, match=r"at least two classes, got \(2, 1\)"):
        objective(torch.zeros(2, 1, 4, 4), one, one, torch.tensor([0, 0]))
