"""A model in training mode is explained and attacked with a note, once."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust import RISE, PerceptualBallPerturbation, RobustCAM
from captum_robust.attacks import FGSM

MESSAGE = r"training mode, in which BatchNorm2d and Dropout .* call model.eval\(\) first"


def network(*others: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3), *others, nn.ReLU(), *head)


def with_both() -> nn.Sequential:
    return network(nn.BatchNorm2d(4), nn.Dropout(0.1))


EXPLAIN: dict[str, Callable[[nn.Sequential, Tensor], Any]] = {
    "RobustCAM": lambda m, x: RobustCAM(m, m[0]).attribute(x),
    "of a method": lambda m, x: RobustCAM(m.forward, m[0]).attribute(x),
    "RISE": lambda m, x: RISE(m, n_masks=4).attribute(x),
    "ball": lambda m, x: PerceptualBallPerturbation(m, m[0]).attribute(x, max_iterations=1),
    "FGSM": lambda m, x: FGSM(m, 0.1).perturb(x),
}


@pytest.mark.parametrize("explain", EXPLAIN.values(), ids=EXPLAIN)
def test_it_is_said_once_for_each_model(explain: Callable[..., Any]) -> None:
    x = torch.rand(2, 3, 8, 8)
    for _ in range(2):
        model = with_both()
        with pytest.warns(UserWarning, match=MESSAGE):
            explain(model, x)
        assert model.training
        with warnings.catch_warnings(record=True) as again:
            warnings.simplefilter("always")
            explain(model, x)
        assert not [one for one in again if "training mode" in str(one.message)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_both().eval(),
        network,  # no layer does anything else in training mode
        lambda: with_both().eval().append(nn.Dropout(0.5)),  # a layer alone is meant so
    ],
)
def test_nothing_is_said_of_other_models(make: Callable[[], nn.Sequential]) -> None:
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RobustCAM(model, model[0]).attribute(torch.rand(2, 3, 8, 8))
