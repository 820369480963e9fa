"""Layer-wise relevance propagation against its formula, and the networks it has rules for."""

from __future__ import annotations

import copy

import numpy as np
import numpy.typing as npt
import pytest
import torch
from captum.attr import LRP, InputXGradient
from torch import Tensor, nn

from captum_robust.benchmark import METHODS, compare
from captum_robust.catalog.methods import build_methods, usual_methods
from captum_robust.catalog.relevance import RelevancePropagation
from captum_robust.models import Classifier, load_classifier

from .conftest import Drawn

Array = npt.NDArray[np.float64]


def randomize(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, t in (*net.named_parameters(), *net.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator))
                if name.endswith("running_var"):
                    t.abs_()
    return net.eval()


@pytest.fixture
def simple() -> Classifier:
    """The simple classifier, with statistics of noise."""
    torch.manual_seed(0)
    model = load_classifier("simple_convnet", None, class_names=list("abcd"), input_size=32)
    model.train()(torch.rand(16, 3, 32, 32))
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def propagated(x: Array, weight: Array, bias: Array, relevance: Array, gamma: float) -> Array:
    """R_i = Σ_j x_i u_ij / (Σ_i x_i u_ij + b_j) R_j, with u = w + γ max(0, w), by a loop."""
    u = weight + gamma * np.maximum(weight, 0)
    result = np.zeros(len(x))
    for j in range(len(u)):
        z = sum(x[i] * u[j, i] for i in range(len(x))) + bias[j]
        for i in range(len(x)):
            result[i] += x[i] * u[j, i] / z * relevance[j]
    return result


def test_it_follows_the_rules_by_hand() -> None:
    # An image of one pixel: convolutions are dense layers.
    net = nn.Sequential(
        nn.Conv2d(3, 5, 1),
        nn.ReLU(),
        nn.Conv2d(5, 6, 1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(6, 4),
    )
    randomize(net)
    model = Classifier(net, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), input_size=1).eval()
    image = torch.tensor([0.9, 0.1, 0.7])
    found = RelevancePropagation(model)(image.view(1, 3, 1, 1), torch.tensor([2]))

    w1, b1, w2, *_ = (t.detach().double().numpy() for t in net.parameters())
    w1, w2 = w1.reshape(5, 3), w2.reshape(6, 5)
    norm, linear = net[3], net[8]
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(linear, nn.Linear)
    scale, shift, mean, variance = (
        t.detach().double().numpy()
        for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if t is not None
    )
    factor = scale / np.sqrt(variance + norm.eps)
    w2, b2 = factor[:, None] * w2, shift - mean * factor
    w3, b3 = linear.weight.detach().double().numpy(), linear.bias.detach().double().numpy()
    x0 = (image.double().numpy() - [0.4, 0.5, 0.6]) / [0.1, 0.2, 0.3]
    x1 = np.maximum(w1 @ x0 + b1, 0)
    x2 = np.maximum(w2 @ x1 + b2, 0)
    score = (w3 @ x2 + b3)[2]
    relevance = propagated(x2, w3, b3, np.array([0, 0, score, 0]), gamma=0)
    relevance = propagated(x1, w2, b2, relevance, gamma=0.25)
    expected = propagated(x0, w1, b1, relevance, gamma=0)
    np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).min() > 0


def test_without_biases_all_relevance_arrives(x: Tensor) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4, bias=False),
    )
    torch.manual_seed(0)
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(layer.weight, std=0.3)
    model = Classifier(net, input_size=32).eval()
    propagation = RelevancePropagation(model)
    relevance = propagation(x, torch.tensor([0, 1, 3]))
    scores = model(x).detach()[torch.arange(3), torch.tensor([0, 1, 3])]
    torch.testing.assert_close(relevance.sum(dim=(1, 2, 3)), scores, rtol=1e-2, atol=1e-3)
    # What the class docstring says of Captum's own choice of rules.
    gradient = InputXGradient(model).attribute(x, torch.tensor([0, 1, 3]))
    own = (
        LRP(propagation.chain)
        .attribute(x.clone().requires_grad_(), torch.tensor([0, 1, 3]))
        .detach()
    )
    torch.testing.assert_close(own, gradient.detach(), rtol=1e-2, atol=1e-4)
    assert not torch.allclose(relevance, gradient, rtol=1e-2, atol=1e-4)


