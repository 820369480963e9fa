"""Targets that are functions of the scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import Attribution, InputXGradient
from torch import Tensor, nn

from captum_robust import (
    RISE,
    ClassActivationMap,
    Defended,
    Guided,
    IterativeMask,
    MultiScale,
    PerceptualBallPerturbation,
    RobustCAM,
    ScoreCAM,
    TopClasses,
)
from captum_robust.attr.class_activation_map import KINDS
from captum_robust.defenses import default_transforms
from captum_robust.nn import CodeObjective, PaperObjective
from tests.networks import Net

TAKE: dict[str, Callable[[Net], Attribution]] = {
    "rise": lambda n: RISE(n, n_masks=20),
    "robust_cam": lambda n: RobustCAM(n, n.conv2),
    "score_cam": lambda n: ScoreCAM(n, n.conv2),
    "top_classes": lambda n: TopClasses(RISE(n, n_masks=20), weights=[1.0]),
    "guided": lambda n: Guided(RISE(n, n_masks=20), ClassActivationMap(n, n.conv2)),
    "multi_scale": lambda n: MultiScale(RISE(n, n_masks=20), (1, 2)),
    "defended": lambda n: Defended(ScoreCAM(n, n.conv2), default_transforms()),
    "defended_in_turn": lambda n: Defended(
        ClassActivationMap(n, n.conv2), default_transforms(), transforms_per_eval=1
    ),
    "defended_robust_cam_in_turn": lambda n: Defended(
        RobustCAM(n, n.conv2, base="gradcam"), default_transforms(), transforms_per_eval=1
    ),
    **{k: lambda n, k=k: ClassActivationMap(n, n.conv2, k) for k in KINDS},
    "fused": lambda n: ClassActivationMap(n, [n.conv1, n.conv2]),
}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TAKE)
def test_a_function_that_picks_a_class_explains_that(net: Net, x: Tensor, name: str) -> None:
    attribution = TAKE[name](net)
    options = {"k": 1} if "robust_cam" in name else {}
    expected = attribution.attribute(x, 3, **options)
    torch.testing.assert_close(attribution.attribute(x, lambda s: s[:, 3]), expected)
    torch.testing.assert_close(attribution.attribute(x, lambda s: s[:, 3:4]), expected)
    # Any other function explains the model that ends in it.
    other = nn.Sequential(net)

    def margin(scores: Tensor) -> Tensor:
        return scores[:, 3] - 2 * scores[:, 1]

    attribution = TAKE[name](net)
    found = attribution.attribute(x, margin)
    assert not torch.equal(found, expected) or name == "eigen_cam"
    if name == "rise":
        ended = RISE(lambda images: margin(other(images)), n_masks=20)
        torch.testing.assert_close(found, ended.attribute(x))


def test_scores_of_any_shape_are_given_to_it(net: Net, x: Tensor) -> None:
    def segment(images: Tensor) -> Tensor:
        return net.conv2(net.relu(net.conv1(images)))

    region = torch.zeros(16, 16)
    region[:4, :4] = 1
    cam = ClassActivationMap(segment, net.conv1, "hires_cam", reshape_transform=None)
    found = cam.attribute(x, lambda s: (s[:, 2] * region).sum(dim=(1, 2)), normalize=None)
    assert found[..., :5, :5].any()
    assert not found[..., 5:, :].any()  # nothing beyond the region and its border counts


@pytest.mark.parametrize("name", ["rise", "robust_cam", "score_cam", "layer_cam"])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda s: s, r"expected a function that gives 3 numbers .* got \(3, 6\)"),
        (lambda s: s.sum(), r"expected a function that gives .* got \(\)"),
        (lambda s: 1.0, r"expected a function that gives .* got float"),
        (lambda s: s[:, 0] * float("nan"), r"NaN or infinity in sample 0"),
    ],
)
def test_what_gives_something_else_is_refused(
    net: Net, x: Tensor, name: str, function: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"^target.*{message}"):
        TAKE[name](net).attribute(x, function)


MARGINS: dict[str, Callable[[Net], Attribution]] = {
    "perceptual_ball": lambda n: PerceptualBallPerturbation(n, n.conv2),
    "iterative_mask": lambda n: IterativeMask(n, steps=3),
    "iterative_mask_of_probabilities": lambda n: IterativeMask(
        n, steps=3, objective=PaperObjective()
    ),
}


@pytest.mark.parametrize("name", MARGINS)
def test_where_classes_are_weighed_the_number_stands_for_the_margin(
    net: Net, x: Tensor, name: str
) -> None:
    def margin(scores: Tensor) -> Tensor:
        if name.endswith("probabilities"):  # the logit of the probability of the class
            return scores.log_softmax(dim=1)[:, 3].exp().logit()
        others = scores[:, [0, 1, 2, 4, 5]]
        return scores[:, 3] - others.amax(dim=1)

    expected, of_class = MARGINS[name](net).attribute(x, 3, return_details=True)
    found, details = MARGINS[name](net).attribute(x, margin, return_details=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if name == "perceptual_ball":
        torch.testing.assert_close(details.margin, of_class.margin, rtol=1e-3, atol=1e-4)
        assert details.flipped.equal(details.margin < 0)
        assert details.new_class.equal((details.margin > 0).long())
    halves = MARGINS[name](net).attribute(x, margin, internal_batch_size=2)
    torch.testing.assert_close(halves, found, rtol=1e-3, atol=1e-4)


def test_the_smallest_change_of_a_linear_score_worked_by_hand(x: Tensor) -> None:
    # J = (f + wd - T)^2 + |d|^2 / D is least at d = -(f - T) k w / ((1 + k) w w), k = D w w.
    x = x[:, :, :2, :2]
    w = torch.linspace(-1, 1, 12)

    def embedding(images: Tensor) -> Tensor:  # of no classes: N×3×4
        return (images.flatten(1) * w).reshape(-1, 3, 4)

    ball = PerceptualBallPerturbation(embedding, ())
    found, details = ball.attribute(
        x, lambda e: e.sum(dim=(1, 2)), margin_target=-0.5, return_details=True
    )
    f, ww = x.flatten(1) @ w, w @ w
    k = 12 * ww
    expected = -((f + 0.5) * k / ((1 + k) * ww))[:, None] * w
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(details.margin, f + expected @ w, atol=1e-4, rtol=1e-3)


def test_the_objective_of_a_mask_of_a_number_worked_by_hand(net: Net, x: Tensor) -> None:
    seen: list[Tensor] = []

    def model(images: Tensor) -> Tensor:
        seen.append(images.detach().clone())
        return net(images)

    def number(scores: Tensor) -> Tensor:
        return scores[:, 1] + scores[:, 2]

    weights = CodeObjective(area=2, area_power=1, smoothness=0, preserver=3, destroyer=4)
    mask = IterativeMask(model, objective=weights, steps=1)
    details = mask.attribute(x, number, return_details=True)[1]
    with torch.no_grad():
        kept, destroyed = number(net(seen[0])).chunk(2)
    area = 0.5 / (1 + 1e-3) + 5e-4
    expected = 2 * area + 3 * (1 - kept).clamp(min=0) + 4 * (5 + destroyed).clamp(min=0)
    torch.testing.assert_close(details.objective[:, 0], expected)


@pytest.mark.parametrize("name", MARGINS)
def test_a_number_of_no_slope_or_no_number_is_refused_there(net: Net, x: Tensor, name: str) -> None:
    attribution = MARGINS[name](net)
    with pytest.raises(ValueError, match=r"^target: expected a function that gives [36] numbers"):
        attribution.attribute(x, lambda s: s)
    with pytest.raises(ValueError, match="its scores do not depend on the inputs"):
        attribution.attribute(x, lambda s: s.detach()[:, 1])
    with pytest.raises(ValueError, match="NaN or infinity in sample 0"):
        attribution.attribute(x, lambda s: s[:, 0] * float("nan"))


def test_it_is_refused_where_there_are_only_classes(net: Net, x: Tensor) -> None:
    with pytest.raises(ValueError, match="base: 'cam' needs"):
        RobustCAM(net, net.conv2, base="cam").attribute(x, lambda s: s[:, 1])
    with pytest.raises(AssertionError):  # what Captum's own raise
        TopClasses(InputXGradient(net)).attribute(x, lambda s: s[:, 1])
