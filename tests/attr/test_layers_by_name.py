"""Each class that takes a layer takes its dotted name too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust import ClassActivationMap, PerceptualBallPerturbation, RobustCAM, ScoreCAM
from captum_robust.models import Classifier, load_classifier

MAKE: dict[str, Callable[..., Any]] = {
    "RobustCAM": RobustCAM,
    "ClassActivationMap": ClassActivationMap,
    "ClassActivationMap of several": lambda m, layer: ClassActivationMap(m, [layer]),
    "ScoreCAM": ScoreCAM,
    "PerceptualBallPerturbation": PerceptualBallPerturbation,
    "PerceptualBallPerturbation of several": lambda m, one: PerceptualBallPerturbation(m, [one]),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer3 = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer4(self.layer3(x)).mean(dim=(2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def layer_of(attribution: Any) -> nn.Module:
    return attribution.layer if hasattr(attribution, "layer") else attribution.layers[0]


@pytest.mark.parametrize("kind", MAKE)
def test_a_name_is_its_module(kind: str, net: Net) -> None:
    wrapped = Classifier(net, input_size=8)
    inside = net.layer4[1]
    for model, name, layer in (
        (net, "layer4", net.layer4),
        (net, "layer4.1", inside),
        (net.forward, "layer4", net.layer4),
        (wrapped, "layer4", net.layer4),
        (wrapped, "module.layer4", net.layer4),
        (nn.DataParallel(net), "layer4", net.layer4),
    ):
        assert layer_of(MAKE[kind](model, name)) is layer


@pytest.mark.parametrize("kind", MAKE)
def test_another_name_is_refused_with_the_nearest(kind: str, net: Net) -> None:
    with pytest.raises(ValueError, match=r"^layers?: .*got 'layer5'; did you mean 'layer[34]'"):
        MAKE[kind](net, "layer5")
    with pytest.raises(ValueError, match=r"^layers?: .*got ''"):
        MAKE[kind](net, "")
    with pytest.raises(TypeError, match=r"^layers? 'layer4': forward_func: expected a model"):
        MAKE[kind](lambda x: net(x), "layer4")


def test_the_map_is_that_of_the_module() -> None:
    model, x = load_classifier("resnet18", None), torch.rand(1, 3, 64, 64)
    named = RobustCAM(model, "layer4").attribute(x)
    torch.testing.assert_close(named, RobustCAM(model, model.module.layer4).attribute(x))
