"""The paper's own network and settings, with random weights: the shape of things."""

from __future__ import annotations

import pytest
import torch
from captum.attr import Attribution
from torch import Tensor, nn

from captum_robust import PerceptualBallPerturbation
from captum_robust.attr import Guided
from captum_robust.catalog.methods import METHODS
from captum_robust.models import Classifier, load_classifier


@pytest.fixture(scope="module")
def vgg() -> Classifier:
    torch.manual_seed(0)
    model = load_classifier("vgg19_bn", weights=None)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():  # random scores lie close together: spread them to about ±10
        last = model.module.classifier[-1]
        scores = model(torch.rand(4, 3, 64, 64))
        last.weight *= 5 / scores.std()
    return model


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def relus(model: Classifier) -> list[nn.Module]:
    return [m for m in model.module.features if isinstance(m, nn.ReLU)]


def test_the_presets_are_the_papers(vgg: Classifier) -> None:
    unguided = PerceptualBallPerturbation.paper_unguided(vgg)
    assert [id(layer) for layer in unguided.layers] == [id(r) for r in relus(vgg)[4:10]]
    guided = PerceptualBallPerturbation.paper_guided(vgg)
    assert isinstance(guided, Guided)
    assert isinstance(guided.attribution, PerceptualBallPerturbation)
    assert [id(layer) for layer in guided.attribution.layers] == [id(r) for r in relus(vgg)[1:13]]
    for ball in (unguided, guided.attribution):
        s = ball.settings
        assert (s.perceptual_weight, s.pixel_weight, s.margin_target) == (1e4, 1.0, -2.0)
        assert (s.max_iterations, s.history_size, s.step) == (100, 100, 1.0)
        assert s.line_search == "fixed"


def test_the_presets_take_torchvisions_own_network(vgg: Classifier) -> None:
    bare = PerceptualBallPerturbation.paper_unguided(vgg.module)
    assert [id(layer) for layer in bare.layers] == [id(r) for r in relus(vgg)[4:10]]


@pytest.mark.parametrize("preset", ["paper_unguided", "paper_guided"])
def test_the_presets_run(vgg: Classifier, x: Tensor, preset: str) -> None:
    attribution: Attribution = getattr(PerceptualBallPerturbation, preset)(vgg)
    result, details = attribution.attribute(x, max_iterations=4, return_details=True)
    assert result.shape == x.shape
    assert torch.isfinite(result).all()
    assert result.flatten(1).any(dim=1).all()
    assert details.iterations.tolist() == [4, 4]
    assert details.feature_distance.gt(0).all()


@pytest.mark.parametrize(
    "name", ["perceptual_ball", "perceptual_ball_guided", "perceptual_ball_cam"]
)
def test_the_methods_run_on_its_default_layers(
    vgg: Classifier, x: Tensor, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from captum_robust.attr import BallSettings
    from captum_robust.catalog import methods

    monkeypatch.setattr(methods, "BALL_SETTINGS", BallSettings(max_iterations=2))
    maps = METHODS[name](vgg).explain(x, torch.tensor([3, 7])).maps
    assert maps.shape == (2, 64, 64)
    assert torch.isfinite(maps).all()
    assert maps.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("model", ["resnet18", "vgg16_bn", "vgg19"])
def test_another_network_is_refused(model: str) -> None:
    with torch.device("meta"):
        network = load_classifier(model, weights=None)
    with pytest.raises(ValueError, match="VGG19"):
        PerceptualBallPerturbation.paper_unguided(network)
