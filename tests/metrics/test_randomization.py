"""The sanity check: layers lose their weights from the last one on, and get them back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from captum.attr import Saliency
from scipy.stats import spearmanr
from torch import Tensor, nn

from captum_robust.attr import RobustCAM
from captum_robust.metrics import functional as F
from tests.networks import drawn


class Scaled(nn.Module):
    """A layer that does not say how it is initialised, with weights that are all equal."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1, 4, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Scaled()]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 22 * 17, 3))
    net(torch.rand(8, 3, 22, 17))  # statistics that are none of the initial ones
    return net.train()


IMAGES, CLASSES = drawn(2), torch.tensor([0, 2])


def gradients(net: nn.Module) -> Any:
    def explain(x: Tensor, target: Tensor) -> Tensor:
        return Saliency(net).attribute(x, target).sum(dim=1)

    return explain


def state_of(net: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(net.state_dict())


def is_as_before(net: nn.Module, before: dict[str, Tensor]) -> bool:
    now = net.state_dict()
    return now.keys() == before.keys() and all(now[k].equal(v) for k, v in before.items())


@pytest.mark.filterwarnings("ignore")
def test_stages_are_those_of_a_model_that_is_reset_by_hand(net: nn.Module) -> None:
    before = state_of(net)
    found = F.model_randomization(net, gradients(net), IMAGES, CLASSES, layers=["5", "0"], seed=7)
    assert found.layers == ("5", "0")
    other = copy.deepcopy(net).eval()
    original = gradients(other)(IMAGES, CLASSES)
    for stage, layer in enumerate((other[5], other[0])):
        torch.manual_seed(7 + stage)
        layer.reset_parameters()
        maps = gradients(other)(IMAGES, CLASSES)
        for i in range(2):
            rank = spearmanr(original[i].flatten(), maps[i].flatten()).statistic
            assert found.spearman[stage, i].item() == pytest.approx(rank, abs=1e-6)
        torch.testing.assert_close(found.ssim[stage], F.structural_similarity(original, maps))
    assert is_as_before(net, before)
    assert net.training


@pytest.mark.filterwarnings("ignore")
def test_maps_of_some_stages_are_those_after_so_many_layers(net: nn.Module) -> None:
    explain, calls = gradients(net), []

    def counted(x: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        return explain(x, target)

    net.eval()
    every = F.model_randomization(net, explain, IMAGES, CLASSES)
    original = explain(IMAGES, CLASSES)
    some = F.model_randomization(net, counted, IMAGES, CLASSES, stages=2, maps=original)
    assert some.layers == ("3", "0")  # of 5, 3, 1, 0
    assert some.spearman.equal(every.spearman[[1, 3]])
    assert some.ssim.equal(every.ssim[[1, 3]])
    assert len(calls) == 2
    whole = F.model_randomization(net, explain, IMAGES, CLASSES, stages=1)
    assert whole.spearman.equal(every.spearman[[3]])


@pytest.mark.filterwarnings("ignore")
def test_every_layer_with_weights_is_changed_last_first_and_put_back(net: nn.Module) -> None:
    before, parameters = state_of(net), list(net.parameters())
    seen: list[set[str]] = []

    def explain(x: Tensor, target: Tensor) -> Tensor:
        now = net.state_dict()
        seen.append({k.split(".")[0] for k, v in before.items() if not now[k].equal(v)})
        return gradients(net)(x, target)

    random = torch.get_rng_state()
    found = F.model_randomization(net, explain, IMAGES, CLASSES)
    assert found.layers == ("5", "3", "1", "0")
    assert seen == [set(), {"5"}, {"5", "3"}, {"5", "3", "1"}, {"5", "3", "1", "0"}]
    assert found.spearman.shape == found.ssim.shape == (4, 2)
    assert (found.spearman[-1].abs() < 0.9).all()
    assert is_as_before(net, before)
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    assert all(p.grad is None for p in parameters)
    assert torch.get_rng_state().equal(random)
    again = F.model_randomization(net, explain, IMAGES, CLASSES)
    assert again.spearman.equal(found.spearman)


def test_a_map_that_does_not_look_at_the_model_stays_the_same(net: nn.Module) -> None:
    edges = lambda x, _: x.mean(dim=1)  # noqa: E731
    found = F.model_randomization(net, edges, IMAGES, CLASSES)
    torch.testing.assert_close(found.spearman, torch.ones(4, 2, dtype=torch.float64))
    torch.testing.assert_close(found.ssim, torch.ones(4, 2, dtype=torch.float64))


def test_the_model_is_put_back_after_an_error(net: nn.Module) -> None:
    class Replaced(nn.Linear):
        def reset_parameters(self) -> None:
            self.weight = nn.Parameter(torch.zeros(3, 4 * 22 * 17))  # not in place

    net[5] = Replaced(4 * 22 * 17, 3)
    weight = net[5].weight
    before, calls = state_of(net), []

    def explain(x: Tensor, _: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return x.mean(dim=1)

    with pytest.raises(RuntimeError, match="out of luck"):
        F.model_randomization(net, explain, IMAGES, CLASSES)
    assert is_as_before(net, before)
    assert net[5].weight is weight
    assert net.training


def test_our_attributions_go_in_as_they_are(net: nn.Module) -> None:
    def explain(x: Tensor, target: Tensor) -> Tensor:
        return RobustCAM(net, net[3]).attribute(x, target, upsample=True)  # N×1×H×W

    found = F.model_randomization(net, explain, IMAGES, CLASSES, layers=["5"])
    assert found.spearman.shape == (1, 2)


def test_wrong_arguments_are_named(net: nn.Module) -> None:
    explain = gradients(net)
    for changes, error, message in (
        ({"model": nn.ReLU()}, ValueError, "model: expected layers with parameters, got none"),
        ({"model": explain}, TypeError, "model: expected a torch.nn.Module"),
        ({"explain": None}, TypeError, "explain: expected a function"),
        ({"layers": ["2"]}, ValueError, "layers: expected one of 0, 1, 3, 5, got '2'"),
        ({"layers": []}, ValueError, "layers: expected at least one"),
        ({"explain": lambda x, _: x}, ValueError, "maps of explain: expected N×H×W"),
        ({"explain": lambda x, _: x[:1, 0]}, ValueError, "maps of explain: expected 2×H×W"),
        ({"explain": lambda x, _: x[:, 0, :9]}, ValueError, "at least 11×11 pixels"),
        ({"stages": 5}, ValueError, "stages: expected a whole number from 1 to 4"),
        ({"maps": IMAGES[:1, 0]}, ValueError, "maps: expected 2×H×W"),
        ({"classes": torch.tensor([0])}, ValueError, "classes: expected 2 indices"),
    ):
        given: dict[str, Any] = {"model": net, "explain": explain, "classes": CLASSES, **changes}
        with pytest.raises(error, match=message):
            F.model_randomization(images=IMAGES, **given)
