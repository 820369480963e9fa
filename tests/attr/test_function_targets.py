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


def test_it_is_refused_where_classes_are_weighed(net: Net, x: Tensor) -> None:
    for attribution in (PerceptualBallPerturbation(net, net.conv2), IterativeMask(net, steps=1)):
        with pytest.raises(ValueError, match=r"^target: expected a class, .* got a function"):
            attribution.attribute(x, lambda s: s[:, 1])
    with pytest.raises(ValueError, match="base: 'cam' needs"):
        RobustCAM(net, net.conv2, base="cam").attribute(x, lambda s: s[:, 1])
    with pytest.raises(AssertionError):  # what Captum's own raise
        TopClasses(InputXGradient(net)).attribute(x, lambda s: s[:, 1])