def test_no_image_sees_another(simple: Classifier, x: Tensor) -> None:
    relevance = RelevancePropagation(simple)
    batch = relevance(x, torch.tensor([0, 1, 2]))
    single = torch.cat([relevance(x[i : i + 1], torch.tensor([i])) for i in range(3)])
    torch.testing.assert_close(batch, single, rtol=1e-3, atol=1e-5)


def test_without_a_class_it_is_that_of_the_highest_score(simple: Classifier, x: Tensor) -> None:
    relevance = RelevancePropagation(simple)
    assert torch.equal(relevance(x, None), relevance(x, simple(x).argmax(dim=1)))


def test_the_classifier_is_left_as_it_was(simple: Classifier, x: Tensor) -> None:
    simple.module.block1.train()  # type: ignore[union-attr,operator]
    simple.module.block2.requires_grad_(False)  # type: ignore[union-attr,operator]

    def world() -> list[object]:
        return [
            [(n, m.training, sorted(vars(m)), len(m._forward_hooks)) for n, m in
             simple.named_modules()],
            [(n, p.requires_grad, p.grad) for n, p in simple.named_parameters()],
            torch.get_rng_state().tolist(),
        ]  # fmt: skip

    before, weights = world(), copy.deepcopy(simple.state_dict())
    images = x.clone()
    with torch.no_grad():
        RelevancePropagation(simple)(images, torch.tensor([0, 1, 2]))
    assert world() == before
    assert all(torch.equal(t, weights[n]) for n, t in simple.state_dict().items())
    assert torch.equal(images, x)
    assert not images.requires_grad


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.relu(self.conv1(x))
        return self.linear(self.pool(x).flatten(1))


class Functional(Summed):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.conv1(x)).mean(dim=(2, 3)))


@pytest.mark.parametrize("make", [Summed, Functional])
def test_a_network_that_is_no_chain_of_its_layers_is_refused(make: type[nn.Module]) -> None:
    model = Classifier(make(), input_size=8, name="mine")
    with pytest.raises(ValueError, match=r"needs a chain of layers.*mine has branches, or"):
        RelevancePropagation(model)


def test_a_layer_without_a_rule_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Classifier(net, input_size=8)
    with pytest.raises(ValueError, match=r"has no rule for 1 \(SiLU\)$"):
        RelevancePropagation(model)
    with pytest.raises(ValueError, match=r"method 'lrp': .*no rule for 1 \(SiLU\)"):
        build_methods(model, "lrp")
    assert "lrp" not in usual_methods(model)


@pytest.mark.parametrize("name", ["resnet18", "small_resnet", "mobilenet_v2"])
def test_residual_networks_are_refused(name: str) -> None:
    model = load_classifier(name, None, input_size=32)
    with pytest.raises(ValueError, match=r"needs a chain of layers|has no rule for"):
        RelevancePropagation(model)


def test_compare_has_a_row_of_it_and_of_the_gradient(simple: Classifier, drawn: Drawn) -> None:
    assert {"lrp", "saliency"} <= set(usual_methods(simple)) <= set(METHODS)
    result = compare(simple, drawn, ["lrp", "saliency", "robust_cam"], progress=False)
    assert result.failures().empty
    assert list(result.table()["n"]) == [6, 6, 6]
    # The map is the positive part of the mean over the channels.
    x = torch.stack([torch.rand(3, 32, 32) for _ in range(2)])
    maps = build_methods(simple, "lrp")["lrp"].explain(x, torch.tensor([0, 1])).maps
    relevance = RelevancePropagation(simple)(x, torch.tensor([0, 1]))
    torch.testing.assert_close(maps, relevance.mean(dim=1).clamp(min=0))
