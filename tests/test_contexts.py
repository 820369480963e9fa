"""Each temporary change to a model undoes itself, also when an error passes through."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from captum_robust._contexts import (
    evaluation,
    frozen,
    hooked,
    outputs_of,
    probing,
    resting,
    seeded,
    seeded_elsewhere,
    without_new_gradients,
)


@pytest.fixture
def net() -> nn.Module:
    """Modes and needs of gradients are mixed: putting all of them to one value would show."""
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Dropout(), nn.Sequential(nn.Conv2d(3, 1, 1)))
    network.train()
    network[2].eval()
    next(network[0].parameters()).requires_grad_(False)
    return network


def state(network: nn.Module) -> list[Any]:
    modes = [m.training for m in network.modules()]
    asking = [p.requires_grad for p in network.parameters()]
    return [modes, asking, [len(m._forward_hooks) for m in network.modules()]]


CONTEXTS: list[Callable[[nn.Module], AbstractContextManager[Any]]] = [
    evaluation,
    frozen,
    lambda n: resting(n.parameters()),
    lambda n: hooked(n.modules(), lambda *_: None),
    lambda n: outputs_of(list(n.children())),
    lambda n: probing(n, lambda *_: None),
]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_model_is_as_it_was(
    net: nn.Module, context: Callable[[nn.Module], AbstractContextManager[Any]], fails: bool
) -> None:
    before = state(net)
    try:
        with context(net):
            assert state(net) != before
            net[2].train()  # what is changed inside is put back too
            net[2].eval()
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert state(net) == before


def test_frozen_is_evaluation_without_gradients(net: nn.Module) -> None:
    with frozen(net):
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())


def test_functions_have_no_mode() -> None:
    with evaluation(torch.relu):
        pass


def test_outputs_are_those_of_the_last_run_also_of_one_layer_named_twice(net: nn.Module) -> None:
    x = torch.rand(1, 2, 5, 5)
    with torch.no_grad(), outputs_of([net[0], net[2], net[0]]) as outputs:
        y = net(x)
        assert torch.equal(outputs[0], net[0](x))
    assert torch.equal(outputs[1], y)
    assert outputs[0] is outputs[2]


def test_a_probe_has_the_dtype_of_the_network_and_runs_through_its_hooks(net: nn.Module) -> None:
    names: list[str] = []
    with probing(net.double(), lambda m, *_: names.append(type(m).__name__)) as image_of:
        net(image_of(2, 5, 4))
        assert image_of(2, 5, 4).dtype == torch.float64
    assert names == ["Conv2d", "Dropout", "Conv2d", "Sequential"]


def test_new_gradients_go_and_old_ones_stay(net: nn.Module) -> None:
    first, second = net[2][0].weight, net[2][0].bias
    first.grad = torch.ones_like(first)
    with without_new_gradients(net):
        second.grad = torch.ones_like(second)
    assert first.grad is not None
    assert second.grad is None


def test_seeds_are_put_back() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())  # noqa: NPY002

    with seeded(1, None), seeded_elsewhere(1):
        one = draw()
    torch_state = torch.get_rng_state()
    with seeded(1, None), seeded_elsewhere(1):
        assert draw() == one
    assert torch.equal(torch.get_rng_state(), torch_state)
    with seeded(None, None):
        draw()
    assert not torch.equal(torch.get_rng_state(), torch_state)
