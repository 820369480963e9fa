"""How often a GPU has to be waited for: no more often for more images, and seldom in a step.

There need be none: the tensors are those of `devices.py`, of a device that computes but whose
numbers can be asked for only one after another. Each such question is what a GPU stops for.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust.attacks import PGD
from tests.attacks import test_contract as attacks
from tests.attr import test_contract as attributions
from tests.devices import ELSEWHERE, another_device, counted_questions, moved
from tests.networks import Net, PixelNet

MOST = 25
"""Questions of a call, half of them about the layout of the layer, for each size of image."""


def same(n: int) -> Tensor:
    """One image n times: what depends on the numbers is the same for any n."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 3, 12, 16, generator=generator).expand(n, -1, -1, -1).contiguous()


def questions(
    net: nn.Module, method: Any, call: str, n: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> int:
    x = same(n)
    with torch.no_grad():
        classes = net(x).argmax(dim=1)
    for part in (net, getattr(method, "network", net)):
        moved(part)
    with another_device(monkeypatch), counted_questions() as asked:
        there = x.to(ELSEWHERE), classes.to(ELSEWHERE)
        asked.clear()
        getattr(method, call)(*there, **options)
    return len(asked)


UNCOUNTED = ("certified_robust_cam", "certified_saliency")
"""They draw on the device, which such a one can't."""
ALONE = ("rise", "score_cam")
"""Each image has passes of its own, of many copies, after which the scores are checked."""


@pytest.mark.parametrize(
    "case", [c for c in attributions.CASES if c.name not in UNCOUNTED], ids=lambda c: c.name
)
def test_an_attribution_asks_no_more_of_more_images(
    case: attributions.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(n: int) -> int:
        torch.manual_seed(0)
        net = Net().eval()
        return questions(net, case.make(net, net.conv2), "attribute", n, monkeypatch)

    few = asked(2)
    assert asked(6) == few + (4 if case.name in ALONE else 0)
    assert few <= (2 if "two_sizes" in case.name else 1) * MOST


SHORT = [c for c in attacks.CASES if c.name != "least_likely_iterated"]  # 70 steps of the same


@pytest.mark.parametrize("case", SHORT, ids=lambda c: c.name)
def test_an_attack_asks_no_more_of_more_images(
    case: attacks.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(n: int) -> int:
        torch.manual_seed(0)
        net = PixelNet().eval()
        given = {"epsilon": case.epsilon}
        return questions(net, case.make(net), "perturb", n, monkeypatch, **given)

    assert asked(6) == asked(2)


@pytest.mark.parametrize(("early_stop", "most"), [(False, 2), (True, 4)])
def test_a_step_of_an_attack_asks_seldom(
    early_stop: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(steps: int) -> int:
        torch.manual_seed(0)
        net = PixelNet().eval()
        attack = PGD(net, 1e-6, steps, early_stop=early_stop)  # none is fooled
        return questions(net, attack, "perturb", 3, monkeypatch)

    # Are the scores finite, and the gradients? Is any image fooled, and which go on?
    assert asked(8) - asked(4) == 4 * most


def tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


def test_no_call_keeps_tensors() -> None:
    torch.manual_seed(0)
    nets, x = (Net().eval(), PixelNet().eval()), same(2)
    classes = [net(x).argmax(dim=1) for net in nets]
    explainers = [case.make(nets[0], nets[0].conv2) for case in attributions.CASES]
    attackers = [(case.make(nets[1]), case.epsilon) for case in SHORT]

    def call_all() -> int:
        for explainer in explainers:
            explainer.attribute(x, classes[0])
        for attacker, epsilon in attackers:
            attacker.perturb(x, classes[1], epsilon=epsilon)
        return tensors()

    first = call_all()
    assert call_all() <= first
