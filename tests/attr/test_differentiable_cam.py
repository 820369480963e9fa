"""RobustCAM.differentiable: the map of attribute, with a graph that reaches the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_robust import RobustCAM


@pytest.fixture
def net() -> nn.Sequential:
    """Smooth, so that finite differences of its map exist."""
    torch.manual_seed(0)
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 7)]
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Softplus(), *pool).double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(1)).double()


@pytest.mark.parametrize("base", ["auto", "cam", "gradcam"])
@pytest.mark.parametrize("options", [{}, {"k": 1}, {"upsample": True, "normalize": None}], ids=str)
def test_it_is_the_map_of_attribute(
    net: nn.Sequential, x: Tensor, base: str, options: dict[str, Any]
) -> None:
    cam = RobustCAM(net, net[1], base=base)
    with torch.no_grad():
        with_graph = cam.differentiable(x.requires_grad_(), 1, **options)
    assert with_graph.requires_grad
    torch.testing.assert_close(with_graph.detach(), cam.attribute(x, 1, **options))


@pytest.mark.parametrize("base", ["cam", "gradcam"])
@pytest.mark.parametrize("k", [1, 3])
def test_its_gradient_is_that_of_finite_differences(
    net: nn.Sequential, x: Tensor, base: str, k: int
) -> None:
    # A head that is not linear: the weights of the map depend on the input too.
    if base == "gradcam":
        net.append(nn.Tanh())
    cam = RobustCAM(net, net[1], base=base)
    assert torch.autograd.gradcheck(
        lambda x: cam.differentiable(x, 1, k=k, normalize=None), x.requires_grad_()
    )
