"""PGD by the names of the arguments of ``captum.robust.PGD``."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import captum.robust
import pytest
import torch
import torch.nn.functional as F
from captum.robust import MinParamPerturbation
from torch import Tensor, nn

from captum_robust.attacks import FGSM, PGD, GradientStep, LeastLikelyClass


def entropy(scores: Tensor, label: Tensor) -> Tensor:
    return F.cross_entropy(scores, label, reduction="none")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 20), nn.Tanh(), nn.Linear(20, 4)).double()


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(3, 3, 4, 4, generator=generator, dtype=torch.float64)


def same(net: nn.Module) -> PGD:
    """An attack that does what Captum's does."""
    plain = {"early_stop": False, "keep_best": False, "quantize": False}
    return PGD(net, loss_func=entropy, **plain)  # type: ignore[arg-type]


def theirs(net: nn.Module, mask: Tensor | None = None, **how: Any) -> Tensor:
    attack = captum.robust.PGD(net, entropy, lower_bound=0, upper_bound=1)
    attack.fgsm.zero_thresh = 0
    return attack.perturb(mask=mask, **how)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_result_is_captums(net: nn.Module, x: Tensor, targeted: bool, masked: bool) -> None:
    label = torch.tensor([1, 0, 3])
    mask = (x > 0.5).double() if masked else None
    how: dict[str, Any] = {"inputs": x, "radius": 0.1, "step_size": 0.03, "step_num": 5}
    how |= {"target": label, "targeted": targeted, "norm": "Linf", "random_start": False}
    found = same(net).perturb(**how, mask=mask)
    torch.testing.assert_close(found, theirs(net, mask, **how), atol=1e-12, rtol=0)
    assert not torch.equal(found, x)


def test_they_are_those_of_the_attack_for_one_call(net: nn.Module, x: Tensor) -> None:
    label = net(x).argmax(dim=1)
    attack = PGD(net, 0.3, 7, loss_func=entropy)
    found = attack.perturb(x, label, radius=0.1, step_size=0.05, step_num=3, norm="L2")
    own = PGD(net, 0.1, 3, 0.05, norm="L2", loss_func=entropy)
    torch.testing.assert_close(found, own.perturb(x, label))
    assert (attack.epsilon, attack.steps, attack.step_size, attack.norm) == (0.3, 7, None, "Linf")
    started = attack.perturb(x, label, random_start=True, step_num=0)
    torch.testing.assert_close(started, PGD(net, 0.3, 0, random_start=True).perturb(x, label))


def test_captums_search_sweeps_the_radius(net: nn.Module, x: Tensor) -> None:
    one = x[:1]
    label = int(net(one).argmax())
    found = []
    for name in ("radius", "epsilon"):
        search = MinParamPerturbation(net, PGD(net), name, 0.0, 1.0, 0.02)
        found.append(search.evaluate(one, target=label, attack_kwargs={"target": label})[1])
    assert found[0] == found[1]
    assert found[0] is not None


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"radius": 0.1, "epsilon": 0.1}, TypeError, "radius: epsilon is the same; give one"),
        ({"radius": -1.0}, ValueError, "epsilon: expected a number from 0"),
        ({"step_num": -1}, ValueError, "steps: expected a whole number from 0"),
        ({"step_size": 0.0}, ValueError, "step_size: expected a positive number"),
        ({"norm": "L7"}, ValueError, "norm: expected one of"),
        ({"target": 0.1}, TypeError, "target: expected classes, got 0.1; give Captum's arguments"),
    ],
)
def test_wrong_values_are_named(
    net: nn.Module, x: Tensor, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PGD(net).perturb(x, **given)


def test_an_attack_of_one_step_takes_only_what_it_has(net: nn.Module, x: Tensor) -> None:
    label = net(x).argmax(dim=1)
    for name, value in (("step_num", 3), ("step_size", 0.1), ("random_start", True)):
        with pytest.raises(TypeError, match=f"{name}: FGSM takes none"):
            FGSM(net).perturb(x, label, **{name: value})
    named = FGSM(net).perturb(inputs=x, epsilon=0.1, target=label, targeted=False)
    torch.testing.assert_close(named, FGSM(net, 0.1).perturb(x, label))
    iterated = LeastLikelyClass(net, 0.1, None)
    found, own = iterated.perturb(x, norm="L2"), LeastLikelyClass(net, 0.1, None, norm="L2")
    torch.testing.assert_close(found, own.perturb(x))


@pytest.mark.parametrize("kind", [PGD, FGSM, GradientStep, LeastLikelyClass])
def test_bounds_have_captums_names_too(kind: Any, net: nn.Module, x: Tensor) -> None:
    named, own = kind(net, lower_bound=-1.0, upper_bound=2.0), kind(net, bounds=(-1.0, 2.0))
    assert vars(named) == vars(own)  # which tell one run from another
    assert named.bounds == (-1.0, 2.0)
    again = replace(named, epsilon=0.1)
    torch.testing.assert_close(
        again.perturb(3 * x - 1), replace(own, epsilon=0.1).perturb(3 * x - 1)
    )
    free = kind(net, lower_bound=-math.inf, upper_bound=math.inf, quantize=False)
    assert vars(free) == vars(kind(net, bounds=None, quantize=False))


@pytest.mark.parametrize("ends", [(-0.5, 0.5), (-math.inf, math.inf)])
def test_the_result_within_captums_bounds_is_captums(
    ends: tuple[float, float], net: nn.Module, x: Tensor
) -> None:
    label = net(x - 0.5).argmax(dim=1)
    attack = captum.robust.FGSM(net, entropy, *ends)
    attack.zero_thresh = 0
    plain: dict[str, Any] = {"early_stop": False, "quantize": False, "loss_func": entropy}
    found = FGSM(net, lower_bound=ends[0], upper_bound=ends[1], **plain)
    expected = attack.perturb(x - 0.5, epsilon=0.2, target=label)
    torch.testing.assert_close(found.perturb(x - 0.5, label, 0.2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"lower_bound": 0.0}, ValueError, "lower_bound, upper_bound: expected two finite numbers"),
        (
            {"lower_bound": 1.0, "upper_bound": 0.0},
            ValueError,
            "lower_bound, upper_bound: expected",
        ),
        (
            {"lower_bound": 0.0, "upper_bound": 1.0, "bounds": (0.0, 2.0)},
            TypeError,
            "lower_bound, upper_bound: bounds is the same; give one",
        ),
    ],
)
def test_wrong_bounds_are_named(
    net: nn.Module, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{message}"):
        PGD(net, **given)
